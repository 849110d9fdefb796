"""Goals: the wishes of a customer, and the goal of each seed.

The stages of one goal:

1. A product with an instruction gives a synthetic goal for every combination
   of its options, up to a million; a human instruction gives one goal.
2. A price cap is drawn for it, by a hash of the goal's text.
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

# Seeds below are for evaluation; training and demonstrations use the others.
# A test keeps it equal to that of config/schema.py.
FIRST_TRAINING_SEED = 10_000
_MOST_EVALUATION_GOALS = 500
_MOST_OF_A_PRODUCT = 1_000_000
_CAPS = tuple(10.0 * i for i in range(1, 100))


@dataclasses.dataclass(frozen=True)
class Goal:
  """A wish of a customer.

  Attributes:
    asin: id of the product that the goal was made of; others may fit too.
    text: the instruction that the model reads.
    attributes: attributes that the product must have.
    options: (name, value) pairs that must be chosen; in a human goal all names
      are empty.
    price_cap: highest price in dollars, or None.
    title, query, categories: fields of that product, which define its kind.
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
  """Return the number of synthetic goals of a product.

  Each combination of options gives one, up to a million: more would outnumber
  the goals of all other products, and the sum over a shop has to fit 64 bits.
  """
  if not (product.instruction and product.wanted):
    return 0
  combinations = math.prod(len(values) for _, values in product.options)
  return min(combinations, _MOST_OF_A_PRODUCT)


def synthetic(product: catalogue.Product, number: int) -> Goal:
  """Make one of the synthetic goals of a product, which has an instruction.

  Args:
    product: the product.
    number: number of the combination, below `synthetic_count(product)`. The
      option whose name is last in the alphabet changes fastest.
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
  """Make a goal of a human instruction; None if it names no attribute."""
  attributes = catalogue.texts_of(instruction.get('instruction_attributes'))
  text = ' '.join(catalogue.texts_of(instruction.get('instruction')))
  if not (attributes and text):
    return None
  options = catalogue.texts_of(instruction.get('instruction_options'))
  values = tuple(('', value) for value in options)
  return _goal(product, text.strip('.'), attributes, values)


def price_cap(price: float, key: object) -> float | None:
  """Return the larger of two draws from the next four multiples of 10.

  Multiples above the price and below 1000 are drawn. None if fewer than two
  are left.
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
  """Numbering of the synthetic goals of a list of products, product by product.

  `count` is the number of goals.
  """

  def __init__(self, counts: Sequence[int] | np.ndarray):
    """Take the count of each product, in order."""
    self._ends = np.cumsum(counts, dtype=np.int64)
    self.count = int(self._ends[-1]) if len(self._ends) else 0

  def place(self, number: int) -> tuple[int, int]:
    """Return the place of the product, and the number among its goals."""
    index = int(np.searchsorted(self._ends, number, side='right'))
    before = int(self._ends[index - 1]) if index else 0
    return index, number - before


class Schedule:
  """The goal of each seed; evaluation and training share no text.

  Seeds below 10,000 are for evaluation, those from there on for training and
  demonstrations. Each side follows the order of a fixed shuffle, so consecutive
  seeds give different goals until all have been used. `held_out` is the number
  of goals for evaluation.
  """

  def __init__(self, goal: Callable[[int], Goal], count: int):
    """Split `count` goals, of which a third, at most 500, is for evaluation.

    Raises:
      ValueError: too few goals to split.
    """
    held_out = min(_MOST_EVALUATION_GOALS, count // 3)
    if held_out == 0:
      raise ValueError(
        f'the shop gives {count} goals; evaluation and training need 3 or more'
      )
    self._goal, self._count, self.held_out = goal, count, held_out
    first = (shuffled(place, count) for place in range(held_out))
    self._texts = {goal(number).text for number in first}

  def number(self, seed: int) -> int:
    """Return the number of the goal of a seed (>= 0)."""
    if seed < FIRST_TRAINING_SEED:
      return shuffled(seed % self.held_out, self._count)
    others = self._count - self.held_out
    for step in range(others):
      place = (seed - FIRST_TRAINING_SEED + step) % others
      number = shuffled(self.held_out + place, self._count)
      # A shop that lists a value twice makes the same goal twice.
      if self._goal(number).text not in self._texts:
        return number
    raise ValueError('every goal for training equals one for evaluation')


def shuffled(place: int, count: int) -> int:
  """Return a place of a fixed shuffle of `range(count)`.

  A Feistel network permutes the numbers of an even count of bits; a result
  that is too large goes through it again. Nothing of size `count` is stored.
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
