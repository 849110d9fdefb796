"""The report shows the numbers of a run and refuses other directories."""

import json

import pytest
from command import assert_refused, command

from actfocus_jax.report import rows, summary


def evaluation(step, success, low, high):
  return {
    'step': step,
    'success': success,
    'success_low': low,
    'success_high': high,
    'pass_at_g': 0.9,
    'episodes': 100,
  }


EVALS = [
  evaluation(0, 0.30, 0.2, 0.4),
  evaluation(5, 0.60, 0.5, 0.7),
  evaluation(10, 0.55, 0.45, 0.65),
]
STEPS = [
  {
    'step': step,
    'train/success': 0.4,
    'weights/action_share': 0.1,
    'weights/action_mass': 0.5,
    'signal/mean': -8.0 + step,
    'actor/entropy': None,
    'time/rollout': 3.0,
    'time/update': 1.0,
  }
  for step in range(12)
]


def write_lines(path, objects):
  path.write_text(''.join(json.dumps(x) + '\n' for x in objects))


@pytest.fixture
def workdir(tmp_path):
  run = tmp_path / 'run-1'
  run.mkdir()
  (run / 'config.json').write_text('{}')
  baselines = {'random_success': 0.24, 'random_episodes': 1000}
  (run / 'baselines.json').write_text(json.dumps(baselines))
  write_lines(run / 'eval.jsonl', EVALS)
  write_lines(run / 'metrics.jsonl', STEPS)
  return run


def test_report_shows_the_numbers_of_the_run(workdir):
  path = summary.write_report(workdir)
  assert path == workdir / 'report' / 'summary.md'
  text = path.read_text()
  for line in (
    '| first | 0 | 30.0% | 20.0% to 40.0% | 90.0% | 100 |',
    '| **last** | 10 | 55.0% | 45.0% to 65.0% | 90.0% | 100 |',
    '| best, picked afterwards | 5 | 60.0% | 50.0% to 70.0% | 90.0% | 100 |',
    '| random play |  | 24.0% | 21.5% to 26.7% |  | 1000 |',
    '| rollout | 36.0 | 75% | 3.00 |',
    '| update | 12.0 | 25% | 1.00 |',
    'carry 50.0% of the weight: 5.0 times',
  ):
    assert line in text
  # Ten steps at each end of twelve: means of -8..1 and of -6..3.
  assert '| `signal/mean` | -3.5 | -1.5 |' in text
  assert 'entropy' not in text
  names = {file.name for file in path.parent.iterdir()}
  assert names == {'summary.md', 'curve.png', 'trajectories.html'}


def test_success_difference_is_last_minus_first(workdir):
  text = summary.write_report(workdir).read_text()
  # 55 and 30 of 100: Wilson (0.4524, 0.6438) and (0.2189, 0.3958), so
  # 25 - 100 sqrt(0.0976^2 + 0.0958^2) and 25 + 100 sqrt(0.0938^2 + 0.0811^2).
  assert '+25.0 points, 95 % interval +11.3 to +37.4, which excludes 0' in text
  write_lines(workdir / 'eval.jsonl', [EVALS[0], EVALS[0] | {'step': 9}])
  text = summary.write_report(workdir).read_text()
  assert '+0.0 points' in text
  assert 'which includes 0' in text


def test_report_before_the_first_evaluation(tmp_path):
  (tmp_path / 'config.json').write_text('{}')
  (tmp_path / 'eval.jsonl').write_text('')
  text = summary.write_report(tmp_path).read_text()
  assert 'Nothing was evaluated yet.' in text
  assert (tmp_path / 'report' / 'curve.png').exists()


def test_mixture_has_rows_for_each_environment(workdir):
  rows = []
  for whole, low in ((EVALS[0], 0.1), (EVALS[2], 0.5)):
    of = {k: v for k, v in whole.items() if k not in ('step', 'success')}
    rows.append(whole | {f'lake/{k}': v for k, v in of.items()})
    rows[-1] |= {f'shop/{k}': v for k, v in of.items()}
    rows[-1] |= {'lake/success': low, 'shop/success': low + 0.25}
  write_lines(workdir / 'eval.jsonl', rows)
  baselines = {'random_success': None, 'lake/random_success': 0.125}
  (workdir / 'baselines.json').write_text(json.dumps(baselines))
  text = summary.write_report(workdir).read_text()
  for line in (
    '| lake | 0 | 10.0% | 20.0% to 40.0% | 90.0% | 100 |',
    '| lake | 10 | 50.0% | 45.0% to 65.0% | 90.0% | 100 |',
    '| lake, random play |  | 12.5% |  |  |  |',
    '| shop | 10 | 75.0% | 45.0% to 65.0% | 90.0% | 100 |',
  ):
    assert line in text
  assert 'shop, random play' not in text


def test_episode_numbers_first_and_last_with_their_meaning(workdir):
  first = {'failed': 0.0, 'info/bought': 0.25, 'shop/info/mine': 2.0}
  last = first | {'failed': 0.5, 'info/bought': 1.0}
  write_lines(workdir / 'eval.jsonl', [EVALS[0] | first, EVALS[2] | last])
  text = summary.write_report(workdir).read_text()
  assert '| `failed` | 0 | 0.5 | share of episodes that the env' in text
  assert '| `info/bought` | 0.25 | 1 | purchase rate' in text
  assert '| `shop/info/mine` | 2 | 2 |  |' in text
  assert '`success`' not in text


def test_several_runs_have_mean_and_deviation(workdir, tmp_path):
  runs = []
  for name, success in (('a', 0.5), ('b', 0.6), ('c', 0.7)):
    run = tmp_path / name
    run.mkdir()
    (run / 'config.json').write_text('{}')
    write_lines(run / 'eval.jsonl', [evaluation(10, success, 0.4, 0.8)])
    runs.append(run)
  text = summary.write_report(workdir, workdirs=runs).read_text()
  assert '| c | 10 | 70.0% | 40.0% to 80.0% |' in text
  # Unbiased deviation of 0.5, 0.6, 0.7 is 0.1.
  assert 'Mean 60.0%, standard deviation 10.0 points over 3 runs.' in text
  assert (workdir / 'report' / 'curves.png').exists()
  with pytest.raises(FileNotFoundError, match='--workdirs is .*missing, which'):
    summary.write_report(workdir, workdirs=[tmp_path / 'missing'])


def test_several_runs_on_different_tasks_have_no_mean(workdir, tmp_path):
  runs = []
  for name in ('a', 'b'):
    run = tmp_path / name
    run.mkdir()
    config = {'env.name': name, 'seed': 0}
    (run / 'config.json').write_text(json.dumps(config))
    write_lines(run / 'eval.jsonl', EVALS)
    runs.append(run)
  text = summary.write_report(workdir, workdirs=runs).read_text()
  assert '| b | 10 |' in text and 'Mean' not in text
  text = summary.write_report(workdir, workdirs=runs[:1] * 2).read_text()
  assert 'Mean 55.0%' in text


def test_markdown_escapes_cells():
  table = summary.markdown([('a', 'b'), ('x|y', '1')])
  assert table == '| a | b |\n|---|---|\n| x\\|y | 1 |'


def test_rows_damaged_line_is_named(tmp_path):
  path = tmp_path / 'eval.jsonl'
  assert rows.read(path) == []
  path.write_bytes('{"step": 0, "text": "\u00e9'.encode()[:-1])
  assert rows.read(path) == []
  path.write_text('{"step": 0}\nnothing\n{"step": 2}\n')
  with pytest.raises(ValueError, match='eval.jsonl:2 is not a JSON object'):
    rows.read(path)


def test_column_without_missing_and_null_values():
  given = [{'step': 1, 'x': 0}, {'step': 2, 'x': None}, {'step': 3}]
  assert rows.column(given, 'x') == ([1], [0.0])


def test_command_prints_the_files(workdir):
  result = command('report', f'--workdir={workdir}')
  assert result.returncode == 0, result.stderr
  out = workdir / 'report'
  names = ('curve.png', 'summary.md', 'trajectories.html')
  assert result.stdout.splitlines() == [str(out / name) for name in names]


def test_command_directory_without_a_run_is_refused(tmp_path):
  result = command('report', f'--workdir={tmp_path}')
  assert_refused(
    result, f'--workdir is {tmp_path}, which is not a run', 'config'
  )
  assert list(tmp_path.iterdir()) == []
