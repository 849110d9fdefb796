"""Mesh shapes: the possible ones, those that fit, and the nearest.

These are sizes only, so a shape that no machine could use is refused before a
device is needed.

A shape has three sizes inside a slice, whose devices a fast network joins (ICI,
NVLink), and two over slices, which a slower network joins (DCN). The length of
a mesh axis is their product, such as data * dcn_data. `tensor` stays inside a
slice, since it sums activations twice per layer.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

AXES = ('data', 'fsdp', 'tensor')
DCN = ('dcn_data', 'dcn_fsdp')
_NAMED = 3  # Number of shapes in an error message.


@dataclasses.dataclass(frozen=True)
class Split:
  """Size that the mesh must cut into equal parts.

  Attributes:
    what: name of the size, for messages.
    size: the number to cut.
    axes: mesh axes that cut it, one after the other.
  """

  what: str
  size: int
  axes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Shape:
  """Shape whose sizes are all known."""

  data: int
  fsdp: int
  tensor: int
  dcn_data: int = 1
  dcn_fsdp: int = 1

  @property
  def total(self) -> dict[str, int]:
    """Length of each mesh axis, over all slices."""
    data, fsdp = self.data * self.dcn_data, self.fsdp * self.dcn_fsdp
    return {'data': data, 'fsdp': fsdp, 'tensor': self.tensor}

  @property
  def inside(self) -> tuple[int, int, int]:
    """Sizes within a slice, in the order of AXES."""
    return self.data, self.fsdp, self.tensor

  @property
  def outside(self) -> tuple[int, int, int]:
    """Sizes over slices, in the order of AXES."""
    return self.dcn_data, self.dcn_fsdp, 1

  def __str__(self) -> str:
    return self.format(AXES if math.prod(self.outside) == 1 else AXES + DCN)

  def format(self, names: Sequence[str]) -> str:
    """Return the named sizes as text."""
    return ' '.join(f'{name}={getattr(self, name)}' for name in names)


def row_splits(sizes: Mapping[str, int]) -> tuple[Split, ...]:
  """Return the splits of batches, given as name -> number of rows."""
  return tuple(Split(*pair, ('data', 'fsdp')) for pair in sizes.items())


def choose(
  wanted: Mapping[str, int],
  per_slice: int,
  slices: int = 1,
  splits: Iterable[Split] = (),
) -> Shape:
  """Return the shape that `wanted` means on these devices.

  `wanted` has a size for each of AXES and DCN; one of each may be -1, the rest.

  Raises:
    ValueError: there is no such shape, or it leaves a split uneven; the
      sentence names the nearest shapes that fit.
  """
  splits = tuple(splits)
  inside = _filled([wanted[name] for name in AXES], per_slice)
  outside = _filled([wanted[name] for name in DCN], slices)
  if inside is None or outside is None:
    fault = f'does not fit {_devices(per_slice, slices)}'
  else:
    shape = Shape(*inside, *outside)
    uneven = _uneven(shape.total, splits)
    if uneven is None:
      return shape
    fault = _uneven_fault(uneven, shape.total)
  near = nearest(wanted, per_slice, slices, splits)
  hint = _nearest_hint(near, wanted, per_slice, slices)
  raise ValueError(f'mesh {_format_wanted(wanted)} {fault}; {hint}.')


def check(wanted: Mapping[str, int], splits: Iterable[Split]) -> None:
  """Refuse sizes that leave a split uneven on any number of devices.

  An open size, -1, may become any number, so it counts as 1.

  Raises:
    ValueError: one sentence, with the nearest shapes if all sizes are fixed.
  """
  splits = tuple(splits)
  known = {name: max(wanted[name], 1) for name in AXES + DCN}
  uneven = _uneven(Shape(**known).total, splits)
  if uneven is None:
    return
  fault = _uneven_fault(uneven, Shape(**known).total)
  hint = f'allowed: divisors of {uneven.size}'
  if min(wanted[name] for name in AXES) > 0:
    per_slice = math.prod(known[name] for name in AXES)
    slices = math.prod(known[name] for name in DCN)
    near = nearest(wanted, per_slice, slices, splits)
    hint = _nearest_hint(near, wanted, per_slice, slices) if near else hint
  raise ValueError(f'mesh {_format_wanted(wanted)} {fault}; {hint}.')


def nearest(
  wanted: Mapping[str, int],
  per_slice: int,
  slices: int = 1,
  splits: Sequence[Split] = (),
) -> list[Shape]:
  """Return the possible shapes that are nearest to `wanted`, at most three.

  The distance is the sum of |log(size / wanted size)|: double and half are
  equally far, and open sizes do not count. At equal distance the shape with
  fewer changed sizes comes first, then the one with the smaller `tensor`, which
  needs most communication.
  """

  def order(shape: Shape):
    fixed = [name for name in AXES + DCN if wanted[name] > 0]
    pairs = [(getattr(shape, name), wanted[name]) for name in fixed]
    distance = sum(abs(math.log(size / want)) for size, want in pairs)
    changed = sum(size != want for size, want in pairs)
    return round(distance, 6), changed, shape.tensor, shape.dcn_fsdp, shape.fsdp

  fitting = (
    shape
    for shape in _all_shapes(per_slice, slices)
    if _uneven(shape.total, splits) is None
  )
  return sorted(fitting, key=order)[:_NAMED]


def _all_shapes(per_slice: int, slices: int) -> Iterator[Shape]:
  for data, tensor in itertools.product(_divisors(per_slice), repeat=2):
    if per_slice % (data * tensor) == 0:
      for dcn_data in _divisors(slices):
        fsdp = per_slice // (data * tensor)
        yield Shape(data, fsdp, tensor, dcn_data, slices // dcn_data)


def _divisors(number: int) -> list[int]:
  return [n for n in range(1, number + 1) if number % n == 0]


def _filled(sizes: Sequence[int], count: int) -> list[int] | None:
  """Replace -1; return None if the sizes do not multiply to `count`."""
  fixed = math.prod(size for size in sizes if size != -1)
  if -1 not in sizes:
    rest = 1
  elif fixed > 0 and count % fixed == 0 and list(sizes).count(-1) == 1:
    rest = count // fixed
  else:
    return None
  filled = [rest if size == -1 else size for size in sizes]
  fits = min(filled) > 0 and math.prod(filled) == count
  return filled if fits else None


def _parts(split: Split, total: Mapping[str, int]) -> int:
  return math.prod(total[axis] for axis in split.axes)


def _uneven(total: Mapping[str, int], splits: Iterable[Split]) -> Split | None:
  """Return the first split whose parts would not be equal."""
  return next((s for s in splits if s.size % _parts(s, total)), None)


# --- Messages ----------------------------------------------------------------


def _format_wanted(wanted: Mapping[str, int]) -> str:
  return ', '.join(f'{name}={wanted[name]}' for name in _shown(wanted))


def _shown(wanted: Mapping[str, int]) -> tuple[str, ...]:
  """Names of the sizes to show: those over slices unless they are defaults."""
  is_default = (wanted['dcn_data'], wanted['dcn_fsdp']) == (-1, 1)
  return AXES if is_default else AXES + DCN


def _devices(per_slice: int, slices: int) -> str:
  devices = f'{per_slice} device' + 's' * (per_slice > 1)
  return devices if slices == 1 else f'{slices} slices of {devices} each'


def _uneven_fault(split: Split, total: Mapping[str, int]) -> str:
  axes = ' * '.join(split.axes)
  return (
    f'cannot cut {split.what}, {split.size}, into {_parts(split, total)} equal'
    f' parts ({axes})'
  )


def _nearest_hint(
  near: Sequence[Shape],
  wanted: Mapping[str, int],
  per_slice: int,
  slices: int,
) -> str:
  devices = _devices(per_slice, slices)
  if not near:
    return f'no shape of {devices} can; allowed: another number of devices'
  names = _shown(wanted) if slices == 1 else AXES + DCN
  shapes = ', or '.join(shape.format(names) for shape in near)
  return f'nearest that fit {devices} (one may be -1, the rest): {shapes}'
