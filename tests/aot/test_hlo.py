"""Loops and collectives of compiled programs, counted by hand."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from actfocus_jax.aot import hlo
from actfocus_jax.parallel import mesh as mesh_lib


def entry(*lines):
  """A program of one array of 100 numbers."""
  inside = '\n'.join(f'  {line}' for line in lines)
  return hlo.parse(
    'ENTRY %main (a: f32[100]) -> f32[100] {\n'
    f'  %a = f32[100]{{0}} parameter(0)\n{inside}\n}}\n'
  )


def only(text, slice_chips=8, slices=1, **options):
  (found,) = hlo.collectives(text, slice_chips, slices, **options)
  return found


# --- Loops -------------------------------------------------------------------

LOOP = """
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
  %k = f32[100]{0} custom-call(%v), custom_call_target="tpu_custom_call", x={
 "kernel": "x"
}, frontend_attributes={}
  %w = f32[100]{0} all-reduce(%k), replica_groups=[1,8]<=[8], to_apply=%add
  %next = s32[] fusion(%i), kind=kLoop, calls=%step
  ROOT %out = (s32[], f32[100]{0}) tuple(%next, %w)
}

%condition (p.1: (s32[], f32[100])) -> pred[] {
  %p.1 = (s32[], f32[100]{0}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%p.1), index=0
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


@pytest.mark.parametrize(
  ('before', 'after', 'count'),
  [
    ('', '', 5),  # 0, 2, 4, 6, 8
    ('%two = s32[] constant(2)', '%two = s32[] constant(1)', 9),
    (
      'body=%body',
      'body=%body, backend_config={"known_trip_count":{"n":"3"}}',
      3,
    ),
    # Without a bound the data decide.
    ('%bound = s32[] constant(9)', '%bound = s32[] bitcast(%j)', 7.5),
  ],
)
def test_collective_in_a_loop_counts_as_often_as_it_runs(before, after, count):
  text = hlo.parse(LOOP.replace(before, after) if before else LOOP)
  found = only(text, data_trips=7.5)
  # Each of 8 chips sends 7 / 8 of 400 bytes twice.
  assert (found.count, found.sent) == (count, count * 700)


def test_compiled_gather_in_a_scan_counts_as_often_as_the_scan():
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

  args = [
    jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, spec))
    for s, spec in zip([(64, 128), (5, 128, 128)], specs, strict=True)
  ]
  text = hlo.parse(jax.jit(apply).lower(*args).compile().as_text())
  (gather,) = [x for x in hlo.collectives(text, 8) if x.kind == 'all-gather']
  # Of 128 x 128 numbers a device gets the three quarters it does not hold.
  assert (gather.count, gather.sent) == (5, 5 * 128 * 128 * 4 * 3 / 4)


# --- Bytes -------------------------------------------------------------------


@pytest.mark.parametrize(
  ('transfer', 'sent'),
  # 400 bytes handed over in each of 2 slices: there and back a half of them,
  # to the other slice all of them, to a neighbour all of them.
  [('ALL_REDUCE', 400), ('ALL_GATHER', 400), ('COLLECTIVE_PERMUTE', 400)]
  + [('REDUCE_SCATTER', 200), ('ALL_TO_ALL', 200)],
)
def test_send_between_slices_counts_what_the_host_sends(transfer, sent):
  text = entry(
    '%t = token[] after-all()',
    '%s = (f32[100]{0}, u32[], token[]) send(%a, %t), channel_id=2, '
    'is_host_transfer=true, frontend_attributes={'
    f'_xla_megascale_transfer_type="{transfer}"}}',
    'ROOT %d = token[] send-done(%s), channel_id=2, is_host_transfer=true',
  )
  kind = transfer.lower().replace('_', '-')
  assert only(text, 4, 2) == hlo.Collective(kind, 'dcn', 1, sent)


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
  assert only(text) == hlo.Collective('reduce-scatter', 'ici', 1, 2400)


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
  assert only(text) == hlo.Collective('all-gather', 'ici', 1, 3200 * 3 / 4)


@pytest.mark.parametrize(
  ('notation', 'size'),
  [
    ('{{0,2},{1,3}}', 2),
    ('[2,4]<=[8]', 4),
    ('[4,2]<=[2,4]T(1,0)', 2),
    ("mesh['x'=2,'y'=4] {'x'}", 2),
    ("mesh['x'=2,'y'=4,'z'=2] {'y','z'}", 8),
    ("mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'x'}", 4),
    ("mesh['x'=8] {'x':(2)4}", 4),
    ('{}', 8),
  ],
)
def test_group_size_is_read_in_every_notation(notation, size):
  assert hlo.group_size(f', replica_groups={notation}, x=1', 8) == size


@pytest.mark.parametrize(
  ('shape', 'sent'),
  [
    # Tuples of a start name the operands, too; layouts are not counted.
    (
      '(f32[1]{0:T(8,128)}, f32[3]{0}, f32[8]{0}, f32[24]{0}) all-gather-start',
      128 * 7 / 8,
    ),
    ('(f32[10]{0}, bf16[30]{0}) all-reduce-start', 2 * 100 * 7 / 8),
    ('(f32[10]{0}, f32[30]{0}) all-reduce', 2 * 160 * 7 / 8),
    ('(f32[10]{0}, f32[30]{0}) all-to-all', 160 * 7 / 8),
  ],
)
def test_combined_collective_sends_all_its_results(shape, sent):
  text = entry(
    '%b = f32[3]{0} parameter(1)',
    f'%s = {shape}(%a, %b), replica_groups=[1,8]<=[8], to_apply=%add',
  )
  assert only(text).sent == sent


def test_collective_with_another_number_of_results_is_refused():
  text = entry(
    '%s = (f32[1]{0}, f32[3]{0}, f32[8]{0}) all-gather-start(%a, %a)'
  )
  with pytest.raises(ValueError, match='of 2 operands, has 3 results'):
    hlo.collectives(text, 8)


@pytest.mark.parametrize(
  ('pairs', 'sent'), [('{0,4},{4,0}', 400), ('{0,0},{1,1}', 0)]
)
def test_permutation_sends_everything_unless_it_moves_nothing(pairs, sent):
  text = entry(
    'ROOT %s = f32[100]{0} collective-permute(%a), channel_id=1, '
    f'source_target_pairs={{{pairs}}}'
  )
  assert only(text).sent == sent
