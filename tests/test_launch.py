"""The scripts of launch/, with stubs of the programs that need a cloud."""

import contextlib
import importlib.util
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPTS = [f'launch/{path.name}' for path in (ROOT / 'launch').glob('*.sh')]
FLAGS = '--config=c --workdir=gs://b/r'
TRAINING = shlex.split(FLAGS)
# Arguments that `"$*"` or a forgotten quote would change.
AWKWARD = (
  '--config.note=it\'s a "quoted" $HOME `id` $(id) * & ; | < > # ! \\ é',
  '--config.mixture=a=1,b=2;c:3',
  '--config.empty=',
  '',
  'two\nlines',
)
PLACE = '--name=pod-1 --zone=us-east5-a --project=my-project'
POD = shlex.split(PLACE)
JOB = {
  'SLURM_JOB_ID': '41',
  'SLURM_NTASKS': '16',
  'SLURM_NTASKS_PER_NODE': '8',
  'SLURM_GPUS_ON_NODE': '8',
  'SLURM_CPUS_PER_TASK': '8',
}
# A stub writes its arguments to a file, then runs what a test gave it to run.
STUB = """#!/bin/bash
number=$(ls "$CALLS" | wc -l)
printf '%s\\0' "${{0##*/}}" "$@" >"$CALLS/$(printf %03d "$number")"
{}
"""
SAVES = (
  'trap "echo saved; exit 0" TERM; echo step; while :; do sleep 0.05; done'
)
# Makes environments, and trains until SIGTERM.
PYTHON = f"""
case "$*" in
  *version_info*) exit 0 ;;
  *sys.version*) echo 3.12 ;;
  *"uv python find"*) echo "$0" ;;
  *"-m venv"*) b="${{@: -1}}/bin"; mkdir -p "$b"; cp "$0" "$b/python" || : ;;
  *.train\\ --dry_run*alone*) echo "error: no" >&2; exit 2 ;;
  *.train\\ --dry_run*) ;;
  *.train\\ *together*) sleep 0.2; echo "error: we"; exit 2 ;;
  *.train\\ *) {SAVES} ;;
esac
"""
# Runs the command of ssh, and scp's copy, in the home directory.
GCLOUD_OF_ONE_WORKER = """
for word in "$@"; do
  case $word in --command=*) cd "$HOME" && exec bash -c "${word#*=}" ;; esac
done
[ "$4" != scp ] || cp "$7" "$HOME/${8#*:}"
"""


class Machine:
  """A home directory, a copy of launch/, and stubs on PATH."""

  def __init__(self, directory: pathlib.Path):
    self.home, self.root = directory / 'home', directory / 'my project'
    self._bin, self._calls = directory / 'bin', directory / 'calls'
    for made in (self.home, self._bin, self._calls, self.root / '.venv'):
      made.mkdir(parents=True)
    shutil.copytree(ROOT / 'launch', self.root / 'launch')
    # Slurm runs a copy of the script in a directory of its own.
    self.job = shutil.copy(ROOT / 'launch/slurm.sh', directory / 'slurm_script')
    (self.root / 'requirements.txt').write_text('jax\n')
    (self.root / '.venv/.accelerator').write_text('cuda12\n')
    self.environment = {
      'PATH': f'{self._bin}:{os.environ["PATH"]}',
      'HOME': str(self.home),
      'CALLS': str(self._calls),
      'START_SECONDS': '1',
      'SLURM_SUBMIT_DIR': str(self.root),
    }
    for program in ('gcloud', 'srun', 'scontrol', 'docker', 'podman'):
      self.stub(program)
    for program in ('mkdir', 'tar'):
      self.stub(program, f'exec {shutil.which(program)} "$@"')

  def stub(self, program: str, body: str = ''):
    (self._bin / program).write_text(STUB.format(body))
    (self._bin / program).chmod(0o755)

  def calls(self) -> list[list[str]]:
    """Return the commands that were run since the last time, in order."""
    paths = sorted(self._calls.iterdir())
    calls = [path.read_text().split('\0')[:-1] for path in paths]
    for path in paths:
      path.unlink()
    return calls

  @contextlib.contextmanager
  def start(self, script: str, *arguments: str, **environment: str):
    process = subprocess.Popen(
      ['bash', str(self.root / 'launch' / script), *arguments],
      cwd=self.root,
      env={**self.environment, **environment},
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      start_new_session=True,
    )
    try:
      yield process
    finally:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
      process.communicate(timeout=10)

  def run(self, *arguments: str, **environment: str):
    """Return exit code, output and errors."""
    with self.start(*arguments, **environment) as process:
      out, err = process.communicate(timeout=30)
    return process.returncode, out, err

  def succeeds(self, *arguments: str, **environment: str) -> str:
    status, out, err = self.run(*arguments, **environment)
    assert status == 0, err
    return out

  def refuses(self, words: str, *arguments: str, **environment: str):
    """Exit code 2, one sentence that holds the words, and no command."""
    status, out, err = self.run(*arguments, **environment)
    assert (status, out, err.count('\n')) == (2, '', 1), err
    assert err.startswith('error: ')
    assert [word for word in words.split() if word not in err] == [], err
    assert self.calls() == []


@pytest.fixture
def machine(tmp_path):
  return Machine(tmp_path)


@pytest.fixture
def worker(machine):
  """The machine, which is also its own only TPU worker."""
  machine.stub('gcloud', GCLOUD_OF_ONE_WORKER)
  machine.stub('python3', PYTHON)
  yield machine
  pid = machine.home / 'actfocus_jax/runs/pod/pid'
  if pid.exists():
    with contextlib.suppress(ProcessLookupError):
      os.kill(int(pid.read_text()), signal.SIGKILL)


def commands(text: str) -> list[list[str]]:
  """Split printed commands as a shell would; an argument may hold newlines."""
  found, start = [], 0
  for end in (match.start() for match in re.finditer('\n', text)):
    with contextlib.suppress(ValueError):  # The newline is inside quotes.
      found.append(shlex.split(text[start:end]))
      start = end + 1
  return found


def test_scripts_pass_bash_and_shellcheck():
  for script in SCRIPTS:
    subprocess.run(['bash', '-n', ROOT / script], check=True)
  path = f'{pathlib.Path(sys.executable).parent}:{os.environ["PATH"]}'
  program = shutil.which('shellcheck', path=path)
  if program is None:
    pytest.skip('shellcheck is not installed')
  command = [program, '-x', *SCRIPTS, '.ci/run']
  subprocess.run(command, cwd=ROOT, check=True)


@pytest.mark.parametrize(
  'name', ['environment', 'gpu', 'slurm', 'tpu_pod', 'tpu_worker']
)
def test_help_prints_the_head_of_the_script(machine, name):
  texts = {machine.succeeds(f'{name}.sh', x) for x in ('--help', '-h', 'help')}
  (text,) = texts
  assert f'launch/{name}.sh' in text
  assert 'set -e' not in text and '#SBATCH' not in text


# After each $ a command line, then the commands that it runs.
RUNS = r"""
$ tpu_pod.sh create PLACE --type=v5p-8
GCLOUD create SITE pod-1 --accelerator-type=v5p-8 \
  --runtime-version=v2-alpha-tpuv5 --node-id=pod-1
$ tpu_pod.sh create PLACE --type=v6e-16 --node-count=2 --spot -- '--labels=a b'
GCLOUD create SITE pod-1 --accelerator-type=v6e-16 \
  --runtime-version=v2-alpha-tpuv6e --node-count=2 --node-prefix=pod-1 --spot \
  '--labels=a b'
$ tpu_pod.sh status PLACE
GCLOUD describe SITE pod-1 '--format=value(state.state)'
$ tpu_pod.sh run PLACE --env="A=it's" -- FLAGS
GCLOUD ssh SITE pod-1 --command="env 'A=it'\\''s' WORKER ready FLAGS" ALL
GCLOUD ssh SITE pod-1 --command="env 'A=it'\\''s' WORKER run FLAGS" ALL
GCLOUD ssh SITE pod-1 --command="env 'A=it'\\''s' WORKER watch" ALL
$ tpu_pod.sh logs PLACE --worker=3 --node=1 --internal-ip
GCLOUD ssh SITE pod-1 --node=1 --worker=3 --command='WORKER logs' --internal-ip
$ tpu_pod.sh stop PLACE --tunnel-through-iap
GCLOUD ssh SITE pod-1 --command='WORKER stop' ALL --tunnel-through-iap
$ tpu_pod.sh delete PLACE
GCLOUD delete SITE pod-1 --force
$ gpu.sh -- FLAGS
mkdir -p ROOT/runs HOME/.cache/huggingface
docker BUILD=cuda12 --tag=actfocus_jax:cuda12 ROOT
docker RUN --gpus=all actfocus_jax:cuda12 FLAGS
$ gpu.sh --gpus=0,1 --mount=/usr --env='A=b c' -- FLAGS
mkdir -p ROOT/runs HOME/.cache/huggingface
docker BUILD=cuda12 --tag=actfocus_jax:cuda12 ROOT
docker RUN --volume=/usr:/usr:ro '--env=A=b c' --gpus='"device=0,1"' \
  actfocus_jax:cuda12 FLAGS
$ gpu.sh --engine=podman --gpus=0,3 --accelerator=cuda13 -- FLAGS
mkdir -p ROOT/runs HOME/.cache/huggingface
podman BUILD=cuda13 --tag=actfocus_jax:cuda13 ROOT
podman RUN --userns=keep-id --security-opt=label=disable \
  --device=nvidia.com/gpu=0 --device=nvidia.com/gpu=3 actfocus_jax:cuda13 FLAGS
$ slurm.sh FLAGS
srun --kill-on-bad-exit=0 --wait=600 --gpu-bind=none --cpus-per-task=8 \
  .venv/bin/python -m actfocus_jax.train FLAGS
"""
for short, long in {
  '\\\n': '',
  'GCLOUD': 'gcloud compute tpus queued-resources',
  'SITE': '--project=my-project --zone=us-east5-a',
  'PLACE': PLACE,
  'WORKER': 'bash actfocus_jax/launch/tpu_worker.sh',
  'ALL': '--node=all --worker=all --batch-size=all',
  'BUILD': 'build --file=ROOT/launch/Containerfile --build-arg=ACCELERATOR',
  'RUN': 'run --rm --init --stop-timeout=300 --shm-size=8g --user=USER '
  '--volume=ROOT/runs:/app/runs '
  '--volume=HOME/.cache/huggingface:/cache/huggingface',
  'FLAGS': FLAGS,
}.items():
  RUNS = RUNS.replace(short, long)
RUNS = dict(block.split('\n', 1) for block in RUNS.split('\n$ ')[1:])


@pytest.mark.parametrize('line', RUNS)
def test_dry_run_prints_the_commands_that_are_run(machine, line):
  name, *words = shlex.split(line)
  script = machine.job if name == 'slurm.sh' else name
  at = 1 if name == 'tpu_pod.sh' else 0
  dry = [*words[:at], '--dry-run', *words[at:]]
  printed = commands(machine.succeeds(name, *dry))
  expected = commands(RUNS[line].rstrip() + '\n')
  for old, new in {
    'ROOT': str(machine.root),
    'HOME': str(machine.home),
    'USER': f'{os.getuid()}:{os.getgid()}',
  }.items():
    expected = [[word.replace(old, new) for word in x] for x in expected]
  assert printed == expected

  awkward = AWKWARD if FLAGS in line else ()
  printed = commands(machine.succeeds(name, *dry, *awkward))
  assert machine.calls() == []
  machine.succeeds(script, *words, *awkward, **JOB)
  assert machine.calls() == printed


REFUSED = """
tpu_pod.sh | action '' create delete
tpu_pod.sh status | --name TPU_NAME ''
tpu_pod.sh status --name=A | --name 'A' letter
tpu_pod.sh status PLACE --zone=us-east5 | --zone 'us-east5' TPU_ZONE
tpu_pod.sh status PLACE --speed=1 | --speed=1 --spot
tpu_pod.sh status PLACE -- --x | --x status create
tpu_pod.sh create PLACE | --type TPU_TYPE v5litepod-N
tpu_pod.sh create PLACE --type=v6e-17 | --type v6e-17 128
tpu_pod.sh create PLACE --type=v5p-12 | --type v5p-12 multiple
tpu_pod.sh create PLACE --type=v4-8 --node-count=0 | --node-count '0'
tpu_pod.sh logs PLACE --worker=all | --worker 'all'
tpu_pod.sh run PLACE --env=A -- FLAGS | --env 'A' KEY=VALUE
tpu_pod.sh run PLACE -- --workdir=d | --config missing
tpu_pod.sh run PLACE -- FLAGS --workdir=runs/x | runs/x gs://BUCKET/RUN
tpu_pod.sh run PLACE --config=c | --config=c after
tpu_worker.sh go | action 'go' setup
gpu.sh -- FLAGS --workdir=/tmp/x | --workdir '/tmp/x' runs/RUN
gpu.sh -- FLAGS --workdir=runs/../x | 'runs/../x' without
gpu.sh --mount=/u -- FLAGS | --mount '/u' absolute
gpu.sh --mount=/usr -- FLAGS --config.model.path=/usrx | '/usrx' --mount
gpu.sh --gpus=-1 -- FLAGS | --gpus '-1' all
slurm.sh --dry-run | --config missing
slurm.sh FLAGS | Slurm sbatch
environment.sh --accelerator=tpu | --accelerator=tpu ACCELERATOR
"""


@pytest.mark.parametrize('line', REFUSED.strip().split('\n'))
def test_wrong_arguments_are_refused(machine, line):
  line, _, words = line.partition(' | ')
  line = line.replace('PLACE', PLACE).replace('FLAGS', FLAGS)
  machine.refuses(words, *shlex.split(line))


def test_wrong_surroundings_are_refused(machine):
  def job(words, *flags, **environment):
    machine.refuses(words, machine.job, *TRAINING, *flags, **JOB | environment)

  job(f'sbatch {machine.home}', SLURM_SUBMIT_DIR=str(machine.home))
  job("'s3://b/x' gs://BUCKET/RUN", '--workdir=s3://b/x')
  job("RESTARTS 'many'", RESTARTS='many')
  job("--ntasks-per-node '3' 8", SLURM_NTASKS_PER_NODE='3')
  (machine.root / '.venv/.accelerator').write_text('cpu\n')
  job(".accelerator 'cpu' ACCELERATOR=cuda12")
  machine.refuses("ACCELERATOR 'gpu'", 'environment.sh', ACCELERATOR='gpu')
  machine.refuses("PYTHON 'false' 3.11", 'environment.sh', PYTHON='false')
  machine.refuses("PYTHON 'no' 3.11", 'environment.sh', PYTHON='no')
  key = {'GOOGLE_APPLICATION_CREDENTIALS': 'key'}
  machine.refuses(f"{[*key][0]} 'key'", 'gpu.sh', '--', *TRAINING, **key)
  # A PATH without the programs of a cloud.
  (machine.home / 'bin').mkdir()
  for program in ('bash', 'dirname', 'id'):
    (machine.home / 'bin' / program).symlink_to(shutil.which(program))
  for words in (('tpu_pod.sh', 'status', *POD), ('gpu.sh', '--', *TRAINING)):
    machine.refuses('PATH --dry-run', *words, PATH=f'{machine.home}/bin')


def test_a_failing_command_ends_the_script_with_its_exit_code(machine):
  machine.stub('gcloud', 'exit 3')
  machine.stub('docker', 'exit 9')
  assert machine.run('tpu_pod.sh', 'run', *POD, '--', *TRAINING)[0] == 3
  assert machine.run('gpu.sh', '--', *TRAINING)[0] == 9
  assert [x[0] for x in machine.calls()] == ['gcloud', 'mkdir', 'docker']


def test_environment_unchanged_installs_nothing(machine):
  def installed(**environment):
    machine.succeeds('environment.sh', **environment)
    return [call[-1] for call in machine.calls() if 'pip' in call]

  machine.stub('python3', PYTHON)
  requirements = machine.root / 'requirements.txt'
  assert installed() == [str(requirements)]
  assert installed() == []
  assert installed(ACCELERATOR='cuda12') == ['jax[cuda12]']
  assert installed() == []
  assert installed(ACCELERATOR='cpu') == [str(requirements)]
  requirements.write_text('jax\nflax\n')
  assert installed() == [str(requirements)]


def test_pod_setup_copies_the_tree_and_installs_once(worker):
  kept = {'actfocus_jax/a.py', 'actfocus_jax/models/a', 'own.py'}
  left = {'.venv-tpu/a', 'runs/a', 'models/a', '.git/a', 'b/__pycache__/a'}
  for name in kept | left:
    path = worker.root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('')
  worker.succeeds('tpu_pod.sh', 'setup', *POD)
  assert [x[-1] for x in worker.calls() if 'pip' in x] == ['uv', 'jax[tpu]']
  with tarfile.open(worker.root / 'runs/tree.tar.gz') as archive:
    names = {name.removeprefix('./') for name in archive.getnames()}
  assert kept | {'requirements.txt', 'launch/tpu_worker.sh'} <= names
  assert not names & (left | {'.venv', '.venv-tpu', 'runs', 'models', '.git'})

  tree = worker.home / 'actfocus_jax'
  (worker.root / 'own.py').unlink()
  (tree / 'runs/kept').write_text('')
  worker.succeeds('tpu_pod.sh', 'setup', *POD)
  assert not [call for call in worker.calls() if 'pip' in call]
  assert not (tree / 'own.py').exists()
  assert (tree / 'runs/kept').exists()


def test_pod_runs_stops_and_runs_again(worker):
  run = ('tpu_pod.sh', 'run', *POD, '--', *TRAINING, *AWKWARD)
  setup, stop = ('tpu_pod.sh', 'setup', *POD), ('tpu_pod.sh', 'stop', *POD)
  assert worker.run(*run)[0] == 127  # Nothing was copied there yet.
  worker.succeeds(*setup)
  worker.calls()
  assert worker.succeeds(*run).startswith('training runs on ')
  train = ['python', '-m', 'actfocus_jax.train']
  assert [call for call in worker.calls() if call[0] == 'python'] == [
    [*train, '--dry_run', *TRAINING, *AWKWARD],
    [*train, '--distributed=on', *TRAINING, *AWKWARD],
  ]
  for words in (run, setup):
    status, _, err = worker.run(*words)
    assert status == 2
    assert err.startswith('error: training runs already on ')
  with worker.start('tpu_pod.sh', 'logs', *POD) as process:
    assert process.stdout.readline() == 'step\n'
  worker.succeeds(*stop)
  log = worker.home / 'actfocus_jax/runs/pod/log'
  assert log.read_text().splitlines() == ['step', 'saved']
  assert 'no training runs' in worker.succeeds(*stop)
  worker.succeeds(*run)
  worker.succeeds(*stop)


def test_pod_refusal_by_training_is_that_of_the_script(worker):
  worker.succeeds('tpu_pod.sh', 'setup', *POD)
  run = ('tpu_pod.sh', 'run', *POD, '--', *TRAINING)
  assert worker.run(*run, 'alone') == (2, '', 'error: no\n')
  assert not (worker.home / 'actfocus_jax/runs/pod/log').exists()
  status, _, err = worker.run(*run, 'together', START_SECONDS='10')
  assert (status, err) == (2, 'error: we\n')


@pytest.mark.parametrize(
  ('script', 'name', 'requeued'),
  [
    ('slurm', 'SIGUSR1', True),
    ('slurm', 'SIGTERM', False),
    ('gpu', 'SIGTERM', False),
  ],
)
def test_signal_saves_and_the_end_of_time_requeues(
  machine, script, name, requeued
):
  machine.stub('srun', SAVES)
  machine.stub('docker', f'[ "$1" = run ] || exit 0\n{SAVES}')
  command = [machine.job] if script == 'slurm' else ['gpu.sh', '--']
  with machine.start(*command, *TRAINING, **JOB) as process:
    assert process.stdout.readline() == 'step\n'
    process.send_signal(getattr(signal, name))
    assert process.communicate(timeout=10) == ('saved\n', '')
  assert process.returncode == 0
  assert (['scontrol', 'requeue', '41'] in machine.calls()) == requeued


def test_slurm_requeues_after_a_death_but_not_after_a_refusal(machine):
  for status, environment, requeues in [
    (0, {}, False),
    (1, {}, True),
    (137, {'SLURM_RESTART_COUNT': '2'}, True),
    (1, {'SLURM_RESTART_COUNT': '3'}, False),
    (1, {'RESTARTS': '0'}, False),
    (2, {}, False),
    (143, {}, False),
  ]:
    machine.stub('srun', f'exit {status}')
    assert (
      machine.run(machine.job, *TRAINING, **JOB, **environment)[0] == status
    )
    assert (['scontrol', 'requeue', '41'] in machine.calls()) == requeues


def test_gpu_passes_credentials_on_and_prints_no_secret(machine):
  def passed(**environment):
    dry_run = ('gpu.sh', '--dry-run', '--', *TRAINING)
    text = machine.succeeds(*dry_run, **environment, HF_TOKEN='secret')
    assert 'secret' not in text
    return [x for x in commands(text)[-1] if 'google' in x or '--env=' in x]

  assert passed(HF_ENDPOINT='') == ['--env=HF_TOKEN']
  variable = 'GOOGLE_APPLICATION_CREDENTIALS'
  default = machine.home / '.config/gcloud/application_default_credentials.json'
  default.parent.mkdir(parents=True)
  for key, environment in (
    (default, {}),
    (machine.home / 'key', {variable: str(machine.home / 'key')}),
  ):
    key.write_text('{}')
    assert passed(**environment)[1:] == [
      f'--volume={key}:/cache/google.json:ro',
      f'--env={variable}=/cache/google.json',
    ]


README = (ROOT / 'launch/README.md').read_text().replace('\\\n', ' ')


@pytest.mark.parametrize(
  'line', re.findall(r'^ {4}(.*(?:launch/|--config=configs/).*)$', README, re.M)
)
def test_readme_launch_line_is_accepted(machine, line):
  place = dict(x.split('=') for x in re.findall(r'TPU_\w+=\S+', README))
  words = shlex.split(line.replace('/models/qwen', '/usr'), comments=True)
  script = next((x for x in words if x in SCRIPTS), '')
  name = script.removeprefix('launch/')
  if name in ('gpu.sh', 'slurm.sh', 'tpu_pod.sh'):
    words = words[words.index(script) + 1 :]
    words.insert(name == 'tpu_pod.sh', '--dry-run')
    assert machine.succeeds(name, *words, **place)
  for file, argument in re.findall(r'--config=(configs/\w+\.py):?(\S*)', line):
    spec = importlib.util.spec_from_file_location('config', ROOT / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(argument or None)
    for field, value in re.findall(r'--config\.([\w.]+)=(\d+)', line):
      config.update_from_flattened_dict({field: int(value)})
