"""TPU chips and the slices that are offered.

The peaks are Google's data sheets (cloud.google.com/tpu/docs, pages v5e, v5p
and v6e, late 2026). The interconnect figure is one direction, all links of a
chip together: half of what the sheets call bidirectional. Prices are list
prices on demand in the USA, early 2026.
"""

import dataclasses
import math
import re
from typing import Any

MOST_SLICES = 64


class UsageError(ValueError):
  """A slice that is not offered, or that libtpu does not know."""


@dataclasses.dataclass(frozen=True)
class Chip:
  """One generation.

  Attributes:
    name: first part of a topology's name.
    flops: peak of bfloat16 products with float32 sums, FLOP/s.
    hbm: bytes of memory on the data sheet; the compiler uses a little less.
    hbm_bandwidth: bytes/s of that memory.
    ici_bandwidth: bytes/s that a chip sends within its slice.
    dcn_bandwidth: bytes/s that a chip sends to other slices.
    price: dollars per chip and hour.
    shapes: shapes of the offered slices, the smallest first.
  """

  name: str
  flops: float
  hbm: float
  hbm_bandwidth: float
  ici_bandwidth: float
  dcn_bandwidth: float
  price: float
  shapes: tuple[str, ...]


_GBPS = 1e9 / 8  # Gbit/s in bytes/s
_FLAT = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_DEEP = (
  *('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8'),
  *('4x8x8', '8x8x8', '8x8x16', '8x16x16', '16x16x16'),
)

CHIPS = {
  'v5e': Chip(
    name='v5e',
    flops=197e12,
    hbm=16 * 2**30,
    hbm_bandwidth=819e9,
    ici_bandwidth=1600 * _GBPS,
    dcn_bandwidth=25 * _GBPS,  # 6.4 Tbit/s for a pod of 256
    price=1.20,
    shapes=_FLAT,
  ),
  'v6e': Chip(
    name='v6e',
    flops=918e12,
    hbm=32 * 2**30,
    hbm_bandwidth=1638e9,
    ici_bandwidth=3200 * _GBPS,
    dcn_bandwidth=100 * _GBPS,  # 25.6 Tbit/s for a pod of 256
    price=2.70,
    shapes=_FLAT,
  ),
  'v5p': Chip(
    name='v5p',
    flops=459e12,
    hbm=95 * 2**30,
    hbm_bandwidth=2765e9,
    ici_bandwidth=4800 * _GBPS,
    dcn_bandwidth=50 * _GBPS,
    price=4.20,
    shapes=_DEEP,
  ),
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """Some slices of one shape.

  Attributes:
    chip: generation of the chips.
    shape: shape of one slice, for example '4x4'.
    slices: number of slices, joined by the data-center network.
  """

  chip: Chip
  shape: str
  slices: int = 1

  @property
  def slice_chips(self) -> int:
    """Number of chips of one slice."""
    return _chips(self.shape)

  @property
  def chips(self) -> int:
    """Number of chips of all slices."""
    return self.slice_chips * self.slices

  def __str__(self) -> str:
    name = f'{self.chip.name}:{self.shape}'
    return name if self.slices == 1 else f'{self.slices} x {name}'


def _chips(shape: str) -> int:
  return math.prod(int(size) for size in re.findall(r'\d+', shape))


def parse(text: str, slices: int = 1, *, flag: str = '--topology') -> Topology:
  """Read `KIND:SHAPE`, for example `v5e:4x4`.

  Args:
    text: the name.
    slices: number of slices.
    flag: flag that an error names.

  Raises:
    UsageError: one sentence with the allowed names and the nearest slice.
  """
  kind, _, shape = text.partition(':')
  if kind not in CHIPS:
    raise UsageError(
      f'{flag} has {text!r}; allowed: KIND:SHAPE with KIND one of '
      f'{", ".join(CHIPS)}, for example v5e:4x4.'
    )
  shapes = CHIPS[kind].shapes
  if shape not in shapes:
    wanted = max(_chips(shape), 1)
    near = min(shapes, key=lambda x: abs(math.log(_chips(x) / wanted)))
    raise UsageError(
      f'{flag} has {text!r}; slices of {kind}: {", ".join(shapes)}; the '
      f'nearest is {kind}:{near}.'
    )
  if not 1 <= slices <= MOST_SLICES:
    raise UsageError(f'--slices is {slices}; allowed: 1 to {MOST_SLICES}.')
  return Topology(CHIPS[kind], shape, slices)


def all_of(kind: str) -> list[Topology]:
  """Every single slice of a generation, the smallest first."""
  return [Topology(CHIPS[kind], shape) for shape in CHIPS[kind].shapes]


def with_chips(kind: str, count: int) -> Topology | None:
  """As few slices as hold `count` chips; None if no slices do."""
  for topology in reversed(all_of(kind)):
    slices, rest = divmod(count, topology.chips)
    if slices and not rest:
      return dataclasses.replace(topology, slices=slices)
  return None


def devices(topology: Topology) -> list[Any]:
  """Devices that exist for the compiler only, slice after slice.

  Raises:
    UsageError: if the installed libtpu does not know the slice.
  """
  from jax.experimental import topologies

  options: dict[str, Any] = {}
  if topology.slices > 1:
    options['num_slices'] = topology.slices
  if topology.slice_chips == 1:
    options['chips_per_host_bounds'] = (1, 1, 1)
  try:
    description = topologies.get_topology_desc(
      topology_name=f'{topology.chip.name}:{topology.shape}',
      platform='tpu',
      **options,
    )
  except Exception as error:  # libtpu raises several kinds.
    raise UsageError(
      f'--topology is {str(topology)!r}, which the installed libtpu cannot '
      f'describe: {" ".join(str(error).split())[:200]}'
    ) from error
  return sorted(description.devices, key=lambda d: (slice_of(d), d.id))


def slice_of(device: Any) -> int:
  """Index of the slice of a device; 0 where there is one slice."""
  return getattr(device, 'slice_index', 0) or 0
