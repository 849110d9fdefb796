"""Goals: what a customer asks for, and which goal belongs to a seed.

The life of one goal:

1. A product with an instruction gives a synthetic goal for every combination
   of its options, up to a million; a human instruction gives one goal.
2. A price cap is drawn for it, from a number that belongs to the goal's text.
3. A fixed shuffle puts all goals in order: its first part is for evaluation,
   the rest for training (`Schedule`). A seed picks a place in one of the two.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from actfocus_jax.envs.webshop import catalogue

# Seeds below are for evaluation; training and demonstrations have those above.
# A test keeps it equal to that of config/schema.py.
FIRST_TRAINING_SEED = 10_000
_MOST_EVALUATION_GOALS = 500
_MOST_OF_A_PRODUCT = 1_000_000
_CAPS = tuple(10.0 * i for i in range(1, 100))


@dataclasses.dataclass(frozen=True)
class Goal:
  """What is asked for.

  Attributes:
    asin: the product that the goal was made of; others may do as well.
    text: as the customer says it.
    attributes: what the product must have.
    options: what must be chosen, as (name, value); a human goal has values
      only, with empty names.
    price_cap: most that it may cost, or None.
    title: of the product, for the comparison of kinds.
    query: likewise.
    categories: likewise.
  """

  asin: str
  text: str
  attributes: tuple[str, ...]
  options: tuple[tuple[str, str], ...]
  price_cap: float | None
  title: str
  query: str
  categories: tuple[str, ...]


def synthetic_count(product: catalogue.Product) -> int:
  """How many synthetic goals a product gives.

  Args:
    product: of which every combination of options gives one; of more than a
      million, which would outnumber the goals of all others, the first million.

  Returns:
    A number that sums up over any shop in 64 bits.
  """
  if not (product.instruction and product.wanted):
    return 0
  combinations = math.prod(len(values) for _, values in product.options)
  return min(combinations, _MOST_OF_A_PRODUCT)


def synthetic(product: catalogue.Product, number: int) -> Goal:
  """One of the synthetic goals of a product.

  Args:
    product: has an instruction.
    number: of the combination, below `synthetic_count(product)`; the option
      whose name comes last in the alphabet changes fastest.

  Returns:
    The goal.
  """
  chosen = []
  for name, values in reversed(sorted(product.options)):
    number, place = divmod(number, len(values))
    chosen.append((name, values[place]))
  chosen.reverse()
  wish = ', and '.join(f'{name}: {value}' for name, value in chosen)
  text = f'{product.instruction} with {wish}' if wish else product.instruction
  return _goal(product, text, product.wanted, tuple(chosen))


def human(
  product: catalogue.Product, instruction: Mapping[str, Any]
) -> Goal | None:
  """A goal in a person's words, or None where it asks for no attribute.

  Args:
    product: the product it is about.
    instruction: an entry of `items_human_ins*.json`.
  """
  attributes = catalogue.texts_of(instruction.get('instruction_attributes'))
  text = ' '.join(catalogue.texts_of(instruction.get('instruction')))
  if not (attributes and text):
    return None
  options = catalogue.texts_of(instruction.get('instruction_options'))
  return _goal(
    product,
    text.strip('.'),
    attributes,
    tuple(('', value) for value in options),
  )


def price_cap(price: float, key: object) -> float | None:
  """The larger of two different draws from the next four multiples of 10.

  Args:
    price: of the product; multiples above it and below 1000 are drawn from.
    key: fixes the draw.

  Returns:
    The cap, or None where fewer than two multiples are left.
  """
  above = [cap for cap in _CAPS if cap > price][:4]
  pairs = list(itertools.combinations(above, 2))
  if not pairs:
    return None
  return max(pairs[catalogue.hashed('cap', key) % len(pairs)])


def _goal(product, text, attributes, options) -> Goal:
  cap = price_cap(product.price, (product.asin, text))
  limit = '' if cap is None else f', and price lower than {cap:.2f} dollars'
  return Goal(
    asin=product.asin,
    text=text + limit,
    attributes=attributes,
    options=options,
    price_cap=cap,
    title=product.title,
    query=product.query,
    categories=product.categories,
  )


class Numbering:
  """Numbers the synthetic goals of a list of products, product by product.

  Attributes:
    count: how many there are.
  """

  def __init__(self, counts: Sequence[int] | np.ndarray):
    """Takes the count of each product, in order."""
    self._ends = np.cumsum(counts, dtype=np.int64)
    self.count = int(self._ends[-1]) if len(self._ends) else 0

  def place(self, number: int) -> tuple[int, int]:
    """The place of the product, and the number among its own goals."""
    index = int(np.searchsorted(self._ends, number, side='right'))
    before = int(self._ends[index - 1]) if index else 0
    return index, number - before


class Schedule:
  """Which goal belongs to a seed; no text is on both sides.

  Seeds below 10,000 are for evaluation. Seeds from there on are for training
  and for demonstrations. Each side is gone through in the order of a fixed
  shuffle, so that seeds that follow each other give different goals until all
  have been used.

  Attributes:
    held_out: how many goals are for evaluation.
  """

  def __init__(self, goal: Callable[[int], Goal], count: int):
    """Splits the goals.

    Args:
      goal: number -> goal.
      count: how many there are; a third, at most 500, is for evaluation.

    Raises:
      ValueError: too few goals to split.
    """
    held_out = min(_MOST_EVALUATION_GOALS, count // 3)
    if held_out == 0:
      raise ValueError(
        f'the shop gives {count} goals; evaluation and training need 3 or more'
      )
    self._goal, self._count, self.held_out = goal, count, held_out
    self._texts = {goal(self._at(place)).text for place in range(held_out)}

  def number(self, seed: int) -> int:
    """The number of the goal that belongs to a seed (>= 0)."""
    if seed < FIRST_TRAINING_SEED:
      return self._at(seed % self.held_out)
    others = self._count - self.held_out
    for step in range(others):
      place = (seed - FIRST_TRAINING_SEED + step) % others
      number = self._at(self.held_out + place)
      # A shop that lists a value twice makes the same goal twice.
      if self._goal(number).text not in self._texts:
        return number
    raise ValueError('every goal for training equals one for evaluation')

  def _at(self, place: int) -> int:
    return shuffled(place, self._count)


def shuffled(place: int, count: int) -> int:
  """Where a fixed shuffle of `range(count)` puts a place.

  A Feistel network permutes the numbers of an even count of bits; a result
  that is too large goes through it again. Nothing of size `count` is stored.

  Args:
    place: at least 0 and below `count`.
    count: how many are shuffled.

  Returns:
    A number below `count`; different for different places.
  """
  half = max(1, ((count - 1).bit_length() + 1) // 2)
  mask = (1 << half) - 1
  while True:
    left, right = place >> half, place & mask
    for turn in range(4):
      mixed = catalogue.hashed('shuffle', count, turn, right) & mask
      left, right = right, left ^ mixed
    place = left << half | right
    if place < count:
      return place
