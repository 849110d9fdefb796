"""Compare the numbers of two commits, digit for digit.

Two checkouts run on this machine with one interpreter: six short runs at
size=tiny, each with a warm start, a first evaluation, two steps and a resume
for the third, and commands that must be refused. Compared are metrics.jsonl,
eval.jsonl, baselines.json, config.json, the saved episodes, the files of the
warm start and the final policy by hash, and what the refused commands answer.
Times, tokens per second and numbers of compilations are left out.

Exit code 0: all agree. 1: something differs (the first differing key of each
file is printed) or a run failed. 2: wrong arguments.
"""

import argparse
import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from importlib import metadata

ROOT = pathlib.Path(__file__).resolve().parents[2]
RENAMES = 'tests/bench/same_numbers_renames.txt'
ENVIRONMENT = (
  """environment variables:
  PY      interpreter of both sides (default .venv/bin/python)
  JOBS    commands at a time (default 2)
  KEEP    folder of results by commit, which are not computed again
          (default same_numbers in the folder of temporary files)
  PREFIX  words before each command, such as `nice` or `taskset -c 0`
  TABLE   table of renames for the new commit, in place of its own
          """
  + RENAMES
)

# Keys of the rows that a clock or the process decides.
_TIMED = (
  *('time/', 'compiles', 'seconds', 'rollout/tokens_per_second'),
  'rollout/environment_share',
)
# The same threads on both sides: sums over threads round differently.
_THREADS = {
  'JAX_PLATFORMS': 'cpu',
  'OMP_NUM_THREADS': '1',
  'OPENBLAS_NUM_THREADS': '1',
  'PYTHONHASHSEED': '0',
  'RAYON_NUM_THREADS': '1',
  'TOKENIZERS_PARALLELISM': 'false',
}
_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'numpy', 'tokenizers')

TRAIN, EXPORT = 'actfocus_jax.train', 'actfocus_jax.export'

# Fields of every run. The warm start learns just enough that some episodes
# succeed and some do not.
SMALL = {
  'rollout.prompts': 4,
  'rollout.members': 4,
  'rollout.lengths': '()',
  'learner.minibatch': 8,
  'learner.self_check': False,
  'eval.every': 0,
  'eval.prompts': 4,
  'eval.members': 2,
  'eval.save': 2,
  'checkpoint.every': 1,
  'warm_start.cache': 'warm_starts',
  'warm_start.episodes': 96,
  'warm_start.steps': 80,
  'warm_start.batch': 8,
  'warm_start.hidden_size': 64,
  'warm_start.intermediate_size': 128,
}


@dataclasses.dataclass(frozen=True)
class Run:
  """One training run.

  Attributes:
    config: file of configs/ with config arguments.
    fields: values by dotted name, on top of SMALL.
    devices: number of simulated devices.
  """

  config: str
  fields: dict[str, object]
  devices: int = 1


# Together they pass through both algorithms, all estimators, both reductions,
# both schemes of weights, KL, selection by both rules, micro-batches, separate
# scoring, the critic's warm-up, idle slots and two devices.
RUNS = {
  'grpo': Run(
    'quickstart.py:algo=grpo',
    {
      'limits.context': 512,
      'kl.coefficient': 0.01,
      'kl.estimator': 'k3',
      'learner.microbatch': 4,
      'learner.self_check': True,
    },
  ),
  'ppo': Run(
    'quickstart.py:algo=ppo',
    {
      'limits.context': 512,
      'selection.ratio': 1.0,
      'critic.warmup': 1,
      'learner.epochs': 2,
      'learner.microbatch': 4,
      'learner.importance_cap': 2.0,
    },
  ),
  'sokoban': Run(
    'sokoban.py:estimator=gigpo',
    {
      'learner.microbatch': 0,
      'rollout.slots': 8,
      'weights.alpha_end': 0.5,
      'weights.schedule_steps': 2,
    },
  ),
  'sudoku': Run(
    'sudoku.py:weights=top_entropy',
    {
      'learner.fused': False,
      'learner.microbatch': 4,
      'learner.ratio': 'turn',
      'loss.reduction': 'sequence_mean_token_mean',
      'selection.rule': 'top_p',
      'selection.ratio': 0.9,
      'warm_start.batch': 4,
    },
  ),
  'webshop': Run(
    'webshop.py:estimator=empg,weights=centered_energy',
    {
      'learner.microbatch': 0,
      'learner.old_logprob': 'sampler',
      'warm_start.batch': 4,
      'warm_start.steps': 60,
    },
  ),
  'mixture': Run(
    'own.py:env=frozen_lake+sokoban,algo=ppo,estimator=turn_gae',
    {
      'mesh.fsdp': 2,
      'learner.microbatch': 4,
      'learner.self_check': True,
      'rollout.slots': 8,
      'mixture.sokoban.share': 3.0,
      'mixture.frozen_lake.turns': 3,
    },
    devices=2,
  ),
}

QUICKSTART = '--config=configs/quickstart.py'
# Commands that must be refused; `--workdir=run` is added.
REFUSALS = {
  'unknown field': (TRAIN, QUICKSTART, '--config.rollout.prompt=4'),
  'value out of range': (TRAIN, QUICKSTART, '--config.weights.alpha=2'),
  'value of another type': (TRAIN, QUICKSTART, '--config.num_steps=many'),
  'field without effect': (TRAIN, QUICKSTART, '--config.weights.share=0.5'),
  'config missing': (TRAIN,),
  'config is not a file': (TRAIN, '--config=configs/none.py'),
  'unknown algorithm': (TRAIN, f'{QUICKSTART}:algo=dpo'),
  'unknown environment': (TRAIN, '--config=configs/own.py:env=chess'),
  'group of one member': (TRAIN, QUICKSTART, '--config.rollout.members=1'),
  'mesh that does not fit': (TRAIN, QUICKSTART, '--config.mesh.fsdp=16'),
  'context too small': (
    *(TRAIN, QUICKSTART, '--config.limits.context=40'),
    '--config.rollout.lengths=()',
  ),
  'workdir with other files': (TRAIN, QUICKSTART),
  'export without a run': (EXPORT, '--out=exported'),
}


# --- Names -------------------------------------------------------------------


class Renames:
  """Table of names that changed, by kind: field, metric, command."""

  def __init__(self, text: str = ''):
    """Reads the lines of a table."""
    self._new = {'field': {}, 'metric': {}, 'command': {}}
    for line in text.splitlines():
      kind, *names = line.split(None, 2) or ['#']
      if kind.startswith('#'):
        continue
      if kind not in self._new or len(names) < 2:
        raise SystemExit(f'same_numbers: no such rename: {line!r}')
      self._new[kind][names[0]] = names[1].strip()

  def new(self, kind: str, name: str) -> str:
    """Return the new name of an old one, '-' if it is gone."""
    return _replaced(name, self._new[kind])

  def old(self, kind: str, name: str) -> str:
    """Return the old name of a new one."""
    return _replaced(name, {new: old for old, new in self._new[kind].items()})


def _replaced(name: str, names: dict[str, str]) -> str:
  for old, new in names.items():
    if name == old:
      return new
    if name.startswith(f'{old}.'):
      return new if new == '-' else new + name.removeprefix(old)
  return name


# --- One side ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Side:
  """One commit and its results.

  Attributes:
    label: short name in progress lines.
    tree: checkout.
    renames: names that changed between RUNS and the commit.
    results: folder with a folder for each run.
    compiled: folder of compiled programs.
  """

  label: str
  tree: pathlib.Path
  renames: Renames
  results: pathlib.Path
  compiled: pathlib.Path


class Failed(Exception):
  """A command that had to succeed did not."""


_processes: set[subprocess.Popen] = set()
_stopping = threading.Event()


def say(text: str):
  """Prints a progress line."""
  print(text, file=sys.stderr, flush=True)


def words(side: Side, module: str, *arguments: str) -> list[str]:
  """Return a command of one side, in that side's names."""
  found = []
  for argument in arguments:
    if argument.startswith('--config.'):
      field, _, value = argument.removeprefix('--config.').partition('=')
      field = side.renames.new('field', field)
      if field != '-':
        found.append(f'--config.{field}={value}')
    else:
      found.append(argument)
  return [*side.renames.new('command', module).split(), *found]


def execute(
  side: Side, command: list[str], folder: pathlib.Path, devices: int = 1
) -> tuple[int, str]:
  """Runs a command in a folder.

  Returns:
    Its exit code and what it wrote to stderr.
  """
  flags = [
    '--xla_cpu_multi_thread_eigen=false',
    f'--xla_force_host_platform_device_count={devices}',
  ]
  environment = {
    **{k: v for k, v in os.environ.items() if not k.startswith('JAX_')},
    **_THREADS,
    'XLA_FLAGS': ' '.join(flags),
    'PYTHONPATH': str(side.tree),
    'JAX_COMPILATION_CACHE_DIR': str(side.compiled),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.2',
  }
  configs = f'--config={side.tree}/configs/'
  command = [a.replace('--config=configs/', configs) for a in command]
  with (folder / 'output.txt').open('a', encoding='utf-8') as output:
    if _stopping.is_set():
      raise Failed('stopped')
    process = subprocess.Popen(
      [*shlex.split(os.environ.get('PREFIX', '')), sys.executable, '-m']
      + command,
      cwd=folder,
      env=environment,
      stdin=subprocess.DEVNULL,
      stdout=output,
      stderr=subprocess.PIPE,
      text=True,
      start_new_session=True,
    )
    _processes.add(process)
    errors = process.communicate()[1]
    _processes.discard(process)
    output.write(errors)
  return process.returncode, errors


def must(side: Side, command: list[str], folder: pathlib.Path, devices: int):
  """Runs a command that has to succeed.

  Raises:
    Failed: with the end of what it wrote.
  """
  code, _ = execute(side, command, folder, devices)
  if code:
    lines = (folder / 'output.txt').read_text().splitlines()[-12:]
    text = '\n  '.join(lines)
    raise Failed(f'exit code {code} of {shlex.join(command)}\n  {text}')


def commands(side: Side, name: str) -> list[list[str]]:
  """Return the commands of one run, or all that must be refused."""
  if name == 'refusals':
    return [
      words(side, module, *arguments, '--workdir=run')
      for module, *arguments in REFUSALS.values()
    ]
  run = RUNS[name]
  fields = SMALL | run.fields
  given = [f'--config.{field}={value}' for field, value in fields.items()]
  first, resumed = (
    words(
      side,
      TRAIN,
      f'--config=configs/{run.config}',
      *given,
      f'--config.num_steps={steps}',
      '--workdir=run',
    )
    for steps in (2, 3)
  )
  return [first, resumed, words(side, EXPORT, '--workdir=run', '--out=policy')]


def train(side: Side, name: str, folder: pathlib.Path):
  """Makes one run: two steps, a resume for the third, the final policy."""
  parts = 'two steps', 'resume and third step', 'export'
  for part, command in zip(parts, commands(side, name), strict=True):
    start = time.monotonic()
    must(side, command, folder, 1 if part == 'export' else RUNS[name].devices)
    say(f'{side.label} {name}: {part}, {time.monotonic() - start:.0f} s')
  hashes = {
    'policy': hash_tensors(folder / 'policy' / 'model.safetensors'),
    'warm_start': hash_warm_start(folder / 'warm_starts'),
  }
  (folder / 'hashes.json').write_text(json.dumps(hashes, indent=2))
  for big in ('policy', 'warm_starts', 'run/checkpoints', 'run/report'):
    shutil.rmtree(folder / big)


def hash_tensors(file: pathlib.Path) -> dict[str, str]:
  """Return a hash of each tensor of a safetensors file."""
  data = file.read_bytes()
  start = 8 + int.from_bytes(data[:8], 'little')
  header = json.loads(data[8:start])
  header.pop('__metadata__', None)
  return {
    name: hashlib.sha256(
      f'{tensor["dtype"]} {tensor["shape"]} '.encode()
      + data[slice(*(start + n for n in tensor['data_offsets']))]
    ).hexdigest()
    for name, tensor in sorted(header.items())
  }


def hash_warm_start(folder: pathlib.Path) -> dict[str, object]:
  """Return a hash of each file of the only warm start in a folder."""
  (model,) = (path for path in folder.iterdir() if path.is_dir())
  return {
    file.name: hash_tensors(file)
    if file.suffix == '.safetensors'
    else hashlib.sha256(file.read_bytes()).hexdigest()
    for file in sorted(model.iterdir())
  }


def listing(folder: pathlib.Path) -> list[pathlib.Path]:
  """Return what is in a folder, and the folder itself if it exists."""
  return [folder, *sorted(folder.rglob('*'))] if folder.exists() else []


def refuse(side: Side, name: str, folder: pathlib.Path):
  """Runs the commands that must be refused and writes down their answers."""
  answers = {}
  for reason, command in zip(REFUSALS, commands(side, name), strict=True):
    room = folder / reason.replace(' ', '_')
    room.mkdir()
    if reason == 'workdir with other files':
      (room / 'run').mkdir()
      (room / 'run' / 'notes.txt').write_text('notes')
    before = listing(room / 'run')
    code, errors = execute(side, command, room)
    answers[reason] = {
      'exit code': code,
      'error lines': sum(
        line.startswith('error: ') for line in errors.splitlines()
      ),
      'workdir untouched': listing(room / 'run') == before,
    }
  say(f'{side.label} refusals: {len(answers)} commands')
  (folder / 'refusals.json').write_text(json.dumps(answers, indent=2))


def fingerprint(side: Side, name: str) -> dict[str, object]:
  """Return what decides the results of a run besides the commit."""
  return {
    'commands': commands(side, name),
    'devices': RUNS[name].devices if name in RUNS else 1,
    'machine': platform.node(),
    'python': sys.version,
    'packages': {p: metadata.version(p) for p in _PACKAGES},
  }


def ensure(side: Side, name: str):
  """Makes the results of one run unless they are kept from before."""
  kept, wanted = side.results / name, fingerprint(side, name)
  note = kept / 'fingerprint.json'
  if note.exists() and json.loads(note.read_text()) == wanted:
    say(f'{side.label} {name}: kept from before')
    return
  side.results.mkdir(parents=True, exist_ok=True)
  folder = pathlib.Path(tempfile.mkdtemp(prefix='.making-', dir=side.results))
  try:
    (refuse if name == 'refusals' else train)(side, name, folder)
    (folder / note.name).write_text(json.dumps(wanted, indent=2))
    if kept.exists():
      shutil.rmtree(kept)
    folder.rename(kept)
  finally:
    shutil.rmtree(folder, ignore_errors=True)


# --- Comparing ---------------------------------------------------------------


def flatten(value, prefix: str = '') -> dict[str, object]:
  """Return the leaves of nested dicts and lists by dotted name."""
  if isinstance(value, dict):
    pairs = value.items()
  elif isinstance(value, list):
    pairs = enumerate(value)
  else:
    return {prefix: value}
  leaves = {}
  for key, each in pairs:
    leaves |= flatten(each, f'{prefix}.{key}' if prefix else str(key))
  return leaves or {prefix: value}


def read(side: Side, file: pathlib.Path) -> list[dict[str, object]]:
  """Return the rows of a file in the names of RUNS, without times."""
  kind = 'field' if file.name == 'config.json' else 'metric'
  text = file.read_text(encoding='utf-8')
  if file.suffix == '.jsonl':
    rows = [json.loads(line) for line in text.splitlines()]
  else:
    rows = [json.loads(text)]
  if file.name == 'config.json':
    return [
      {side.renames.old(kind, key): value for key, value in row.items()}
      for row in rows
    ]
  return [
    {
      side.renames.old(kind, key): value
      for key, value in flatten(row).items()
      if not is_timed(key)
    }
    for row in rows
  ]


def is_timed(key: str) -> bool:
  """Return whether a clock or the process decides a key, of any game."""
  return key.startswith(_TIMED) or key.endswith('/seconds')


_ABSENT = 'nothing'


def difference(old: Side, new: Side, file: str) -> str | None:
  """Return the first difference of one file, or None."""
  files = old.results / file, new.results / file
  there = [path.exists() for path in files]
  if not all(there):
    return f'{file}: only the {"old" if there[0] else "new"} commit writes it'
  kind = 'field' if files[0].name == 'config.json' else 'metric'
  rows = [read(*pair) for pair in zip((old, new), files, strict=True)]
  for number, pair in enumerate(itertools.zip_longest(*rows), 1):
    if None in pair:
      return f'{file}: {len(rows[0])} rows, now {len(rows[1])}'
    row, now = pair
    place = f' row {number}' if len(rows[0]) > 1 else ''
    for key in [*row, *(key for key in now if key not in row)]:
      if '-' in (old.renames.new(kind, key), new.renames.new(kind, key)):
        continue
      # As text: 1 and 1.0 differ, and NaN equals NaN.
      values = [
        json.dumps(each[key]) if key in each else _ABSENT for each in pair
      ]
      if values[0] != values[1]:
        return f'{file}{place}: {key} was {values[0]}, is {values[1]}'
  return None


def differences(old: Side, new: Side, name: str) -> list[str]:
  """Return the first difference of each file of a run."""
  files = {
    str(path.relative_to(side.results))
    for side in (old, new)
    for path in (side.results / name).rglob('*.json*')
    if path.name not in ('fingerprint.json', 'model.json')
  }
  found = [difference(old, new, file) for file in sorted(files)]
  return [text for text in found if text]


def faults(side: Side, name: str) -> list[str]:
  """Return what is wrong with the refusals of one side by itself."""
  if name != 'refusals':
    return []
  answers = json.loads((side.results / name / 'refusals.json').read_text())
  right = {'exit code': 2, 'error lines': 1, 'workdir untouched': True}
  return [
    f'{side.label} refusals: {reason}: {answer}, not {right}'
    for reason, answer in answers.items()
    if answer != right
  ]


def warn(side: Side, name: str):
  """Prints a warning for a run whose losses are all 0."""
  rows = read(side, side.results / name / 'run' / 'metrics.jsonl')
  if not any(row.get('actor/loss') for row in rows):
    say(f'{side.label} {name}: warning: every actor/loss is 0 or missing')


# --- The command -------------------------------------------------------------


def git(*arguments: str) -> str:
  """Return what git prints about this repository."""
  return subprocess.run(
    ['git', '-C', str(ROOT), *arguments],
    check=True,
    capture_output=True,
    text=True,
  ).stdout.strip()


def check_out(commit: str, tree: pathlib.Path):
  """Writes the files of a commit into a new folder."""
  tree.mkdir()
  archive = subprocess.run(
    ['git', '-C', str(ROOT), 'archive', commit],
    check=True,
    capture_output=True,
  )
  subprocess.run(
    ['tar', '-x', '-C', str(tree)], input=archive.stdout, check=True
  )


def table(tree: pathlib.Path, other: str | None = None) -> Renames:
  """Return the renames of a checkout; of none where it has no table."""
  file = pathlib.Path(other) if other else tree / RENAMES
  return Renames(file.read_text() if other or file.exists() else '')


def parse() -> argparse.Namespace:
  """Reads the command line."""
  parser = argparse.ArgumentParser(
    prog='same_numbers.sh',
    description=__doc__,
    epilog=ENVIRONMENT,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  names = [*RUNS, 'refusals']
  parser.add_argument('old', metavar='OLD_COMMIT')
  parser.add_argument('new', metavar='NEW_COMMIT', nargs='?', default='HEAD')
  parser.add_argument(
    '--only',
    metavar='NAME,...',
    default=','.join(names),
    help=f'runs to make, of {", ".join(names)}',
  )
  given = parser.parse_args()
  given.only = given.only.split(',')
  if not set(given.only) <= set(names):
    parser.error(f'--only allows {", ".join(names)}')
  for side in ('old', 'new'):
    try:
      commit = git(
        'rev-parse', '--verify', f'{getattr(given, side)}^{{commit}}'
      )
    except subprocess.CalledProcessError:
      parser.error(f'{getattr(given, side)} is not a commit')
    if side == 'new' and given.new == 'HEAD' and git('status', '--porcelain'):
      say('The working tree has uncommitted changes, which are not compared.')
    setattr(given, side, commit)
  return given


def make_all(sides: list[Side], names: list[str]) -> dict[str, list[str]]:
  """Makes all results, some at a time; returns failures by run."""
  failed = {}
  jobs = int(os.environ.get('JOBS', '2'))
  pool = concurrent.futures.ThreadPoolExecutor(jobs)
  try:
    tasks = {
      pool.submit(ensure, side, name): (side, name)
      for name in names
      for side in sides
    }
    for task in concurrent.futures.as_completed(tasks):
      side, name = tasks[task]
      try:
        task.result()
      except Failed as error:
        failed.setdefault(name, []).append(f'{side.label} {name}: {error}')
        say(failed[name][-1])
  finally:
    _stopping.set()
    for process in list(_processes):
      os.killpg(process.pid, signal.SIGKILL)
    pool.shutdown(cancel_futures=True)
  return failed


def main() -> int:
  """Runs both sides and compares them."""
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
  given = parse()
  default = pathlib.Path(tempfile.gettempdir()) / 'same_numbers'
  keep = pathlib.Path(os.environ.get('KEEP') or default).absolute()
  with tempfile.TemporaryDirectory(prefix='same_numbers-') as temporary:
    scratch = pathlib.Path(temporary)
    sides = []
    for label, commit in (('old', given.old), ('new', given.new)):
      tree = scratch / label
      check_out(commit, tree)
      # One commit against itself: the second time from the beginning.
      again = label == 'new' and given.new == given.old
      folder = scratch / 'again' if again else keep
      sides.append(
        Side(
          label=f'{label} {commit[:7]}',
          tree=tree,
          renames=table(tree, label == 'new' and os.environ.get('TABLE')),
          results=folder / commit,
          compiled=folder / 'compiled',
        )
      )
    failed = make_all(sides, given.only)
    found = []
    for name in given.only:
      if name in failed:
        continue
      for side in sides:
        found += faults(side, name)
        if name in RUNS:
          warn(side, name)
      found += differences(*sides, name)
  for text in itertools.chain(*failed.values(), found):
    print(text)
  if not failed and not found:
    print('The numbers are the same.')
  return 1 if failed or found else 0


if __name__ == '__main__':
  sys.exit(main())
