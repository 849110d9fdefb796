"""What chips send to each other, against programs counted by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aot.by_hand import EIGHT, TWO_SLICES, compiled
from jax.sharding import PartitionSpec as P

from actfocus_jax.aot import collectives, links, program_text, traffic
from actfocus_jax.parallel import mesh as mesh_lib


def entry(*lines):
  """A program of one array of 100 numbers."""
  inside = '\n'.join(f'  {line}' for line in lines)
  return program_text.parse(
    'ENTRY %main (a: f32[100]) -> f32[100] {\n'
    f'  %a = f32[100]{{0}} parameter(0)\n{inside}\n}}\n'
  )


def test_what_shares_a_channel_is_not_one_collective():
  """`shard_map` gives all that it sends the same number."""
  groups = 'channel_id=1, replica_groups=[1,8]<=[8], to_apply=%add'
  text = entry(
    f'%b = f32[100]{{0}} all-reduce(%a), {groups}',
    f'ROOT %c = f32[100]{{0}} all-reduce(%b), {groups}',
  )
  (found,) = traffic.measure(text, EIGHT).collectives
  assert (found.count, found.ici) == (2, 2 * 700)


def test_a_sum_of_which_a_part_is_kept_goes_one_way():
  """TPUs write a reduce-scatter as a fused sum and a slice of it."""
  fused = (
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
  (found,) = traffic.measure(program_text.parse(fused), EIGHT).collectives
  # Of 3,200 bytes each of four sends three quarters on, once.
  assert (found.kind, found.axes) == ('reduce-scatter', 'fsdp')
  assert (found.ici, found.hops) == (3200 * 3 / 4, 3)


def test_both_ways_round_a_ring_take_the_time_of_one():
  def permute(name, operand, pairs):
    return (
      f'{name} = f32[100]{{0}} collective-permute({operand}), channel_id=1, '
      f'source_target_pairs={{{pairs}}}'
    )

  there = permute('%b', '%a', '{0,1},{1,2},{2,3}')
  back = permute('ROOT %c', '%a', '{1,0},{2,1},{3,2}')
  again = permute('ROOT %c', '%b', '{0,1},{1,2},{2,3}')
  (both,) = traffic.measure(entry(there, back), EIGHT).collectives
  (one_way,) = traffic.measure(entry(there, again), EIGHT).collectives
  assert both.ici == one_way.ici == 2 * 400
  # One link of the four of a chip, or two.
  assert (one_way.load, one_way.hops) == (4 * 800, 2)
  assert (both.load, both.hops) == (2 * 800, 1)


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
