"""Rows survive non-finite numbers, a kill, and a resume."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from actfocus_jax.run import metrics


def test_append_is_on_disk_at_once(tmp_path):
  file = metrics.MetricsFile(tmp_path / 'run' / 'metrics.jsonl')
  rows = [{'step': 0, 'train/success': 0.5}, {'step': 1, 'note': None}]
  for count, row in enumerate(rows, start=1):
    file.append(row)
    assert metrics.read(tmp_path / 'run' / 'metrics.jsonl') == rows[:count]
  file.close()


def test_append_numpy_and_jax_scalars_become_numbers(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  row = {
    'step': np.int64(3),
    'a': jnp.float32(0.25),
    'b': jnp.bfloat16(0.5),
    'c': np.ones((1,), bool),
  }
  metrics.MetricsFile(path).append(row)
  assert path.read_text() == '{"step": 3, "a": 0.25, "b": 0.5, "c": true}\n'


def test_append_nonfinite_number_is_null_and_named(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  row = {'step': 1, 'loss': float('nan'), 'a': float('-inf'), 'b': 2.0}
  metrics.MetricsFile(path).append(row)

  def refuse(constant):
    raise AssertionError(f'{constant} is not JSON')

  written = json.loads(path.read_text(), parse_constant=refuse)
  assert written == {
    'step': 1,
    'loss': None,
    'a': None,
    'b': 2.0,
    'nonfinite': {'loss': 'nan', 'a': '-inf'},
  }
  np.testing.assert_equal(metrics.read(path), [row])


@pytest.mark.parametrize(
  ('row', 'message'),
  [
    ({'loss': 1.0}, "needs 'step'"),
    ({'step': 1, 'loss': np.ones(2)}, "'loss' is not a scalar"),
  ],
)
def test_append_bad_row_is_refused_before_a_write(tmp_path, row, message):
  with pytest.raises(ValueError, match=message):
    metrics.MetricsFile(tmp_path / 'metrics.jsonl').append(row)
  assert list(tmp_path.iterdir()) == []


def test_truncate_drops_later_steps_and_a_torn_line(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  file = metrics.MetricsFile(path)
  for step in range(5):
    file.append({'step': step, 'x': step / 10})
  with path.open('a') as raw:
    raw.write('{"step": 5, "x"')
  file.truncate(3)
  assert [row['step'] for row in metrics.read(path)] == [0, 1, 2]
  file.append({'step': 3, 'x': 9.0})
  assert [row['x'] for row in metrics.read(path)] == [0.0, 0.1, 0.2, 9.0]
  assert [path.name for path in tmp_path.iterdir()] == ['metrics.jsonl']


def test_truncate_without_a_file_makes_none(tmp_path):
  metrics.MetricsFile(tmp_path / 'metrics.jsonl').truncate(0)
  assert list(tmp_path.iterdir()) == []


def test_append_after_a_torn_line_starts_a_new_line(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 0}\n{"step": 1, "x"')
  assert metrics.read(path) == [{'step': 0}]
  metrics.MetricsFile(path).append({'step': 1})
  assert metrics.read(path) == [{'step': 0}, {'step': 1}]


@pytest.mark.parametrize('line', ['{"step": 1', '[1]', '{"x": 1}'])
def test_read_damaged_line_is_named_and_kept(tmp_path, line):
  path = tmp_path / 'metrics.jsonl'
  text = f'{{"step": 0}}\n{line}\n{{"step": 2}}\n'
  path.write_text(text)
  with pytest.raises(ValueError, match=r'metrics.jsonl:2 is not a row'):
    metrics.read(path)
  with pytest.raises(ValueError, match=r'metrics.jsonl:2 is not a row'):
    metrics.MetricsFile(path).truncate(1)
  assert path.read_text() == text
