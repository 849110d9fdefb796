"""launch/tpu_pod.sh and tpu_worker.sh against stub gcloud and Python."""

import contextlib
import fnmatch
import os
import pathlib
import shlex
import signal
import tarfile
import time

import launch_stubs
import pytest
from launch_stubs import AWKWARD, TRAINING, assert_refused, succeeds

POD = ('--name=pod-1', '--zone=us-east5-a', '--project=my-project')
PLACE = ('--project=my-project', '--zone=us-east5-a')
ALL = ('--node=all', '--worker=all', '--batch-size=all')
GCLOUD = ('gcloud', 'compute', 'tpus', 'queued-resources')
WORKER = 'bash actfocus_jax/launch/tpu_worker.sh'

# A worker's home: what ssh's command would do there, or scp's copy.
GCLOUD_ON_WORKER = """
for argument in "$@"; do
  case $argument in
    --command=*) cd "$HOME" && exec bash -c "${argument#--command=}" ;;
  esac
done
if [ "$4" = scp ]; then
  cp "$7" "$HOME/${8#*:}"
fi
"""


machine = launch_stubs.machine


@pytest.fixture
def worker(machine):
  """The machine, as its own only worker, with a stub of Python."""
  machine.stub('gcloud', GCLOUD_ON_WORKER)
  machine.stub('python3', launch_stubs.PYTHON)
  yield machine
  pid = machine.home / 'actfocus_jax/runs/pod/pid'
  if pid.exists():
    with contextlib.suppress(ProcessLookupError):
      os.kill(int(pid.read_text()), signal.SIGKILL)


def pod(machine, action, *arguments, **environment):
  return machine.run('tpu_pod.sh', action, *POD, *arguments, **environment)


def gcloud(verb, *flags):
  return [*GCLOUD, verb, *PLACE, 'pod-1', *flags]


def everywhere(command):
  return gcloud('ssh', *ALL, f'--command={command}')


@pytest.mark.parametrize(
  ('options', 'flags'),
  [
    (
      ['--type=v5litepod-16'],
      ['v5litepod-16', 'v2-alpha-tpuv5-lite', '--node-id=pod-1'],
    ),
    (['--type=v5p-8'], ['v5p-8', 'v2-alpha-tpuv5', '--node-id=pod-1']),
    (['--type=v4-8'], ['v4-8', 'tpu-ubuntu2204-base', '--node-id=pod-1']),
    (
      ['--type=v6e-16', '--node-count=2', '--spot'],
      [
        *('v6e-16', 'v2-alpha-tpuv6e'),
        *('--node-count=2', '--node-prefix=pod-1', '--spot'),
      ],
    ),
    (
      ['--type=v9-8', '--runtime-version=v9', '--', '--labels=a=b c'],
      ['v9-8', 'v9', '--node-id=pod-1', '--labels=a=b c'],
    ),
  ],
)
def test_pod_create(machine, options, flags):
  succeeds(pod(machine, 'create', *options))
  kind, version, *rest = flags
  assert machine.calls() == [
    gcloud(
      'create',
      f'--accelerator-type={kind}',
      f'--runtime-version={version}',
      *rest,
    )
  ]


@pytest.mark.parametrize(
  ('arguments', 'expected'),
  [
    (['status'], [gcloud('describe', '--format=value(state.state)')]),
    (
      ['logs'],
      [gcloud('ssh', '--node=0', '--worker=0', f'--command={WORKER} logs')],
    ),
    (
      ['logs', '--worker=3', '--node=1'],
      [gcloud('ssh', '--node=1', '--worker=3', f'--command={WORKER} logs')],
    ),
    (['stop'], [everywhere(f'{WORKER} stop')]),
    (['delete'], [gcloud('delete', '--force')]),
    (
      ['run', '--', *TRAINING],
      [
        everywhere(f'{WORKER} ready {" ".join(TRAINING)}'),
        everywhere(f'{WORKER} run {" ".join(TRAINING)}'),
        everywhere(f'{WORKER} watch'),
      ],
    ),
  ],
)
def test_pod_actions(machine, arguments, expected):
  succeeds(pod(machine, *arguments))
  assert machine.calls() == expected


@pytest.mark.parametrize('flag', ['--internal-ip', '--tunnel-through-iap'])
def test_workers_without_an_external_address_are_reached(machine, flag):
  told = [flag, '--ssh-key-file=a b']
  for action in ('setup', 'logs', 'stop'):
    succeeds(pod(machine, action, *told))
  succeeds(pod(machine, 'run', *told, '--', *TRAINING))
  calls = [call for call in machine.calls() if call[0] == 'gcloud']
  assert [call[4] for call in calls] == ['scp'] + ['ssh'] * 6
  assert all(call[-2:] == told for call in calls)
  machine.forget()
  succeeds(pod(machine, 'delete', *told))
  assert machine.calls() == [gcloud('delete', '--force')]


def test_pod_setup_commands(machine):
  succeeds(pod(machine, 'setup'))
  mkdir, tar, scp, ssh = machine.calls()
  archive = str(machine.root / 'runs/tree.tar.gz')
  assert mkdir == ['mkdir', '-p', str(machine.root / 'runs')]
  assert tar[:3] == ['tar', '-czf', archive]
  assert scp == [
    *(*GCLOUD, 'scp', *PLACE, archive, 'pod-1:actfocus_jax.tar.gz', *ALL)
  ]
  assert ssh[:-1] == everywhere('')[:-1]


def test_pod_takes_its_place_from_the_environment(machine):
  place = {
    'TPU_NAME': 'pod-1',
    'TPU_ZONE': 'us-east5-a',
    'TPU_PROJECT': 'my-project',
  }
  succeeds(machine.run('tpu_pod.sh', 'delete', **place))
  succeeds(machine.run('tpu_pod.sh', 'delete', '--name=other', **place))
  first, second = machine.calls()
  assert first == gcloud('delete', '--force')
  assert second[7] == 'other'


def test_variables_reach_training_on_every_worker(worker):
  succeeds(pod(worker, 'setup'))
  tells = 'echo "$HF_ENDPOINT|$A" >&2\n' + launch_stubs.PYTHON
  launch_stubs.script(worker.home / 'actfocus_jax/.venv/bin/python', tells)
  variables = ('--env=HF_ENDPOINT=http://h', "--env=A=it's b=c")
  result = pod(worker, 'run', *variables, '--', *TRAINING)
  assert (result.returncode, result.stderr) == (0, "http://h|it's b=c\n")
  log = worker.home / 'actfocus_jax/runs/pod/log'
  assert log.read_text().splitlines()[0] == "http://h|it's b=c"


@pytest.mark.parametrize(
  'arguments',
  [
    ('tpu_pod.sh', 'create', *POD, '--type=v6e-16', '--', *AWKWARD),
    ('tpu_pod.sh', 'status', *POD),
    ('tpu_pod.sh', 'setup', *POD),
    (
      *('tpu_pod.sh', 'run', *POD, "--env=A=it's $HOME", '--'),
      *(*TRAINING, *AWKWARD, 'two\nlines'),
    ),
    ('tpu_pod.sh', 'logs', *POD),
    ('tpu_pod.sh', 'stop', *POD),
    ('tpu_pod.sh', 'delete', *POD),
  ],
  ids=lambda arguments: ' '.join(arguments[:2]),
)
def test_dry_run_prints_what_is_run(machine, arguments):
  launch_stubs.assert_dry_run_tells_the_truth(machine, *arguments)


def test_training_flags_reach_every_worker_intact(worker):
  tree = worker.home / 'actfocus_jax'
  launch_stubs.script(tree / '.venv/bin/python', launch_stubs.PYTHON)
  worker.run('tpu_pod.sh', 'setup', *POD)
  worker.forget()
  succeeds(pod(worker, 'run', '--', *TRAINING, *AWKWARD, 'two\nlines'))
  tried, trained = (c for c in worker.calls() if c[0] == 'python')
  flags = [*TRAINING, *AWKWARD, 'two\nlines']
  assert tried == ['python', '-m', 'actfocus_jax.train', '--dry_run', *flags]
  assert trained == [
    *('python', '-m', 'actfocus_jax.train', '--distributed=on', *flags)
  ]


def test_the_life_of_a_pod(worker):
  tree = worker.home / 'actfocus_jax'
  log = tree / 'runs/pod/log'

  result = pod(worker, 'run', '--', *TRAINING)
  assert result.returncode == 127  # Nothing was copied there yet.
  succeeds(pod(worker, 'setup'))
  succeeds(pod(worker, 'run', '--', *TRAINING))
  launch_stubs.wait_until(lambda: 'step 0' in log.read_text())

  for action in (['run', '--', *TRAINING], ['setup']):
    result = pod(worker, *action)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith('error: training runs already on ')

  process = worker.start('tpu_pod.sh', 'logs', *POD)
  try:
    assert process.stdout.readline() == 'step 0\n'
  finally:
    launch_stubs.end(process)

  succeeds(pod(worker, 'stop'))
  assert log.read_text().splitlines() == ['step 0', 'saved']
  assert 'no training runs' in succeeds(pod(worker, 'stop'))
  succeeds(pod(worker, 'run', '--', *TRAINING))
  succeeds(pod(worker, 'stop'))


def test_a_stop_that_takes_too_long_is_told(worker):
  succeeds(pod(worker, 'setup'))
  stubborn = launch_stubs.PYTHON.replace('echo saved; exit 0', 'echo not yet')
  launch_stubs.script(worker.home / 'actfocus_jax/.venv/bin/python', stubborn)
  succeeds(pod(worker, 'run', '--', *TRAINING))
  result = pod(worker, 'stop', STOP_SECONDS='0.2')
  assert result.returncode == 2
  assert '0.2 seconds after SIGTERM' in result.stderr


def test_a_refusal_by_training_reaches_the_caller(worker):
  succeeds(pod(worker, 'setup'))
  log = worker.home / 'actfocus_jax/runs/pod/log'
  result = pod(worker, 'run', '--', *TRAINING, 'refused-alone')
  assert (result.returncode, result.stderr) == (2, 'error: no\n')
  assert not log.exists()  # Nowhere was training started.
  flags = ('run', '--', *TRAINING, 'refused-together')
  result = pod(worker, *flags, START_SECONDS='10')
  assert (result.returncode, result.stderr) == (2, 'error: we\n')
  # Importing jax and joining take many seconds before such a refusal.
  text = (worker.root / 'launch/tpu_worker.sh').read_text()
  assert '${START_SECONDS:-60}' in text


def test_a_worker_starts_at_once_and_is_watched_once(worker):
  """Those beyond the 64 that gcloud reaches at a time wait for both."""

  def run(action):
    script = tree / 'launch/tpu_worker.sh'  # Absolute: not that of `machine`.
    begin = time.monotonic()
    told = worker.run(str(script), action, *TRAINING, START_SECONDS='20')
    return succeeds(told), time.monotonic() - begin

  tree = worker.home / 'actfocus_jax'
  succeeds(pod(worker, 'setup'))
  told, seconds = run('run')
  assert told == '' and seconds < 10
  os.utime(tree / 'runs/pod/pid', (begun := time.time() - 30, begun))
  told, seconds = run('watch')
  assert told.startswith('training runs on ') and seconds < 10
  succeeds(pod(worker, 'stop'))


def test_setup_copies_the_tree_but_no_leavings(worker):
  kept = ('actfocus_jax/run/a.py', 'actfocus_jax/models/a', 'own.py')
  # .venv-tpu and models are where the README puts 700 MB and exports.
  ignored = ('.venv/a', '.venv-tpu/a', 'runs/a', 'models/a')
  left = (*ignored, '.git/a', 'actfocus_jax/__pycache__/a')
  for name in kept + left:
    path = worker.root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('')
  succeeds(pod(worker, 'setup'))
  with tarfile.open(worker.root / 'runs/tree.tar.gz') as archive:
    names = {name.removeprefix('./') for name in archive.getnames()}
  assert {*kept, 'requirements.txt', 'launch/tpu_worker.sh'} <= names
  folders = {name.partition('/')[0] for name in (*ignored, '.git/a')}
  assert not names & {*left, *folders}
  # What is not copied is not committed either.
  rules = (launch_stubs.ROOT / '.gitignore').read_text().split()
  for folder in folders - {'.git'}:
    assert any(fnmatch.fnmatch(f'/{folder}/', rule) for rule in rules)

  tree = worker.home / 'actfocus_jax'
  (worker.root / 'own.py').unlink()
  (tree / 'runs/kept').write_text('')
  succeeds(pod(worker, 'setup'))
  assert not (tree / 'own.py').exists()
  assert (tree / 'runs/kept').exists()
  assert (tree / '.venv/bin/python').exists()


def test_setup_installs_once(worker):
  def installed():
    return [c for c in worker.calls() if 'pip' in c]

  succeeds(pod(worker, 'setup'))
  uv, packages = installed()
  assert uv[1:] == ['-m', 'pip', 'install', '--quiet', '--user', 'uv']
  tree = worker.home / 'actfocus_jax'
  assert packages[-3:] == [
    *('--requirement', str(tree / 'requirements.txt'), 'jax[tpu]')
  ]
  worker.forget()
  succeeds(pod(worker, 'setup'))
  assert installed() == []
  (worker.root / 'requirements.txt').write_text('jax\nflax\n')
  succeeds(pod(worker, 'setup'))
  (again,) = installed()
  assert again[-1] == 'jax[tpu]'


def test_a_failed_installation_is_tried_again(worker):
  broken = launch_stubs.PYTHON + '[[ $* != *requirement* ]] || exit 7'
  worker.stub('python3', broken)
  assert pod(worker, 'setup').returncode == 7
  worker.stub('python3', launch_stubs.PYTHON)
  worker.forget()
  succeeds(pod(worker, 'setup'))
  assert any('jax[tpu]' in call for call in worker.calls())


REFUSED = {
  '': ['action', "''", 'create', 'delete'],
  'launch': ['action', 'launch', 'setup'],
  '--dry-run status': ['action', '--dry-run'],
  'status': ['--name', 'TPU_NAME', "''"],
  'status --name=-a': ['--name', '-a', 'letter'],
  'status --name=A': ['--name', 'A'],
  "status --name='a b'": ['--name', 'a b'],
  'status --name a': ['--name', '--name='],
  'status POD --zone=': ['--zone', 'TPU_ZONE'],
  'status POD --zone=us-east5': ['--zone', 'us-east5'],
  'status POD --project=-p': ['--project', '-p'],
  'status POD --speed=1': ['--speed=1', '--spot'],
  'logs POD --ssh-key-file=': ['--ssh-key-file=', '--internal-ip'],
  'status POD -- --x': ['--x', 'status', 'create and run'],
  'create POD --type=v6e-17': ['--type', 'v6e-17', '64, 128'],
  'create POD --type=v5p-12': ['--type', 'v5p-12', 'multiple of 8'],
  'create POD': ['--type', 'TPU_TYPE', 'v5litepod-N'],
  'create POD --type=v5e-16': ['--type', 'v5e-16', 'v5litepod-N'],
  'create POD --type=v4-8 --node-count=0': ['--node-count', '0'],
  'create POD --type=- --runtime-version=v': ['--type', "'-'"],
  'logs POD --worker=all': ['--worker', 'all', '0 or more'],
  'logs POD --node=-1': ['--node', '-1'],
  'run POD': ['--config', '--workdir'],
  'run POD --env=A -- --config=c --workdir=/d': ['--env', "'A'", 'KEY=VALUE'],
  'run POD -- --workdir=d': ['--config', 'missing'],
  'run POD -- --config=c': ['--workdir', 'missing'],
  'run POD -- --config=c --workdir=runs/x': ['runs/x', 'gs://BUCKET/RUN'],
  'run POD -- --config=c --workdir=gs://b': ['gs://b', 'gs://BUCKET/RUN'],
  'run POD --config=c --workdir=d': ['--config=c', 'after --'],
}


@pytest.mark.parametrize('command', REFUSED)
def test_refusals(machine, command):
  words = shlex.split(command.replace('POD', shlex.join(POD)))
  assert_refused(machine, machine.run('tpu_pod.sh', *words), *REFUSED[command])


@pytest.mark.parametrize(
  'words',
  [
    ('tpu_pod.sh', 'status', *POD),
    ('gke_xpk.sh', 'list', *PLACE, '--cluster=c'),
    ('gke_xpk.sh', 'logs', *PLACE, '--cluster=c', '--workload=w'),
    ('gke_xpk.sh', 'image', '--docker-image=i'),
    ('gpu.sh', '--', '--config=c', '--workdir=runs/x'),
  ],
  ids=' '.join,
)
def test_a_missing_program_is_named(machine, tmp_path, words):
  bare = tmp_path / 'bare'
  bare.mkdir()
  for program in ('bash', 'dirname'):
    found = next(
      pathlib.Path(d, program)
      for d in ('/usr/bin', '/bin')
      if pathlib.Path(d, program).exists()
    )
    (bare / program).symlink_to(found)
  result = machine.run(*words, PATH=str(bare))
  assert_refused(machine, result, 'not on PATH', '--dry-run')


def test_the_exit_code_of_a_failing_program_is_the_scripts(machine):
  machine.stub('gcloud', 'exit 3')
  assert pod(machine, 'status').returncode == 3
  assert pod(machine, 'run', '--', *TRAINING).returncode == 3
  assert len(machine.calls()) == 2  # Where one is busy, none is started.
  machine.forget()
  assert pod(machine, 'setup').returncode == 3
  assert [call[0] for call in machine.calls()] == ['mkdir', 'tar', 'gcloud']
