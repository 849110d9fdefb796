"""How the chips of a slice are joined, and what a group of them can use.

Every chip has two links in each dimension of its kind. Those along which the
members of a group differ are what it can use: both of a dimension where its
line is closed to a ring, and one where it is not, for the last chip of an open
line has no second neighbour.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Span(NamedTuple):
  """What joins a group.

  Attributes:
    share: Of the links of a chip, those that the group can use.
    hops: From neighbour to neighbour, until two that are farthest apart have
      heard of each other.
  """

  share: float
  hops: int


ALONE = Span(1.0, 0)


@dataclasses.dataclass(frozen=True)
class Torus:
  """Chips in two or three dimensions.

  Attributes:
    sizes: Of one slice; those of 1 count, for their links are there.
  """

  sizes: tuple[int, ...]

  @property
  def closed(self) -> tuple[bool, ...]:
    """Whether the lines of each dimension are rings.

    In three dimensions those of whole cubes of 4 x 4 x 4 are, in two those that
    are as long as the pod, 16.
    """
    if len(self.sizes) == 3:
      return (all(size % 4 == 0 for size in self.sizes),) * 3
    return tuple(size == 16 for size in self.sizes)

  def span(self, places_ND: np.ndarray) -> Span:
    """Of chips at these coordinates."""
    links = hops = 0
    for size, is_closed, line_N in zip(
      self.sizes, self.closed, places_ND.T, strict=True
    ):
      own = sorted(set(line_N.tolist()))
      if len(own) == 1:
        continue
      links += 2 if is_closed and len(own) == size else 1
      hops += _farthest(own, size if is_closed else 0)
    return Span(links / (2 * len(self.sizes)), hops) if links else ALONE

  def spans(self, axes: Sequence[int]) -> list[Span]:
    """Of the groups along each axis of a mesh, laid as jax would.

    The last axis is laid first: over as many whole dimensions as make its size,
    or else over parts of them.
    """
    left, found = list(self.sizes), []
    for size in reversed(axes):
      part = self._part(left, size)
      left = [n // taken for n, taken in zip(left, part, strict=True)]
      places = np.unravel_index(np.arange(math.prod(part)), part)
      found.append(self.span(np.stack(places, axis=1)))
    return found[::-1]

  def _part(self, left: list[int], size: int) -> list[int]:
    """How much of what is left of each dimension an axis takes."""
    free = [d for d, n in enumerate(left) if n > 1]
    for count in range(len(free), -1, -1):
      for whole in itertools.combinations(free, count):
        if math.prod(left[d] for d in whole) == size:
          return [n if d in whole else 1 for d, n in enumerate(left)]
    part = []
    for n in left:
      part.append(math.gcd(n, size))
      size //= part[-1]
    return part


def _farthest(places: Sequence[int], ring: int) -> int:
  """Hops between the two farthest apart, on a ring of a size (or a line, 0)."""
  apart = (abs(a - b) for a, b in itertools.combinations(places, 2))
  return max(min(far, ring - far) if ring else far for far in apart)
