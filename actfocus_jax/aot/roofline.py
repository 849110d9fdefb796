"""The least time that a chip's peaks allow: a bound, not a prediction.

A program needs at least as long as its matrix products take at the peak of the
matrix units, its bytes at the bandwidth of the memory, and what it sends at
that of the links, or as long as a message is on its way; at best all of these
overlap, so the longest counts. Reached shares below 1 divide the peaks.
"""

import dataclasses

from actfocus_jax.aot import chips


@dataclasses.dataclass(frozen=True)
class Efficiency:
  """Shares of the peaks that are taken to be reached; 1 is the bound."""

  compute: float = 1.0
  memory: float = 1.0
  network: float = 1.0


@dataclasses.dataclass(frozen=True)
class Times:
  """Seconds of one call, if nothing else took any.

  Attributes:
    compute: Of the matrix products.
    memory: Of what is read and written.
    ici: Of what a chip sends within its slice, or of the hops if they last
      longer.
    dcn: Of what it sends to other slices.
  """

  compute: float
  memory: float
  ici: float
  dcn: float

  @property
  def seconds(self) -> float:
    """Of the slowest."""
    return max(dataclasses.astuple(self))

  @property
  def bound(self) -> str:
    """The name of the slowest."""
    named = dataclasses.asdict(self)
    return max(named, key=named.get)


def times(
  chip: chips.Chip,
  *,
  flops: float,
  read_written: float,
  ici: float = 0.0,
  dcn: float = 0.0,
  hops: float = 0.0,
  efficiency: Efficiency | None = None,
) -> Times:
  """Seconds of one call.

  Args:
    chip: Of which generation.
    flops: Of one chip.
    read_written: Bytes of main memory.
    ici: Bytes sent within the slice, as if over all links of a chip.
    dcn: Bytes sent to other slices.
    hops: Within the slice, one after the other.
    efficiency: Shares of the peaks; None is all of them.

  Returns:
    The four times.
  """
  e = efficiency or Efficiency()
  return Times(
    flops / (chip.flops * e.compute),
    read_written / (chip.hbm_bandwidth * e.memory),
    max(ici / (chip.ici_bandwidth * e.network), hops * chips.HOP),
    dcn / (chip.dcn_bandwidth * e.network),
  )
