"""Many cells: asked in several processes, kept, and made a table of."""

import json

import pytest
from aot import paper

from actfocus_jax.aot import cells, many, roofline, topology, workload
from actfocus_jax.config import schema

WORK = workload.Workload(1, 1, 1, 1, 8, 1)
V5E = [topology.parse(f'v5e:{shape}') for shape in ('1x1', '2x2', '4x4')]


def config_of(size, algo, **changes):
  c = schema.defaults()
  c.algo = algo
  for field, value in changes.items():
    section, name = field.split('__')
    c[section][name] = value
  return c, paper.QWEN


@pytest.fixture
def asks(tmp_path):
  efficiency = roofline.Efficiency()
  return many.Asks(config_of, lambda c: WORK, efficiency, None, tmp_path)


def test_a_cell_is_told_by_all_that_it_is():
  cell = many.Cell('3b', 'ppo', V5E[0], (('rollout__prompts', 64),))
  assert str(cell) == '3b ppo on v5e:1x1, rollout__prompts=64'


def test_a_search_ends_where_it_fits(asks, monkeypatch):
  asked = []

  def kept(question, out, *, note):
    del out, note
    asked.append(str(question.where))
    return {'fits': question.where.chips >= 4}, False

  monkeypatch.setattr(cells, 'kept', kept)
  search = [many.Cell('3b', 'ppo', where) for where in V5E]
  task = [(cell, asks.question(cell)) for cell in search]
  told = many._search(task, asks.out)
  assert asked == ['v5e:1x1', 'v5e:2x2']
  assert told == {'fits': True, 'size': '3B', 'algo': 'ppo'}


@pytest.fixture
def libtpu(tmp_path, monkeypatch):
  """Its version, which names cells; started processes see it, too."""
  told = tmp_path / 'installed' / 'libtpu-0.1.dist-info' / 'METADATA'
  told.parent.mkdir(parents=True)
  told.write_text('Metadata-Version: 2.1\nName: libtpu\nVersion: 0.1\n')
  monkeypatch.syspath_prepend(told.parent.parent)


def test_what_is_kept_is_read_by_other_processes(asks, libtpu, capfd):
  """And makes the table; what is not kept would need libtpu."""
  named = [many.Cell('3b', algo, V5E[1]) for algo in ('ppo', 'grpo')]
  folder = asks.out / 'cells'
  folder.mkdir()
  every = [
    many.Cell('3b', algo, where)
    for algo in ('ppo', 'grpo')
    for where in topology.all_of('v5e')
  ]
  for cell in every:
    refused = {'topology': str(cell.where), 'fits': False, 'refused': 'no'}
    file = folder / f'{asks.question(cell).key()}.json'
    file.write_text(json.dumps(refused))
  text = many.table_of(asks, ['3b'], ['ppo', 'grpo'], V5E[1:2])
  first, second = text.split('The smallest slice that fits:')
  rows = [row for row in first.splitlines() if row.startswith('| 3B')]
  assert [row.split(' | ')[1:3] for row in rows] == [
    [cell.algo, 'v5e:2x2'] for cell in named
  ]
  # Of those none of which fits the largest is named.
  assert second.count(str(topology.all_of('v5e')[-1])) == 2
  assert '2 of 2 done' in capfd.readouterr().err
