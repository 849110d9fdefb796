r"""Train several arms on several seeds, and compare them.

python -m actfocus_jax.compare --config=configs/quickstart.py \
  --arms=grpo:uniform,grpo:actfocus,ppo:actfocus --seeds=3 --workdir=DIR

An arm is [ALGO:]WEIGHTS[:ESTIMATOR], as in the config arguments `algo`,
`weights` and `estimator`; the config fills in what is left out. Every run is
DIR/ARM/seedN, a run directory like any other. All arms of one seed come before
the next seed, so that the finished runs are balanced. A run that stops for lack
of a learning signal counts as it stands, and is marked. The same command again
keeps finished runs and goes on with the others; a larger `--config.num_steps`
goes on with all that have not stalled. DIR/comparison.md and DIR/comparison.png
are written after every run.
"""

import pathlib

import ml_collections
from absl import flags

from actfocus_jax import build, errors, loop
from actfocus_jax.algorithm import estimators
from actfocus_jax.cli import flags as flags_lib
from actfocus_jax.cli import paths
from actfocus_jax.config import presets, schema, validate
from actfocus_jax.parallel import processes
from actfocus_jax.run import interrupt, metrics, storage

# Fields that --arms and --seeds set; the file that marks a stalled run.
_OF_ARMS = ('seed', 'algo', 'advantage.estimator')
_STALLED = 'stalled.txt'

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of all runs.')
_ARMS = flags.DEFINE_list(
  'arms',
  [],
  '[ALGO:]WEIGHTS[:ESTIMATOR],... to compare. ALGO: '
  f'{", ".join(schema.ALGOS)}. WEIGHTS: {", ".join(presets.WEIGHTS)}. '
  f'ESTIMATOR: {", ".join(estimators.ESTIMATORS)}.',
)
_SEEDS = flags.DEFINE_integer('seeds', 3, 'Runs of each arm.', lower_bound=1)
flags.declare_key_flag('config')
flags.declare_key_flag('help_config')


def main(argv: list[str]):
  """Check all arms, train the missing runs, then compare."""
  del argv
  if not _WORKDIR.value:
    raise errors.UsageError('--workdir is missing; e.g. --workdir=runs/compare')
  if len(_ARMS.value) < 2:
    raise errors.UsageError(
      f'--arms is {",".join(_ARMS.value)!r}; allowed: two or more, e.g. '
      '--arms=uniform,actfocus'
    )
  workdir = storage.path(_WORKDIR.value)
  plans = [
    (arm, seed, _plan(arm, seed))
    for seed in range(_SEEDS.value)
    for arm in _ARMS.value
  ]
  _check_overrides([c for _, _, c in plans])
  _check_different(plans[: len(_ARMS.value)])
  for arm, seed, c in plans:
    run = _run(workdir, arm, seed)
    paths.check_workdir(run, schema.to_json(c), same_batch=True)
    paths.pin_model(c.model, run)
  first = plans[0][2]
  build.check_mesh(
    first, paths.check_model(first.model, first.warm_start.cache)
  )

  cluster = processes.cluster_name()
  if cluster:
    raise errors.UsageError(
      f'compare runs in one process, and {cluster} has started several; '
      'allowed: one task.'
    )
  with interrupt.Interrupt() as stop:
    for arm, seed, c in plans:
      if not stop.requested:
        _train(c, _run(workdir, arm, seed), f'{arm}, seed {seed}')
        _write(workdir, plans)
  if stop.requested:
    raise errors.Stopped(
      f'Stopped by {stop.signal}. The same command goes on from there.',
      stop.code,
    )
  print((workdir / 'comparison.md').read_text())


def _train(c: ml_collections.ConfigDict, run: pathlib.Path, title: str):
  """Train until the run is finished, stalled, or interrupted."""
  if _evaluations(run, c.num_steps) is not None:
    return
  print(f'{title}: {run}')
  try:
    loop.train(c, run)
  except errors.NoLearningSignal as error:
    print(error)
    (run / _STALLED).write_text(f'{error}\n')


def _plan(arm: str, seed: int) -> ml_collections.ConfigDict:
  """Config of one run: the command line's with its arm and seed."""
  try:
    c = flags_lib.config_with(_arguments(arm))
  except errors.UsageError as error:
    if not str(error).startswith('Config argument'):
      raise
    raise errors.UsageError(f'--arms has {arm!r}: {error}') from error
  with c.unlocked():
    c.seed = seed
  validate.check(c)
  return c


def _check_different(plans):
  """Refuse two arms that are the same under different names."""
  seen = {}
  for arm, _, c in plans:
    described = str(schema.to_json(c))
    # `auto` and the name of the algorithm's own estimator are the same.
    described += schema.estimator(c)
    described = described.replace(
      f"'advantage.estimator': '{c.advantage.estimator}'", ''
    )
    if described in seen:
      raise errors.UsageError(
        f'--arms has {seen[described]!r} and {arm!r}, which are the same; '
        'allowed: each arm once.'
      )
    seen[described] = arm


def _check_overrides(plans: list[ml_collections.ConfigDict]):
  """Refuse fields that define an arm, and those that no arm has."""
  arms = ','.join(_ARMS.value)
  for field in flags_lib.overrides():
    section = field.partition('.')[0]
    if field in _OF_ARMS or section == 'weights':
      raise errors.UsageError(
        f'--config.{field} would make every arm of --arms={arms} the same in '
        'it; allowed: fields that --arms and --seeds do not set.'
      )
    if not any(schema.has_field(c, field) for c in plans):
      raise errors.UsageError(
        f'--config.{field} has no effect on any arm of --arms={arms}.'
      )


def _arguments(arm: str) -> str:
  """Config arguments of an arm."""
  names = arm.split(':')
  if len(names) > 3:
    raise errors.UsageError(
      f'--arms has {arm!r}; allowed: [ALGO:]WEIGHTS[:ESTIMATOR].'
    )
  keys = ['algo', 'weights', 'estimator']
  if len(names) == 1 or names[0] in presets.WEIGHTS:
    keys = keys[1:]
  if len(names) > len(keys):
    raise errors.UsageError(
      f'--arms has {arm!r}, where {names[0]} is not an algorithm; allowed: '
      '[ALGO:]WEIGHTS[:ESTIMATOR].'
    )
  return ','.join(f'{k}={v}' for k, v in zip(keys, names, strict=False))


def _run(workdir: pathlib.Path, arm: str, seed: int) -> pathlib.Path:
  return workdir / arm.replace(':', '-') / f'seed{seed}'


def _evaluations(run: pathlib.Path, steps: int) -> list[dict] | None:
  """Rows of eval.jsonl up to `steps`; None for a run that is not so far.

  A run that has stalled is finished; its last row has `stalled`.
  """
  file = run / 'eval.jsonl'
  rows = metrics.read(file) if file.exists() else []
  rows = [row for row in rows if row['step'] <= steps]
  if rows and rows[-1]['step'] == steps:
    return rows
  if rows and (run / _STALLED).exists():
    return [*rows[:-1], {**rows[-1], 'stalled': True}]
  return None


def _write(workdir: pathlib.Path, plans):
  """Write table and picture of the finished runs."""
  from actfocus_jax.report import comparison  # Matplotlib loads slowly.

  results = {arm: {} for arm, _, _ in plans}
  for arm, seed, c in plans:
    rows = _evaluations(_run(workdir, arm, seed), c.num_steps)
    if rows is not None:
      results[arm][seed] = rows
  if not any(results.values()):
    return
  (workdir / 'comparison.md').write_text(f'{comparison.table(results)}\n')
  comparison.picture(results, path=workdir / 'comparison.png')


if __name__ == '__main__':
  flags_lib.run(main)
