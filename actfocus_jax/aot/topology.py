"""Slices by name: `v5e:4x4`, checked before anything slow is imported."""

import dataclasses
import difflib
import math
import re
from typing import Any

from actfocus_jax import errors
from actfocus_jax.aot import chips

MOST_SLICES = 64


@dataclasses.dataclass(frozen=True)
class Topology:
  """Some slices of one shape.

  Attributes:
    chip: Of which kind.
    shape: Of one slice, e.g. '4x4'.
    slices: How many, joined by the data-center network.
  """

  chip: chips.Chip
  shape: str
  slices: int = 1

  @property
  def sizes(self) -> tuple[int, ...]:
    """Chips of one slice in each dimension."""
    return tuple(int(size) for size in self.shape.split('x'))

  @property
  def slice_chips(self) -> int:
    """Chips of one slice."""
    return math.prod(self.sizes)

  @property
  def chips(self) -> int:
    """Chips of all slices."""
    return self.slice_chips * self.slices

  @property
  def pool(self) -> int:
    """Hosts of all slices, as the TPU API makes them."""
    if self.slice_chips <= self.chip.alone_chips:
      return self.slices
    return self.slices * self.slice_chips // self.chip.host_chips

  def __str__(self) -> str:
    one = f'{self.chip.name}:{self.shape}'
    return one if self.slices == 1 else f'{self.slices} x {one}'


def parse(
  text: str, slices: int = 1, *, named: str = '--topology is'
) -> Topology:
  """Reads `KIND:SHAPE`.

  Args:
    text: E.g. 'v5e:4x4'.
    slices: How many of them.
    named: How a refusal begins.

  Returns:
    The topology.

  Raises:
    UsageError: One sentence that lists what there is and names the nearest.
  """
  kind, _, shape = text.partition(':')
  if kind not in chips.CHIPS:
    raise errors.UsageError(
      f'{named} {text!r}; allowed: KIND:SHAPE with KIND one of '
      f'{", ".join(chips.CHIPS)}, e.g. v5e:4x4.'
    )
  chip = chips.CHIPS[kind]
  if shape not in chip.slices:
    near = _nearest(shape, chip.slices)
    raise errors.UsageError(
      f'{named} {text!r}; slices of {kind}: {", ".join(chip.slices)}; '
      f'the nearest is {kind}:{near}.'
    )
  if not 1 <= slices <= MOST_SLICES:
    raise errors.UsageError(
      f'--slices is {slices}; allowed: 1 to {MOST_SLICES}.'
    )
  return Topology(chip, shape, slices)


def _nearest(shape: str, allowed: tuple[str, ...]) -> str:
  """The slice of about as many chips; of several, the one written alike."""
  sizes = [int(size) for size in re.findall(r'\d+', shape)] or [1]
  wanted = max(math.prod(sizes), 1)

  def distance(one: str) -> tuple[float, float]:
    chips_of_one = math.prod(int(size) for size in one.split('x'))
    alike = difflib.SequenceMatcher(None, shape, one).ratio()
    return abs(math.log(chips_of_one / wanted)), -alike

  return min(allowed, key=distance)


def all_of(kind: str) -> list[Topology]:
  """Every single slice of a generation, the smallest first."""
  return [Topology(chips.CHIPS[kind], x) for x in chips.CHIPS[kind].slices]


def devices(topology: Topology) -> list[Any]:
  """Devices that exist for the compiler only, slice after slice.

  Raises:
    UsageError: When the compiler does not know the slice.
  """
  from jax.experimental import topologies

  options: dict[str, Any] = {}
  if topology.slices > 1:
    options['num_slices'] = topology.slices
  if topology.slice_chips < topology.chip.host_chips:
    options['chips_per_host_bounds'] = (1, 1, 1)
  try:
    found = topologies.get_topology_desc(
      topology_name=f'{topology.chip.name}:{topology.shape}',
      platform='tpu',
      **options,
    )
  except Exception as error:  # Whatever the library raises, it is no slice.
    raise errors.UsageError(
      f'--topology is {str(topology)!r}, which the installed libtpu cannot '
      f'describe: {" ".join(str(error).split())[:200]}'
    ) from error
  return sorted(found.devices, key=lambda d: (slice_of(d), d.id))


def slice_of(device: Any) -> int:
  """The slice that a device is in; devices of a single one do not say."""
  return getattr(device, 'slice_index', 0) or 0
