"""Bytes, loops and collectives of compiled programs, counted by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from actfocus_jax.aot import hlo
from actfocus_jax.parallel import mesh as mesh_lib

AXES = {'data': 2, 'fsdp': 4, 'tensor': 1}
EIGHT = hlo.Layout(AXES, AXES)
TWO_SLICES = hlo.Layout(AXES, AXES | {'data': 1})


def compiled(function, *shapes, specs):
  """The program for 8 devices, data 2 and fsdp 4."""
  mesh = mesh_lib.make_mesh(data=2, fsdp=4)
  args = [
    jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, spec))
    for s, spec in zip(shapes, specs, strict=True)
  ]
  return hlo.parse(jax.jit(function).lower(*args).compile().as_text())


def entry(*lines):
  """A program of one array of 100 numbers."""
  inside = '\n'.join(f'  {line}' for line in lines)
  return hlo.parse(
    'ENTRY %main (a: f32[100]) -> f32[100] {\n'
    f'  %a = f32[100]{{0}} parameter(0)\n{inside}\n}}\n'
  )


def only(text, layout=EIGHT):
  (collective,) = hlo.traffic(text, layout).collectives
  return collective


# --- Shapes and loops --------------------------------------------------------


@pytest.mark.parametrize(
  ('shape', 'size', 'logical'),
  [
    ('f32[3,5]', 60, 60),
    ('pred[]', 1, 1),
    # Tiles of 8 x 128: 3 rows become 8, 130 columns 256.
    ('bf16[3,130]{1,0:T(8,128)(2,1)}', 8 * 256 * 2, 780),
    # The first axis is the minor one here: 3 of it become 128.
    ('f32[3,130]{0,1:T(8,128)}', 136 * 128 * 4, 1560),
    # In the fast memory of the chip.
    ('bf16[3,130]{1,0:T(8,128)(2,1)S(1)}', 0, 780),
  ],
)
def test_array_layout_pads_its_size(shape, size, logical):
  (array,) = hlo.arrays(shape)
  assert (array.size, array.logical) == (size, logical)


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
  %bound = s32[] constant(9)
  ROOT %less = pred[] compare(%j, %bound), direction=LT
}

ENTRY %main (a: f32[100]) -> f32[100] {
  %a = f32[100]{0} parameter(0)
  %zero = s32[] constant(0)
  %state = (s32[], f32[100]{0}) tuple(%zero, %a)
  %loop = (s32[], f32[100]{0}) while(%state), condition=%condition, body=%body
  ROOT %result = f32[100]{0} get-tuple-element(%loop), index=1
}
"""


def trips_of(text):
  return [
    hlo.trips(text, line)
    for computation in text.values()
    for line in computation.instructions
    if line.opcode == 'while'
  ]


def test_loop_with_a_step_of_two_runs_half_as_often():
  text = hlo.parse(COUNTED)
  assert trips_of(text) == [5]  # 0, 2, 4, 6, 8
  found = hlo.traffic(text, EIGHT)
  # The kernel reads and writes 400 bytes; the counter 4 and 4 in its fusion,
  # and the comparison reads it and its bound and writes a byte.
  assert found.kernels == {'w': 5}
  assert found.read_written == 5 * (800 + 8 + 9)


def test_loop_ended_by_data_runs_the_given_number():
  by_data = '%bound = s32[] get-tuple-element(%p.1), index=0'
  text = hlo.parse(COUNTED.replace('%bound = s32[] constant(9)', by_data))
  assert trips_of(text) == [None]
  assert hlo.traffic(text, EIGHT, trips=7.5).kernels == {'w': 7.5}


# --- Main memory -------------------------------------------------------------


def test_row_written_in_place_counts_as_the_row():
  def fill(cache_ST, row_T):
    def put(i, cache_ST):
      return cache_ST.at[i].set(row_T + i.astype(jnp.float32))

    return jax.lax.fori_loop(0, 1000, put, cache_ST)

  text = compiled(fill, (1000, 256), (256,), specs=[P(), P()])
  moved = hlo.traffic(text, EIGHT).read_written
  row, cache = 256 * 4, 1000 * 256 * 4
  # 1000 rows, a few times over, and copies of the cache before and after; if
  # each step counted the cache it would be a thousand times as much.
  assert 1000 * row <= moved <= 4 * (1000 * row + cache)


def test_started_gather_writes_its_result_only():
  text = hlo.parse(
    'ENTRY %main (a: f32[100]) -> f32[800] {\n'
    '  %a = f32[100]{0} parameter(0)\n'
    '  %b = (f32[100]{0}, f32[800]{0}) all-gather-start(%a), '
    'replica_groups=[1,8]<=[8], dimensions={0}\n'
    '  ROOT %e = f32[800]{0} all-gather-done(%b)\n'
    '}\n'
  )
  assert hlo.traffic(text, EIGHT).read_written == 400 + 3200
  assert only(text).ici == 3200 * 7 / 8


# --- Collectives -------------------------------------------------------------


def test_gather_in_a_loop_counts_as_often_as_the_loop():
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
  gathers = hlo.traffic(text, EIGHT).collectives
  (gather,) = [x for x in gathers if x.kind == 'all-gather']
  assert (gather.axes, gather.count) == ('fsdp', 5)
  # Of 128 x 128 numbers a device gets the three quarters it does not hold.
  assert (gather.ici, gather.dcn) == (5 * 128 * 128 * 4 * 3 / 4, 0)


@pytest.mark.parametrize(
  ('layout', 'ici', 'dcn'),
  # 400 bytes summed over 8: 2 * 7 / 8 of them in one slice. In two slices of
  # four 2 * 3 / 4 within, and of each quarter a half from the other slice.
  [(EIGHT, 700, 0), (TWO_SLICES, 600, 100)],
)
def test_sum_over_slices_sends_only_shares_there(layout, ici, dcn):
  found = only(
    entry(
      'ROOT %s = f32[100]{0} all-reduce(%a), channel_id=1, '
      'replica_groups=[1,8]<=[8], to_apply=%add'
    ),
    layout,
  )
  assert (found.kind, found.axes) == ('all-reduce', 'data x fsdp')
  assert (found.ici, found.dcn) == (ici, dcn)


@pytest.mark.parametrize(
  ('transfer', 'dcn'),
  # 400 bytes handed over in each of 2 slices: there and back a half of them,
  # to the other slice all of them, to a neighbour all of them.
  [('ALL_REDUCE', 400), ('ALL_GATHER', 400), ('COLLECTIVE_PERMUTE', 400)]
  + [('REDUCE_SCATTER', 200), ('ALL_TO_ALL', 200)],
)
def test_send_between_slices_counts_what_the_host_sends(transfer, dcn):
  text = entry(
    '%t = token[] after-all()',
    '%s = (f32[100]{0}, u32[], token[]) send(%a, %t), channel_id=2, '
    'is_host_transfer=true, frontend_attributes={'
    f'_xla_megascale_transfer_type="{transfer}"}}',
    'ROOT %d = token[] send-done(%s), channel_id=2, is_host_transfer=true',
  )
  found = only(text, TWO_SLICES)
  assert (found.axes, found.count) == ('slices', 1)
  assert found.kind == transfer.lower().replace('_', '-')
  assert (found.ici, found.dcn) == (0, dcn)


def test_sum_fused_with_a_slice_is_a_reduce_scatter():
  text = hlo.parse(
    '%all-reduce-scatter.1 (p: f32[800]) -> f32[200] {\n'
    '  %p = f32[800]{0} parameter(0)\n'
    '  %s = f32[800]{0} all-reduce(%p), channel_id=3, '
    'replica_groups=[2,4]<=[8], to_apply=%add\n'
    '  %i = s32[] constant(0)\n'
    '  ROOT %d = f32[200]{0} dynamic-slice(%s, %i), dynamic_slice_sizes={200}\n'
    '}\n\n'
    'ENTRY %main (a: f32[800]) -> f32[200] {\n'
    '  %a = f32[800]{0} parameter(0)\n'
    '  ROOT %f = f32[200]{0} fusion(%a), kind=kCustom, '
    'calls=%all-reduce-scatter.1\n'
    '}\n'
  )
  # Of 3,200 bytes each of four sends three quarters, once.
  assert only(text) == hlo.Collective('reduce-scatter', 'fsdp', 1, 2400, 0)


def test_collective_spread_over_fusions_counts_once():
  gather = (
    'f32[800]{0} all-gather(%p), channel_id=4, replica_groups=[2,4]<=[8], '
    'dimensions={0}, backend_config={"async_collective_fusion_config":{}}'
  )
  inner = (
    '%NAME (p: f32[200]) -> f32[800] {\n'
    '  %p = f32[200]{0} parameter(0)\n'
    f'  ROOT %gNAME = {gather}\n'
    '}\n\n'
  )
  text = hlo.parse(
    inner.replace('NAME', 'first')
    + inner.replace('NAME', 'second')
    + 'ENTRY %main (a: f32[200]) -> f32[800] {\n'
    '  %a = f32[200]{0} parameter(0)\n'
    '  %f = f32[800]{0} fusion(%a), kind=kOutput, calls=%first\n'
    '  ROOT %s = f32[800]{0} fusion(%a), kind=kOutput, calls=%second\n'
    '}\n'
  )
  assert (only(text).count, only(text).ici) == (1, 3200 * 3 / 4)


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
    ("mesh['x'=8] {'x':(2)4}", [0, 1, 2, 3]),
    ("mesh['x'=8] {'x':(1)2}", [0, 4]),
    ('{}', list(range(8))),
  ],
)
def test_replica_groups_in_every_notation(notation, group):
  found, count = hlo.first_group(f', replica_groups={notation}, x=1', EIGHT)
  np.testing.assert_array_equal(found, group)
  assert count == (4 if notation.startswith('{{') else 8)


@pytest.mark.parametrize(
  ('groups', 'axes'), [('{{0,1},{2,3}}', 'fsdp'), ('{{0,2},{1,3}}', 'data')]
)
def test_several_slices_number_the_chips_of_one(groups, axes):
  """As libtpu does: data 2 and fsdp 2 in each of two slices, dcn_fsdp=2."""
  layout = hlo.Layout(AXES, AXES | {'fsdp': 2})
  text = entry(
    'ROOT %s = f32[200]{0} all-gather(%a), channel_id=1, '
    f'replica_groups={groups}, dimensions={{0}}'
  )
  assert only(text, layout) == hlo.Collective('all-gather', axes, 1, 400, 0)


@pytest.mark.parametrize(
  ('shape', 'made'),
  [
    ('(f32[1]{0}, f32[3]{0}, f32[8]{0}, f32[24]{0}) all-gather-start', 128),
    ('(f32[10]{0}, f32[30]{0}) all-reduce-start', 160),
    ('(f32[10]{0}, f32[30]{0}) all-reduce', 160),
  ],
)
def test_combined_collective_sends_all_its_results(shape, made):
  text = entry(
    '%b = f32[3]{0} parameter(1)',
    f'%s = {shape}(%a, %b), replica_groups=[1,8]<=[8], to_apply=%add',
  )
  passes = 1 if 'gather' in shape else 2
  assert only(text).ici == passes * made * 7 / 8


def test_collective_with_another_number_of_results_is_refused():
  text = entry(
    '%s = (f32[1]{0}, f32[3]{0}, f32[8]{0}) all-gather-start(%a, %a)'
  )
  with pytest.raises(ValueError, match='of 2 operands, has 3 results'):
    hlo.traffic(text, EIGHT)


def test_permutation_within_and_between_slices():
  text = entry(
    'ROOT %s = f32[100]{0} collective-permute(%a), channel_id=1, '
    'source_target_pairs={{0,4},{4,0}}'
  )
  assert only(text) == hlo.Collective('collective-permute', 'data', 1, 400, 0)
  across = only(text, TWO_SLICES)
  assert (across.ici, across.dcn) == (0, 400)
