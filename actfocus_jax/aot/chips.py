"""TPU chips: the public figures that a roofline needs.

Peaks are Google's data sheets (cloud.google.com/tpu/docs, pages v5e, v5p and
v6e, as they stood in late 2026). Interconnect figures are those of one
direction, all links of a chip together: half of what the sheets call
bidirectional. Prices are an assumption: on-demand list prices in the USA,
before any discount, as they stood in early 2026; `--price` says otherwise. The
time of a hop is the rule of thumb of "How to Scale Your Model"
(jax-ml.github.io/scaling-book, part 3).
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
  """One generation.

  Attributes:
    name: As in a topology's name.
    flops: Peak of bfloat16 products with float32 sums, FLOP/s.
    hbm: Bytes of memory on the data sheet; the compiler can use a little less.
    hbm_bandwidth: Bytes/s.
    ici_bandwidth: Bytes/s a chip sends to its neighbours in the slice.
    dcn_bandwidth: Bytes/s a chip's share of its host sends to other slices.
    host_chips: Most chips of one host in a slice of several hosts.
    alone_chips: Most chips of a slice that is a single host.
    matrix_units: Multiplications a clock cycle, of which `clock` follows.
    price: Dollars per chip and hour, an assumption.
    slices: Topologies that are offered, the smallest first.
  """

  name: str
  flops: float
  hbm: float
  hbm_bandwidth: float
  ici_bandwidth: float
  dcn_bandwidth: float
  host_chips: int
  alone_chips: int
  matrix_units: int
  price: float
  slices: tuple[str, ...]

  @property
  def clock(self) -> float:
    """Cycles/s at which its matrix units reach the peak."""
    return self.flops / (2 * self.matrix_units)


HOP = 1e-6  # Seconds from a chip to its neighbour, however little is sent.
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
    host_chips=4,
    alone_chips=8,
    matrix_units=4 * 128 * 128,
    price=1.20,
    slices=_FLAT,
  ),
  'v6e': Chip(
    name='v6e',
    flops=918e12,
    hbm=32 * 2**30,
    hbm_bandwidth=1638e9,
    ici_bandwidth=3200 * _GBPS,
    dcn_bandwidth=100 * _GBPS,  # 25.6 Tbit/s for a pod of 256
    host_chips=4,
    alone_chips=8,
    matrix_units=4 * 256 * 256,
    price=2.70,
    slices=_FLAT,
  ),
  'v5p': Chip(
    name='v5p',
    flops=459e12,
    hbm=95 * 2**30,
    hbm_bandwidth=2765e9,
    ici_bandwidth=4800 * _GBPS,
    dcn_bandwidth=50 * _GBPS,
    host_chips=4,
    alone_chips=4,
    matrix_units=8 * 128 * 128,
    price=4.20,
    slices=_DEEP,
  ),
}
