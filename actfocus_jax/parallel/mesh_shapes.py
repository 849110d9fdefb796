"""Which mesh shapes there are, which of them fit, and which come nearest.

Sizes only: nothing here imports jax, so that a shape that no machine could use
is refused before there is a device.

A shape has three sizes inside a slice, where devices are joined by a fast
network (ICI, NVLink), and two over slices, which a slower one joins (DCN). An
axis of the mesh is as long as their product: data * dcn_data. `tensor` never
leaves a slice: it sums activations twice a layer.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

AXES = ('data', 'fsdp', 'tensor')
DCN = ('dcn_data', 'dcn_fsdp')
_NAMED = 3  # how many shapes a refusal names


@dataclasses.dataclass(frozen=True)
class Split:
  """Something that a mesh cuts into equal parts.

  Attributes:
    what: its name, in sentences.
    size: how many there are of it.
    axes: the mesh axes that cut it, one after the other.
  """

  what: str
  size: int
  axes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Shape:
  """Sizes that are all known; `total` is the length of each mesh axis."""

  data: int
  fsdp: int
  tensor: int
  dcn_data: int = 1
  dcn_fsdp: int = 1

  @property
  def total(self) -> dict[str, int]:
    """Axis -> its length over all slices."""
    data, fsdp = self.data * self.dcn_data, self.fsdp * self.dcn_fsdp
    return {'data': data, 'fsdp': fsdp, 'tensor': self.tensor}

  @property
  def inside(self) -> tuple[int, int, int]:
    """The sizes within a slice, in the order of AXES."""
    return self.data, self.fsdp, self.tensor

  @property
  def outside(self) -> tuple[int, int, int]:
    """The sizes over slices, in the order of AXES."""
    return self.dcn_data, self.dcn_fsdp, 1

  def __str__(self) -> str:
    return self.told(AXES if math.prod(self.outside) == 1 else AXES + DCN)

  def told(self, names: Sequence[str]) -> str:
    """Those of its sizes."""
    return ' '.join(f'{name}={getattr(self, name)}' for name in names)


# --- What a model asks for ---------------------------------------------------


def of_rows(sizes: Mapping[str, int]) -> tuple[Split, ...]:
  """Batches, by name: their rows go over data and fsdp."""
  return tuple(Split(*pair, ('data', 'fsdp')) for pair in sizes.items())


# --- Choosing ----------------------------------------------------------------


def choose(
  wanted: Mapping[str, int],
  per_slice: int,
  slices: int = 1,
  splits: Iterable[Split] = (),
) -> Shape:
  """Returns the shape that `wanted` means on these devices.

  Args:
    wanted: a size for each of AXES and DCN; one of each may be -1, what the
      others leave.
    per_slice: devices of a slice.
    slices: how many slices there are.
    splits: what must go into equal parts.

  Raises:
    ValueError: if there is no such shape, or it leaves something uneven; the
      sentence names the nearest shapes that do neither.
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
    fault = _told(uneven, shape.total)
  near = nearest(wanted, per_slice, slices, splits)
  hint = _suggested(near, wanted, per_slice, slices)
  raise ValueError(f'mesh {_written(wanted)} {fault}; {hint}.')


def check(wanted: Mapping[str, int], splits: Iterable[Split]) -> None:
  """Refuses sizes that leave something uneven on any number of devices.

  Args:
    wanted: as of `choose`. An open size may become any number, so what it
      cuts must at least go into the parts of the sizes that are fixed.
    splits: as of `choose`.

  Raises:
    ValueError: one sentence, with the nearest shapes if all sizes are fixed.
  """
  splits = tuple(splits)
  known = {name: max(wanted[name], 1) for name in AXES + DCN}
  uneven = _uneven(Shape(**known).total, splits)
  if uneven is None:
    return
  fault = _told(uneven, Shape(**known).total)
  hint = f'allowed: divisors of {uneven.size}'
  if min(wanted[name] for name in AXES) > 0:
    per_slice = math.prod(known[name] for name in AXES)
    slices = math.prod(known[name] for name in DCN)
    near = nearest(wanted, per_slice, slices, splits)
    hint = _suggested(near, wanted, per_slice, slices) if near else hint
  raise ValueError(f'mesh {_written(wanted)} {fault}; {hint}.')


def nearest(
  wanted: Mapping[str, int],
  per_slice: int,
  slices: int = 1,
  splits: Sequence[Split] = (),
) -> list[Shape]:
  """Returns the possible shapes that are most like `wanted`, at most three.

  The distance is the sum of |log(size / wanted size)|: twice as much and half
  as much are equally far, an open size is never far. Of those equally far the
  one that changes fewer sizes is first, then the one with the smaller
  `tensor`, which costs most in communication.
  """

  def order(shape: Shape):
    fixed = [name for name in AXES + DCN if wanted[name] > 0]
    pairs = [(getattr(shape, name), wanted[name]) for name in fixed]
    far = sum(abs(math.log(size / want)) for size, want in pairs)
    changed = sum(size != want for size, want in pairs)
    return round(far, 6), changed, shape.tensor, shape.dcn_fsdp, shape.fsdp

  fitting = (
    shape
    for shape in _all(per_slice, slices)
    if _uneven(shape.total, splits) is None
  )
  return sorted(fitting, key=order)[:_NAMED]


def _all(per_slice: int, slices: int) -> Iterator[Shape]:
  """Every shape of these devices."""
  for data, tensor in itertools.product(_divisors(per_slice), repeat=2):
    if per_slice % (data * tensor) == 0:
      for dcn_data in _divisors(slices):
        fsdp = per_slice // (data * tensor)
        yield Shape(data, fsdp, tensor, dcn_data, slices // dcn_data)


def _divisors(number: int) -> list[int]:
  return [n for n in range(1, number + 1) if number % n == 0]


def _filled(sizes: Sequence[int], count: int) -> list[int] | None:
  """The sizes with -1 replaced, or None if they do not multiply to `count`."""
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
  """The first split whose parts would not be equal."""
  return next((s for s in splits if s.size % _parts(s, total)), None)


# --- Words -------------------------------------------------------------------


def _written(wanted: Mapping[str, int]) -> str:
  """The sizes as they were asked for."""
  return ', '.join(f'{name}={wanted[name]}' for name in _asked(wanted))


def _asked(wanted: Mapping[str, int]) -> tuple[str, ...]:
  """The axes; those over slices, too, if anybody asked."""
  is_open = (wanted['dcn_data'], wanted['dcn_fsdp']) == (-1, 1)
  return AXES if is_open else AXES + DCN


def _devices(per_slice: int, slices: int) -> str:
  devices = f'{per_slice} device' + 's' * (per_slice > 1)
  return devices if slices == 1 else f'{slices} slices of {devices} each'


def _told(split: Split, total: Mapping[str, int]) -> str:
  axes = ' * '.join(split.axes)
  return (
    f'cannot cut {split.what}, {split.size}, into {_parts(split, total)} equal'
    f' parts ({axes})'
  )


def _suggested(
  near: Sequence[Shape],
  wanted: Mapping[str, int],
  per_slice: int,
  slices: int,
) -> str:
  devices = _devices(per_slice, slices)
  if not near:
    return f'no shape of {devices} can; allowed: another number of devices'
  names = _asked(wanted) if slices == 1 else AXES + DCN
  shapes = ', or '.join(shape.told(names) for shape in near)
  return f'nearest that fit {devices} (one may be -1, the rest): {shapes}'
