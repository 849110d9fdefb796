"""A shop in memory, and the choice of a shop."""

import functools
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from actfocus_jax.envs.webshop import (
  catalogue,
  goals,
  search,
  small_shop,
  store,
)

_INDEX_NAME = 'webshop_index'


class MemoryShop:
  """Some thousands of products in memory."""

  def __init__(
    self,
    products: Iterable[catalogue.Product],
    instructions: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
  ):
    """Index the products; the first of two with the same ASIN is kept.

    Args:
      products: products in the order of the shop.
      instructions: human instructions by ASIN; None for synthetic goals.
    """
    self._products: dict[str, catalogue.Product] = {}
    for product in products:
      self._products.setdefault(product.asin, product)
    self._asins = list(self._products)
    self._numbering = goals.Numbering(
      [*map(goals.synthetic_count, self._products.values())]
    )
    self.goal_count, self._human = self._numbering.count, None
    if instructions is not None:
      every = (
        goals.human(product, instruction)
        for asin, product in self._products.items()
        for instruction in instructions.get(asin, ())
      )
      self._human = [goal for goal in every if goal is not None]
      self.goal_count = len(self._human)
    # Built here, because many threads may start the first search at once.
    texts = map(search.text_of, self._products.values())
    self._index = search.MemoryIndex([*texts])
    self.find = functools.lru_cache(maxsize=1 << 14)(self._find)

  def product(self, asin: str) -> catalogue.Product | None:
    """Return the product with an ASIN, or None."""
    return self._products.get(asin)

  def goal(self, number: int) -> goals.Goal:
    """Return the goal with a number below `goal_count`."""
    if self._human is not None:
      return self._human[number]
    position, goal = self._numbering.place(number)
    return goals.synthetic(self._products[self._asins[position]], goal)

  def _find(self, query: str) -> tuple[str, ...]:
    """Return the ASINs that a search finds, best first, at most 50."""
    return tuple(self._asins[i] for i in self._index.best(query))


Shop = MemoryShop | store.DiskShop  # with the same methods


def open_shop(
  *,
  data: str,
  human: bool,
  index: str,
  shop_seed: int,
  products: int,
  progress: Callable[[str, float], None],
) -> Shop:
  """Open a shop, once per process; the arguments are those of `WebShop`.

  Raises:
    ValueError: files or libraries are missing, or something does not fit.
  """
  search.require('bm25s', 'Stemmer', 'rapidfuzz')
  if not data and (human or index):
    named = "goals='human'" if human else f'index {index!r}'
    raise ValueError(f"{named} needs data; it is ''")
  if not data:
    return _built_in(shop_seed, products)
  place = pathlib.Path(index).expanduser() if index else None
  if place is not None and store.is_built(place):
    return _on_disk(place.resolve(), human, data)
  files = catalogue.find(data, human=human, full=bool(index))
  if not files.is_full:
    paths = [files.products, files.notes, *filter(None, [files.human])]
    stats = [path.stat() for path in paths]
    stamps = tuple((stat.st_size, stat.st_mtime_ns) for stat in stats)
    return _in_memory(files, human, stamps)
  place = place or files.products.parent / _INDEX_NAME
  if not store.is_built(place):
    store.build(files, place, progress)
  return _on_disk(place.resolve(), human, data)


@functools.lru_cache(maxsize=8)
def _built_in(shop_seed: int, products: int) -> MemoryShop:
  return MemoryShop(small_shop.make(shop_seed, products))


@functools.lru_cache(maxsize=2)
def _in_memory(files: catalogue.Files, human: bool, stamps) -> MemoryShop:
  del stamps  # Changed files are other files.
  notes = dict(catalogue.read_notes(files.notes))
  products = catalogue.read_products(files, lambda a: notes.get(a, {}))
  if not human:
    return MemoryShop(products)
  return MemoryShop(products, dict(catalogue.read_instructions(files.human)))


@functools.lru_cache(maxsize=2)
def _on_disk(place: pathlib.Path, human: bool, data: str) -> store.DiskShop:
  store.check_source(place, pathlib.Path(data).expanduser())
  return store.DiskShop(place, human=human)
