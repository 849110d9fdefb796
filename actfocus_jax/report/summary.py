"""Report of a run: a page of text, a picture and the trajectories.

DIR/report/summary.md          tables of numbers
DIR/report/curve.png           success against steps
DIR/report/curves.png          several runs in one picture (--workdirs)
DIR/report/trajectories.html   episodes, token by token
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from actfocus_jax.report import intervals, plots, viewer
from actfocus_jax.report import rows as rows_lib

Rows = list[dict[str, Any]]
_EVALUATION = ('step', 'success', '95 % interval', 'pass@G', 'episodes')

# Number of steps at each end of a run that the diagnostics average over.
_ENDS = 10

# Numbers of an evaluation; those that environments add are `info/NAME`.
_EPISODE_NUMBERS = {
  'turns': 'turns per episode',
  'valid_turns': 'share of turns with a valid action',
  'effective_actions': 'share of actions that changed something',
  'truncated': 'share of episodes that the context ended',
  'failed': 'share of episodes that the environment ended by failing',
  'bought': 'purchase rate: share of episodes with a purchase',
  'reward': 'reward of the purchase before strictness, 0 without one',
  'boxes_on_targets': 'boxes on targets at the end',
  'cells_correct': 'cells filled as in the stored solution',
  'cells_placed': 'cells filled',
}

_DIAGNOSTICS = (
  ('weights/action_share', 'share of sampled tokens that are action tokens'),
  ('weights/action_mass', 'share of all weight that lies on action tokens'),
  ('signal/mean', 'mean of the signal over action tokens'),
  ('signal/std', 'its standard deviation over action tokens'),
  ('selection/kept', 'groups kept by the selection'),
  ('actor/entropy', 'entropy of the policy, nats per sampled token'),
  ('actor/clip_fraction', 'share of tokens whose ratio was clipped'),
  ('actor/grad_norm', 'norm of the gradient before clipping'),
  ('rollout/sampler_gap_p99', 'sampler against re-scored log-prob, p99'),
  ('rollout/tokens_per_second', 'sampled tokens per second'),
  ('rollout/environment_share', "environments' share of the rollout's time"),
  ('compiles', 'compilations so far'),
)


def write_report(
  workdir: pathlib.Path, *, workdirs: Sequence[pathlib.Path] = ()
) -> pathlib.Path:
  """Write DIR/report/ from a run, finished or not; return its summary.md.

  The runs in `workdirs` share one picture and one table.

  Raises:
    FileNotFoundError: a directory is not a run.
    ValueError: a file of a run is damaged.
  """
  _require_run(workdir, '--workdir')
  for run in workdirs:
    _require_run(run, '--workdirs')
  out = workdir / 'report'
  evals = rows_lib.read(workdir / 'eval.jsonl')
  steps = rows_lib.read(workdir / 'metrics.jsonl')
  baselines = _baselines(workdir)
  random_success = baselines.get('random_success')
  plots.learning_curve(
    evals,
    steps,
    random_success=random_success,
    warm_start_success=_before_training(evals),
    path=out / 'curve.png',
  )
  viewer.write_page(
    workdir / 'rollouts',
    out / 'trajectories.html',
    title=f'Trajectories of {workdir.resolve().name}',
  )
  sections = [
    f'# Report of {workdir.resolve().name}',
    '![success against steps](curve.png)',
    '[Trajectories](trajectories.html)',
    *_success(evals, baselines),
    *_games(evals, baselines),
    *_episode_numbers(evals),
    *_times(steps),
    *_diagnostics(steps),
  ]
  if workdirs:
    sections += _compare_runs(workdirs, out / 'curves.png')
  path = out / 'summary.md'
  path.write_text('\n\n'.join(sections) + '\n', encoding='utf-8')
  return path


def _compare_runs(
  workdirs: Sequence[pathlib.Path], picture: pathlib.Path
) -> list[str]:
  """Draw several runs; return their last evaluations, mean and spread."""
  runs = [
    (run.resolve().name, rows_lib.read(run / 'eval.jsonl')) for run in workdirs
  ]
  # Runs on different tasks share neither a random baseline nor a mean.
  is_one_task = len({_task(run) for run in workdirs}) == 1
  randoms = {_baselines(run).get('random_success') for run in workdirs}
  plots.overlay(
    runs,
    random_success=randoms.pop() if len(randoms) == 1 else None,
    path=picture,
  )
  ended = [(label, rows[-1]) for label, rows in runs if rows]
  table = [_evaluation(label, row) for label, row in ended]
  table = markdown([('run', *_EVALUATION), *table])
  blocks = ['## Runs', '![all runs](curves.png)', table]
  if is_one_task and len(ended) > 1:
    success = [row['success'] for _, row in ended]
    mean = _mean(success)
    # Unbiased, since the runs are a sample of all seeds.
    variance = sum((x - mean) ** 2 for x in success) / (len(success) - 1)
    blocks.append(
      f'Mean {mean:.1%}, standard deviation {100 * variance**0.5:.1f} points '
      f'over {len(success)} runs.'
    )
  return blocks


def _success(evals: Rows, baselines: dict[str, Any]) -> list[str]:
  """Return the held-out success, beside its start and random play."""
  title = '## Held-out success'
  if not evals:
    return [title, 'Nothing was evaluated yet.']
  first, last = evals[0], evals[-1]
  best = max(evals, key=lambda row: row['success'])
  table = [('', *_EVALUATION), _evaluation('first', first)]
  if len(evals) > 1:
    table.append(_evaluation('**last**', last))
    table.append(_evaluation('best, picked afterwards', best))
  if baselines.get('random_success') is not None:
    table.append(_random(baselines))
  blocks = [title, markdown(table)]
  if len(evals) > 1:
    blocks.append(_difference(first, last))
  return blocks


def _games(evals: Rows, baselines: dict[str, Any]) -> list[str]:
  """Return the held-out success in each environment of a mixture."""
  if not evals:
    return []
  names = [k.removesuffix('/success') for k in evals[0] if '/success' in k]
  names = [name for name in names if f'{name}/success_low' in evals[0]]
  table = [('environment', *_EVALUATION)]
  for name in names:
    for row in (evals[0], evals[-1])[: len(evals)]:
      values = {
        key.removeprefix(f'{name}/'): value
        for key, value in row.items()
        if key.startswith(f'{name}/')
      }
      table.append(_evaluation(name, {**values, 'step': row['step']}))
    success = baselines.get(f'{name}/random_success')
    if success is not None:
      table.append((f'{name}, random play', '', f'{success:.1%}', '', '', ''))
  return ['## Each environment', markdown(table)] if names else []


def _episode_numbers(evals: Rows) -> list[str]:
  """Return the numbers of the held-out episodes beside success."""
  if not evals:
    return []
  first, last = evals[0], evals[-1]
  table = [('number', 'first', 'last', 'meaning')]
  for key in sorted(last):
    name = key.rpartition('info/')[2]
    meaning = _EPISODE_NUMBERS.get(name, '' if 'info/' in key else None)
    if meaning is not None:
      table.append(
        (f'`{key}`', f'{first.get(key, 0.0):.4g}', f'{last[key]:.4g}', meaning)
      )
  return ['## Held-out episodes', markdown(table)] if len(table) > 1 else []


def _times(steps: Rows) -> list[str]:
  """Return the seconds of each part of a step, largest first."""
  keys = sorted({key for row in steps for key in row if key[:5] == 'time/'})
  total = {key: sum(rows_lib.column(steps, key)[1]) for key in keys}
  whole = sum(total.values())
  if not whole:
    return []
  table = [('part', 'seconds', 'share', 'seconds per step')]
  for key in sorted(keys, key=total.get, reverse=True):
    seconds = total[key]
    table.append(
      (
        key.removeprefix('time/'),
        f'{seconds:,.1f}',
        f'{seconds / whole:.0%}',
        f'{seconds / len(steps):.2f}',
      )
    )
  return [f'## Where the time went ({len(steps)} steps)', markdown(table)]


def _diagnostics(steps: Rows) -> list[str]:
  """Return means of training metrics at the start and the end of the run."""
  table = []
  for key, meaning in _DIAGNOSTICS:
    values = rows_lib.column(steps, key)[1]
    if values:
      start, end = _mean(values[:_ENDS]), _mean(values[-_ENDS:])
      table.append((f'`{key}`', f'{start:.4g}', f'{end:.4g}', meaning))
  if not table:
    return []
  ends = min(_ENDS, len(steps))
  head = ('metric', f'first {ends} steps', f'last {ends} steps', 'meaning')
  blocks = ['## Diagnostics', markdown([head, *table])]
  share = rows_lib.column(steps, 'weights/action_share')[1]
  mass = rows_lib.column(steps, 'weights/action_mass')[1]
  if share and mass and _mean(share) > 0:
    blocks.append(
      f'Action tokens are {_mean(share):.1%} of the sampled tokens and carry '
      f'{_mean(mass):.1%} of the weight: {_mean(mass) / _mean(share):.1f} '
      'times their share of the count.'
    )
  return blocks


def markdown(table: Sequence[Sequence[str]]) -> str:
  """Return a table, its first row the heading; `|` in a cell is escaped."""
  lines = [
    '| ' + ' | '.join(cell.replace('|', '\\|') for cell in row) + ' |'
    for row in table
  ]
  rule = '|' + '---|' * len(table[0])
  return '\n'.join([lines[0], rule, *lines[1:]])


def _evaluation(name: str, row: dict[str, Any]) -> Sequence[str]:
  low, high = row['success_low'], row['success_high']
  pass_at_g = row.get('pass_at_g')
  return (
    name,
    str(row['step']),
    f'{row["success"]:.1%}',
    f'{low:.1%} to {high:.1%}',
    '-' if pass_at_g is None else f'{pass_at_g:.1%}',
    str(row['episodes']),
  )


def _random(baselines: dict[str, Any]) -> Sequence[str]:
  success = baselines['random_success']
  episodes = baselines.get('random_episodes')
  band = '-'
  if episodes:
    low, high = intervals.wilson(round(success * episodes), episodes)
    band = f'{low:.1%} to {high:.1%}'
  return 'random play', '', f'{success:.1%}', band, '', str(episodes or '-')


def _difference(first: dict[str, Any], last: dict[str, Any]) -> str:
  counts = []
  for row in (last, first):
    counts += [round(row['success'] * row['episodes']), row['episodes']]
  change, low, high = (100 * x for x in intervals.newcombe(*counts))
  verdict = 'excludes' if low > 0 or high < 0 else 'includes'
  return (
    f'Last minus first: {change:+.1f} points, 95 % interval {low:+.1f} to '
    f'{high:+.1f}, which {verdict} 0. (Newcombe; takes the two evaluations as '
    'independent, though both play the same boards.)'
  )


def _before_training(evals: Rows) -> float | None:
  """Success at step 0: of the given model, or after its warm start."""
  return evals[0]['success'] if evals and evals[0]['step'] == 0 else None


def _task(workdir: pathlib.Path) -> str:
  """Return the environments of a run with their options, as text."""
  config = json.loads((workdir / 'config.json').read_text(encoding='utf-8'))
  fields = ('env.name', 'env.options', 'env.boards', 'mixture')
  task = {k: v for k, v in config.items() if k.startswith(fields)}
  return json.dumps(task, sort_keys=True)


def _baselines(workdir: pathlib.Path) -> dict[str, Any]:
  path = workdir / 'baselines.json'
  return json.loads(path.read_text(encoding='utf-8')) if path.exists() else {}


def _require_run(workdir: pathlib.Path, flag: str) -> None:
  # A model directory has a config.json too, but no rows.
  for name in ('config.json', 'eval.jsonl'):
    if not (workdir / name).is_file():
      raise FileNotFoundError(
        f'{flag} is {workdir}, which is not a run: it has no {name}.'
      )


def _mean(values: Sequence[float]) -> float:
  return sum(values) / len(values)
