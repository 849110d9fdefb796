"""The reader of compiled programs, against programs counted by hand."""

import jax
import jax.numpy as jnp
import pytest
from aot.by_hand import EIGHT, compiled
from jax.sharding import PartitionSpec as P

from actfocus_jax.aot import (
  loops,
  program_text,
  traffic,
)


def loops_of(text):
  return [
    loops.trips(text, where, one)
    for where in text.computations.values()
    for one in where.instructions
    if one.opcode == 'while'
  ]


# --- Shapes ------------------------------------------------------------------


@pytest.mark.parametrize(
  ('shape', 'size', 'logical'),
  [
    ('f32[3,5]', 60, 60),
    ('bf16[2,3]{1,0}', 12, 12),
    ('pred[]', 1, 1),
    # Tiles of 8 x 128: 3 rows become 8, 130 columns 256.
    ('bf16[3,130]{1,0:T(8,128)(2,1)}', 8 * 256 * 2, 780),
    # The first axis is the minor one here: 3 of it become 128.
    ('f32[3,130]{0,1:T(8,128)}', 136 * 128 * 4, 1560),
    ('f32[7]{0:T(1024)}', 4096, 28),
    # In the fast memory of the chip.
    ('bf16[3,130]{1,0:T(8,128)(2,1)S(1)}', 0, 780),
  ],
)
def test_sizes_are_padded_to_tiles(shape, size, logical):
  (array,) = program_text.arrays(shape)
  assert (array.size, array.logical) == (size, logical)


@pytest.mark.parametrize(
  ('told', 'cycles'), [('120', 120), ('9223372036854775807', 0)]
)
def test_cycles_are_those_that_the_compiler_expects(told, cycles):
  text = program_text.parse(
    'ENTRY %main (a: f32[8]) -> f32[8] {\n'
    '  %a = f32[8]{0} parameter(0)\n'
    '  ROOT %b = f32[8]{0} negate(%a), '
    f'backend_config={{"estimated_cycles":"{told}"}}\n'
    '}\n'
  )
  assert traffic.measure(text, EIGHT).cycles == cycles


def test_a_tuple_has_all_its_arrays():
  shape = '(f32[2]{0}, /*index=1*/bf16[3,4]{1,0}, (s32[], u8[5]))'
  found = program_text.arrays(shape)
  assert [x.size for x in found] == [8, 24, 4, 5]
  assert [x.dims for x in found] == [(2,), (3, 4), (), (5,)]


# --- Loops -------------------------------------------------------------------

COUNTED = """
HloModule m

%step (x: s32[]) -> s32[] {
  %x = s32[] parameter(0)
  %two = s32[] constant(2)
  ROOT %sum = s32[] add(%x, %two)
}

%body (p: (s32[], f32[100])) -> (s32[], f32[100]) {
  %p = (s32[], f32[100]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %v = f32[100]{0} get-tuple-element(%p), index=1
  %w = f32[100]{0} custom-call(%v), custom_call_target="tpu_custom_call", x={
 "kernel": "x"
}, frontend_attributes={}
  %next = s32[] fusion(%i), kind=kLoop, calls=%step
  ROOT %out = (s32[], f32[100]{0}) tuple(%next, %w)
}

%condition (p.1: (s32[], f32[100])) -> pred[] {
  %p.1 = (s32[], f32[100]{0}) parameter(0)
  %j = s32[] get-tuple-element(%p.1), index=0
  %bound = s32[] constant(11)
  ROOT %less = pred[] compare(%j, %bound), direction=LT
}

ENTRY %main (a: f32[100]) -> f32[100] {
  %a = f32[100]{0} parameter(0)
  %one = s32[] constant(1)
  %state = (s32[], f32[100]{0}) tuple(%one, %a)
  %loop = (s32[], f32[100]{0}) while(%state), condition=%condition, body=%body
  ROOT %result = f32[100]{0} get-tuple-element(%loop), index=1
}
"""


def test_a_loop_that_starts_at_one_and_counts_by_two():
  text = program_text.parse(COUNTED)
  assert loops_of(text) == [5]  # 1, 3, 5, 7, 9
  found = traffic.measure(text, EIGHT)
  # The kernel reads and writes 400 bytes; the counter 4 and 4 in its fusion,
  # and the comparison reads it and its bound and writes a byte.
  assert found.kernels == {'w': 5} and found.in_kernels == 5 * 800
  assert found.read_written == 5 * (800 + 8 + 9)


def test_a_loop_whose_end_the_data_decide_takes_the_given_number():
  text = program_text.parse(COUNTED.replace('%bound = s32[] constant(11)', ''))
  assert loops_of(text) == [None]
  assert traffic.measure(text, EIGHT, trips=7.5).kernels == {'w': 7.5}


def test_nested_scans_of_a_compiled_program():
  def nested(x_N):
    def outer(x_N, _):
      x_N, _ = jax.lax.scan(lambda y, _: (jnp.sin(y), None), x_N, length=3)
      return x_N, None

    return jax.lax.scan(outer, x_N, length=5)[0]

  text = compiled(nested, (64,), specs=[P()])
  assert sorted(loops_of(text)) == [3, 5]


# --- Main memory -------------------------------------------------------------


def test_a_row_written_in_place_is_not_the_whole_cache():
  def fill(cache_ST, row_T):
    def put(i, cache_ST):
      return cache_ST.at[i].set(row_T + i.astype(jnp.float32))

    return jax.lax.fori_loop(0, 1000, put, cache_ST)

  text = compiled(fill, (1000, 256), (256,), specs=[P(), P()])
  moved = traffic.measure(text, EIGHT).read_written
  row, cache = 256 * 4, 1000 * 256 * 4
  # 1000 rows, a few times over, and copies of the cache before and after; if
  # each step counted the cache it would be a thousand times as much.
  assert 1000 * row <= moved <= 4 * (1000 * row + cache)


def test_a_scan_reads_each_layer_once():
  def apply(x_BD, layers_LDD):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x_BD, layers_LDD)[
      0
    ]

  text = compiled(apply, (8, 256), (20, 256, 256), specs=[P(), P()])
  moved = traffic.measure(text, EIGHT).read_written
  layers = 20 * 256 * 256 * 4
  # A layer may be sliced first and read then: 3 times; never 20 times.
  assert layers <= moved < 4.5 * layers


def test_what_another_core_does_counts_once():
  text = program_text.parse(
    '%put (c: f32[1000,8], i: s32[1], r: f32[1,8]) -> f32[1000,8] {\n'
    '  %c = f32[1000,8]{1,0} parameter(0)\n'
    '  %i = s32[1]{0} parameter(1)\n'
    '  %r = f32[1,8]{1,0} parameter(2)\n'
    '  ROOT %s = f32[1000,8]{1,0} scatter(%c, %i, %r), to_apply=%x\n'
    '}, execution_thread="sparsecore"\n\n'
    'ENTRY %main (c: f32[1000,8], i: s32[1], r: f32[1,8]) -> f32[1000,8] {\n'
    '  %c = f32[1000,8]{1,0} parameter(0)\n'
    '  %i = s32[1]{0} parameter(1)\n'
    '  %r = f32[1,8]{1,0} parameter(2)\n'
    '  %b = ((f32[1000,8]{1,0}, s32[1]{0}, f32[1,8]{1,0}), f32[1000,8]{1,0}) '
    'call-start(%c, %i, %r), to_apply=%put\n'
    '  ROOT %e = f32[1000,8]{1,0} call-done(%b)\n'
    '}\n'
  )
  # The index and the row are read, the row is written.
  assert traffic.measure(text, EIGHT).read_written == 4 + 32 + 32


def test_what_is_under_way_writes_its_results_only():
  text = program_text.parse(
    'ENTRY %main (a: f32[100]) -> f32[800] {\n'
    '  %a = f32[100]{0} parameter(0)\n'
    '  %b = (f32[100]{0}, f32[800]{0}) all-gather-start(%a), '
    'replica_groups=[1,8]<=[8], dimensions={0}\n'
    '  ROOT %e = f32[800]{0} all-gather-done(%b)\n'
    '}\n'
  )
  found = traffic.measure(text, EIGHT)
  assert found.read_written == 400 + 3200
  assert found.ici == 3200 * 7 / 8
