"""The reader of compiled programs, against programs counted by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from actfocus_jax.aot import (
  collectives,
  links,
  loops,
  program_text,
  traffic,
)
from actfocus_jax.parallel import mesh as mesh_lib

AXES = {'data': 2, 'fsdp': 4, 'tensor': 1}
EIGHT = collectives.Layout(AXES, AXES, links.Torus((2, 4)))
TWO_SLICES = collectives.Layout(AXES, AXES | {'data': 1}, links.Torus((2, 2)))


def compiled(function, *shapes, specs):
  """The text for 8 devices, data 2 and fsdp 4."""
  mesh = mesh_lib.make_mesh(data=2, fsdp=4)
  args = [
    jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, spec))
    for s, spec in zip(shapes, specs, strict=True)
  ]
  text = jax.jit(function).lower(*args).compile().as_text()
  return program_text.parse(text)


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


# --- Between devices ---------------------------------------------------------


def test_a_gather_in_a_loop_counts_as_often_as_the_loop():
  mesh = mesh_lib.make_mesh(data=2, fsdp=4)
  specs = (P(('data', 'fsdp')), P(None, 'fsdp', None))

  @functools.partial(
    jax.shard_map, mesh=mesh, in_specs=specs, out_specs=specs[0]
  )
  def apply(x_BD, layers_LDD):
    def layer(x_BD, w_DD):
      w_DD = jax.lax.all_gather(w_DD, 'fsdp', tiled=True)
      return jnp.tanh(x_BD @ w_DD), None

    return jax.lax.scan(layer, x_BD, layers_LDD)[0]

  text = compiled(apply, (64, 128), (5, 128, 128), specs=specs)
  found = traffic.measure(text, EIGHT).collectives
  (gather,) = [one for one in found if one.kind == 'all-gather']
  assert (gather.axes, gather.count) == ('fsdp', 5)
  # Of 128 x 128 numbers a device gets the three quarters it does not hold.
  assert gather.ici == 5 * 128 * 128 * 4 * 3 / 4
  assert gather.dcn == 0
  # Along an open line of four, each time, whose last chip has one link of 4.
  assert (gather.hops, gather.load) == (5 * 3, 4 * gather.ici)


@pytest.mark.parametrize(
  ('layout', 'ici', 'dcn'),
  # 400 bytes summed over 8: 2 * 7 / 8 of them in one slice. In two slices of
  # four 2 * 3 / 4 within, and of each quarter a half from the other slice.
  [(EIGHT, 700, 0), (TWO_SLICES, 600, 100)],
)
def test_a_sum_over_slices_sends_only_shares_there(layout, ici, dcn):
  text = program_text.parse(
    'ENTRY %main (a: f32[100]) -> f32[100] {\n'
    '  %a = f32[100]{0} parameter(0)\n'
    '  ROOT %s = f32[100]{0} all-reduce(%a), channel_id=1, '
    'replica_groups=[1,8]<=[8], to_apply=%add\n'
    '}\n'
  )
  (found,) = traffic.measure(text, layout).collectives
  assert (found.kind, found.axes) == ('all-reduce', 'data x fsdp')
  assert (found.ici, found.dcn) == (ici, dcn)
  # There and back over two by four, or a square in a slice; one link of a
  # corner's in each dimension.
  assert found.hops == 2 * (1 + 3 if dcn == 0 else 1 + 1)
  assert found.load == 2 * found.ici


@pytest.mark.parametrize(
  ('transfer', 'dcn'),
  # 400 bytes handed over in each of 2 slices: there and back a half of them,
  # to the other slice all of them, to a neighbour all of them.
  [('ALL_REDUCE', 400), ('ALL_GATHER', 400), ('COLLECTIVE_PERMUTE', 400)]
  + [('REDUCE_SCATTER', 200), ('ALL_TO_ALL', 200)],
)
def test_what_the_hosts_send_between_slices(transfer, dcn):
  text = program_text.parse(
    'ENTRY %main (a: f32[100]) -> token[] {\n'
    '  %a = f32[100]{0} parameter(0)\n'
    '  %t = token[] after-all()\n'
    '  %s = (f32[100]{0}, u32[], token[]) send(%a, %t), channel_id=2, '
    'is_host_transfer=true, frontend_attributes={'
    f'_xla_megascale_transfer_type="{transfer}"}}\n'
    '  ROOT %d = token[] send-done(%s), channel_id=2, is_host_transfer=true\n'
    '}\n'
  )
  (found,) = traffic.measure(text, TWO_SLICES).collectives
  assert (found.axes, found.count) == ('slices', 1)
  assert found.kind == transfer.lower().replace('_', '-')
  assert (found.ici, found.dcn, found.hops) == (0, dcn, 0)


def test_a_collective_spread_over_fusions_counts_once():
  spread = '"async_collective_fusion_config":{}'
  gather = (
    'f32[800]{0} all-gather(%p), channel_id=4, '
    f'replica_groups=[2,4]<=[8], dimensions={{0}}, backend_config={{{spread}}}'
  )
  inner = (
    '%NAME (p: f32[200]) -> f32[800] {\n'
    '  %p = f32[200]{0} parameter(0)\n'
    f'  ROOT %gNAME = {gather}\n'
    '}\n\n'
  )
  text = program_text.parse(
    inner.replace('NAME', 'first')
    + inner.replace('NAME', 'second')
    + 'ENTRY %main (a: f32[200]) -> f32[800] {\n'
    '  %a = f32[200]{0} parameter(0)\n'
    '  %f = f32[800]{0} fusion(%a), kind=kOutput, calls=%first\n'
    '  ROOT %s = f32[800]{0} fusion(%a), kind=kOutput, calls=%second\n'
    '}\n'
  )
  (found,) = traffic.measure(text, EIGHT).collectives
  assert (found.count, found.ici) == (1, 3200 * 3 / 4)


@pytest.mark.parametrize(
  ('notation', 'group'),
  [
    ('{{0,2},{1,3}}', [0, 2]),
    ('[2,4]<=[8]', [0, 1, 2, 3]),
    ('[4,2]<=[2,4]T(1,0)', [0, 4]),
    ("mesh['x'=2,'y'=4] {'x'}", [0, 4]),
    ("mesh['x'=2,'y'=4] {'y'}", [0, 1, 2, 3]),
    # The second axis of the mesh was named first.
    ("mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'x'}", [0, 1, 2, 3]),
    ("mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'y'}", [0, 4]),
    ("mesh['x'=8] {'x':(2)4}", [0, 1, 2, 3]),
    ("mesh['x'=8] {'x':(1)2}", [0, 4]),
    ('{}', list(range(8))),
  ],
)
def test_groups_in_every_notation(notation, group):
  found, count = collectives.first_group(
    f', replica_groups={notation}, x=1', EIGHT
  )
  np.testing.assert_array_equal(found, group)
  assert count == (4 if notation.startswith('{{') else 8)


@pytest.mark.parametrize(
  ('groups', 'axes'), [('{{0,1},{2,3}}', 'fsdp'), ('{{0,2},{1,3}}', 'data')]
)
def test_several_slices_number_the_chips_of_one(groups, axes):
  """As libtpu does: data 2 and fsdp 2 in each of two slices, dcn_fsdp=2."""
  mesh = {'data': 2, 'fsdp': 4, 'tensor': 1}
  layout = collectives.Layout(mesh, mesh | {'fsdp': 2}, links.Torus((2, 2)))
  text = program_text.parse(
    'ENTRY %main (a: f32[100]) -> f32[200] {\n'
    '  %a = f32[100]{0} parameter(0)\n'
    '  ROOT %s = f32[200]{0} all-gather(%a), channel_id=1, '
    f'replica_groups={groups}, dimensions={{0}}\n'
    '}\n'
  )
  (found,) = traffic.measure(text, layout).collectives
  assert (found.axes, found.ici, found.dcn) == (axes, 400, 0)


@pytest.mark.parametrize(
  ('shape', 'made'),
  [
    ('(f32[1]{0}, f32[3]{0}, f32[8]{0}, f32[24]{0}) all-gather-start', 128),
    ('(f32[10]{0}, f32[30]{0}) all-reduce-start', 160),
    ('(f32[10]{0}, f32[30]{0}) all-reduce', 160),
  ],
)
def test_combined_collectives_send_all_their_results(shape, made):
  text = program_text.parse(
    'ENTRY %main (a: f32[1], b: f32[3]) -> f32[1] {\n'
    '  %a = f32[1]{0} parameter(0)\n'
    '  %b = f32[3]{0} parameter(1)\n'
    f'  %s = {shape}(%a, %b), replica_groups=[1,8]<=[8], to_apply=%add\n'
    '}\n'
  )
  (found,) = traffic.measure(text, EIGHT).collectives
  passes = 1 if 'gather' in shape else 2
  assert found.ici == passes * made * 7 / 8


def test_a_collective_of_another_shape_is_refused():
  text = program_text.parse(
    'ENTRY %main (a: f32[1], b: f32[3]) -> f32[1] {\n'
    '  %a = f32[1]{0} parameter(0)\n'
    '  %b = f32[3]{0} parameter(1)\n'
    '  %s = (f32[1]{0}, f32[3]{0}, f32[8]{0}) all-gather-start(%a, %b)\n'
    '}\n'
  )
  with pytest.raises(ValueError, match='of 2 operands, has 3 results'):
    traffic.measure(text, EIGHT)


def test_a_permutation_within_and_between_slices():
  text = (
    'ENTRY %main (a: f32[100]) -> f32[100] {\n'
    '  %a = f32[100]{0} parameter(0)\n'
    '  ROOT %s = f32[100]{0} collective-permute(%a), channel_id=1, '
    'source_target_pairs={{0,4},{4,0}}\n'
    '}\n'
  )
  text = program_text.parse(text)
  (inside,) = traffic.measure(text, EIGHT).collectives
  (across,) = traffic.measure(text, TWO_SLICES).collectives
  assert (inside.axes, inside.ici, inside.dcn) == ('data', 400, 0)
  assert (across.ici, across.dcn) == (0, 400)


@pytest.mark.parametrize(
  ('sizes', 'places', 'share', 'hops'),
  [
    ((4, 4), [(0, 0)], 1, 0),
    # Neighbours share one link of four; so do the ends of an open line.
    ((4, 4), [(0, 0), (0, 1)], 1 / 4, 1),
    ((4, 4), [(0, y) for y in range(4)], 1 / 4, 3),
    ((4, 4), [(0, 0), (0, 1), (1, 0), (1, 1)], 2 / 4, 2),
    # The pod's lines of 16 are rings: both links, half way around.
    ((8, 16), [(0, y) for y in range(16)], 2 / 4, 8),
    ((8, 16), [(0, y) for y in range(8)], 1 / 4, 7),
    ((8, 16), [(x, 0) for x in range(8)], 1 / 4, 7),
    ((16, 16), [(x, y) for x in range(16) for y in range(16)], 1, 16),
    # In three dimensions those of whole cubes.
    ((4, 4, 4), [(0, 0, z) for z in range(4)], 2 / 6, 2),
    ((2, 4, 4), [(0, 0, z) for z in range(4)], 1 / 6, 3),
    ((2, 2, 1), [(0, 0, 0), (0, 1, 0)], 1 / 6, 1),
  ],
)
def test_a_group_uses_the_links_between_its_chips(sizes, places, share, hops):
  found = links.Torus(sizes).span(np.array(places))
  assert found == (pytest.approx(share), hops)


@pytest.mark.parametrize(
  ('sizes', 'axes', 'expected'),
  [
    ((4, 4), (1, 4, 4), [(1, 0), (1 / 4, 3), (1 / 4, 3)]),
    # Two whole dimensions make 4, and what is left of the third is a line.
    ((2, 2, 4), (4, 1, 4), [(1 / 6, 3), (1, 0), (2 / 6, 2)]),
    # 2 x 4 of 4 x 4; a line of two is left.
    ((4, 4), (2, 1, 8), [(1 / 4, 1), (1, 0), (2 / 4, 4)]),
    ((16, 16), (16, 8, 2), [(2 / 4, 8), (1 / 4, 7), (1 / 4, 1)]),
  ],
)
def test_axes_of_a_mesh_lie_in_whole_dimensions_first(sizes, axes, expected):
  found = links.Torus(sizes).spans(axes)
  assert found == [(pytest.approx(share), hops) for share, hops in expected]
