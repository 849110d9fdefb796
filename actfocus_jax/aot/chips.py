"""TPU chips and the slices that are offered.

The peaks are Google's data sheets (cloud.google.com/tpu/docs, pages v5e, v5p
and v6e, late 2026). The bandwidth within a slice is one direction, all links of
a chip together: half of what the sheets call bidirectional.
"""

import dataclasses
import math
import re
from typing import Any

from actfocus_jax import errors

MOST_SLICES = 64


@dataclasses.dataclass(frozen=True)
class Chip:
  """Specification of one TPU generation.

  Attributes:
    flops: peak of bfloat16 products with float32 sums, FLOP/s.
    hbm_bandwidth: bytes/s of main memory.
    ici_bandwidth: bytes/s that a chip sends within its slice.
    dcn_bandwidth: bytes/s that a chip sends to other slices.
    shapes: shapes of the offered slices, the smallest first.
  """

  flops: float
  hbm_bandwidth: float
  ici_bandwidth: float
  dcn_bandwidth: float
  shapes: tuple[str, ...]


_FLAT = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_DEEP = (
  *('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8'),
  *('4x8x8', '8x8x8', '8x8x16', '8x16x16', '16x16x16'),
)
CHIPS = {
  #           FLOP/s  memory    in slice  between slices
  'v5e': Chip(197e12, 819e9, 200e9, 3.125e9, _FLAT),
  'v6e': Chip(918e12, 1638e9, 400e9, 12.5e9, _FLAT),
  'v5p': Chip(459e12, 2765e9, 600e9, 6.25e9, _DEEP),
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """Some slices of one shape.

  Attributes:
    kind: generation of the chips, a key of CHIPS.
    shape: shape of one slice, for example '4x4'.
    slices: number of slices, joined by the data-center network.
  """

  kind: str
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
    name = f'{self.kind}:{self.shape}'
    return name if self.slices == 1 else f'{self.slices} x {name}'


def _chips(shape: str) -> int:
  return math.prod(int(size) for size in re.findall(r'\d+', shape))


def parse(text: str, slices: int = 1) -> list[Topology]:
  """Read `KIND:SHAPE`, or `KIND` for all its slices, the smallest first.

  Args:
    text: the value of `--topology`, for example `v5e:4x4`.
    slices: number of slices.

  Raises:
    UsageError: one sentence with the allowed names and the nearest slice.
  """
  kind, _, shape = text.partition(':')
  if kind not in CHIPS:
    raise errors.UsageError(
      f'--topology has {text!r}; allowed: KIND:SHAPE or KIND with KIND one of '
      f'{", ".join(CHIPS)}, for example v5e:4x4.'
    )
  if not 1 <= slices <= MOST_SLICES:
    raise errors.UsageError(
      f'--slices is {slices}; allowed: 1 to {MOST_SLICES}.'
    )
  shapes = CHIPS[kind].shapes
  if text == kind:
    return [Topology(kind, shape, slices) for shape in shapes]
  if shape not in shapes:
    wanted = max(_chips(shape), 1)
    near = min(shapes, key=lambda x: abs(math.log(_chips(x) / wanted)))
    raise errors.UsageError(
      f'--topology has {text!r}; slices of {kind}: {", ".join(shapes)}; the '
      f'nearest is {kind}:{near}.'
    )
  return [Topology(kind, shape, slices)]


def with_chips(kind: str, count: int) -> Topology | None:
  """Return as few slices as hold `count` chips; None if no slices do."""
  for shape in reversed(CHIPS[kind].shapes):
    slices, rest = divmod(count, _chips(shape))
    if slices and not rest:
      return Topology(kind, shape, slices)
  return None


def devices(topology: Topology) -> list[Any]:
  """Return devices that exist for the compiler only, slice after slice.

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
      topology_name=f'{topology.kind}:{topology.shape}',
      platform='tpu',
      **options,
    )
  except Exception as error:  # libtpu raises several exception types.
    raise errors.UsageError(
      f'--topology is {str(topology)!r}, which the installed libtpu cannot '
      f'describe: {" ".join(str(error).split())[:200]}'
    ) from error
  return sorted(
    description.devices,
    key=lambda device: (getattr(device, 'slice_index', 0) or 0, device.id),
  )
