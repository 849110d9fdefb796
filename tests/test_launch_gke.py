"""launch/gke_xpk.sh against stub xpk, docker and kubectl."""

import shlex

import launch_stubs
import pytest
from launch_stubs import AWKWARD, TRAINING, assert_refused, succeeds

CLUSTER = ('--cluster=c-1', '--zone=us-east5-a', '--project=my-project')
XPK = ('--cluster=c-1', '--project=my-project', '--zone=us-east5-a')
WORKLOAD = ('--workload=run-1', '--tpu-type=v6e-16')


machine = launch_stubs.machine


def test_gke_image(machine):
  succeeds(machine.run('gke_xpk.sh', 'image', '--docker-image=gcr.io/p/i:1'))
  assert machine.calls() == [
    [
      *('docker', 'build', f'--file={machine.root}/launch/Containerfile'),
      *('--platform=linux/amd64', '--build-arg=ACCELERATOR=tpu'),
      *('--build-arg=RUN_AS=0', '--tag=gcr.io/p/i:1', str(machine.root)),
    ],
    ['docker', 'push', 'gcr.io/p/i:1'],
  ]


@pytest.mark.parametrize(
  ('options', 'flags', 'distributed'),
  [
    (
      ['--docker-image=gcr.io/p/i:1'],
      ['--num-slices=1', '--docker-image=gcr.io/p/i:1', '--max-restarts=10'],
      '',
    ),
    (
      ['--num-slices=2', '--docker-image=i', '--max-restarts=0'],
      ['--num-slices=2', '--docker-image=i', '--max-restarts=0'],
      '--distributed=on ',
    ),
    (
      ['--base-docker-image=local:tpu', '--script-dir=/'],
      [
        *('--num-slices=1', '--base-docker-image=local:tpu'),
        *('--script-dir=/', '--max-restarts=10'),
      ],
      '',
    ),
  ],
)
def test_gke_create(machine, options, flags, distributed):
  arguments = (*CLUSTER, *WORKLOAD, *options, '--env=A=b c', '--', *TRAINING)
  succeeds(machine.run('gke_xpk.sh', 'create', *arguments))
  assert machine.calls() == [
    [
      *('xpk', 'workload', 'create', *XPK, *WORKLOAD, *flags),
      '--restart-on-exit-codes=1',
      '--termination-grace-period-seconds=300',
      *('--env=PYTHONUNBUFFERED=1', '--env=A=b c'),
      '--command=exec python -m actfocus_jax.train '
      f'{distributed}{" ".join(TRAINING)}',
    ]
  ]


def test_gke_xpk_gets_flags_of_its_own(machine):
  told = ['--spot', '--storage=a b']
  flags = [f'--xpk-flag={flag}' for flag in told]
  create = (*CLUSTER, *WORKLOAD, '--docker-image=i', *flags, '--', *TRAINING)
  succeeds(machine.run('gke_xpk.sh', 'create', *create))
  (call,) = machine.calls()
  assert call[-2:] == told
  unknown = machine.run('gke_xpk.sh', 'list', *CLUSTER, '--xpk-flag=--speed')
  assert unknown.returncode == 2 and 'unrecognized' in unknown.stderr


def test_gke_logs_of_a_zonal_cluster(machine):
  logs = ('gke_xpk.sh', 'logs', *CLUSTER, '--workload=run-1')
  succeeds(machine.run(*logs, '--location=us-east5-a'))
  succeeds(machine.run(*logs, XPK_LOCATION='us-east5-b'))
  assert [call[2] for call in machine.calls()] == [
    f'--context=gke_my-project_us-east5-{zone}_c-1' for zone in 'ab'
  ]


def test_gke_list_logs_and_delete(machine):
  name = '--workload=run-1'
  succeeds(machine.run('gke_xpk.sh', 'list', *CLUSTER))
  succeeds(
    machine.run('gke_xpk.sh', 'logs', *CLUSTER, name, '--slice=1', '--worker=2')
  )
  succeeds(machine.run('gke_xpk.sh', 'delete', *CLUSTER, name))
  jobset = 'jobset.sigs.k8s.io'
  assert machine.calls() == [
    ['xpk', 'workload', 'list', *XPK],
    [
      *('kubectl', 'logs', '--context=gke_my-project_us-east5_c-1'),
      *('--follow', '--tail=100', '--all-containers'),
      f'--selector={jobset}/jobset-name=run-1,{jobset}/job-index=1,'
      'batch.kubernetes.io/job-completion-index=2',
    ],
    ['xpk', 'workload', 'delete', *XPK, name],
  ]


def test_training_flags_and_signals_reach_a_gke_pod(machine):
  awkward = [flag for flag in AWKWARD if '$(' not in flag]
  arguments = (*CLUSTER, *WORKLOAD, '--docker-image=i', '--', *TRAINING)
  succeeds(machine.run('gke_xpk.sh', 'create', *arguments, *awkward, "it's"))
  (call,) = machine.calls()
  command = call[-1].removeprefix('--command=')
  machine.stub('python', launch_stubs.PYTHON)
  machine.forget()
  # xpk puts the command into a subshell and passes SIGTERM on to that.
  pod_script = machine.root / 'launch/pod.sh'
  pod_script.write_text(
    f"trap 'kill -TERM $!' TERM\n({command}) & PID=$!\n"
    'while kill -0 $PID 2>/dev/null; do sleep 0.05; done\nwait $PID\n'
  )
  process = machine.start('pod.sh')
  try:
    assert process.stdout.readline() == 'step 0\n'
    process.terminate()
    out, err = process.communicate(timeout=10)
  finally:
    launch_stubs.end(process)
  assert (process.returncode, out) == (0, 'saved\n'), err
  assert machine.calls()[0] == [
    *('python', '-m', 'actfocus_jax.train', *TRAINING, *awkward, "it's")
  ]


@pytest.mark.parametrize(
  'arguments',
  [
    ('gke_xpk.sh', 'image', '--docker-image=gcr.io/p/i:1'),
    (
      *('gke_xpk.sh', 'create', *CLUSTER, *WORKLOAD, '--docker-image=i'),
      *('--env=A=b c', '--num-slices=2', '--', *TRAINING, "it's"),
    ),
    ('gke_xpk.sh', 'list', *CLUSTER),
    ('gke_xpk.sh', 'logs', *CLUSTER, '--workload=run-1'),
    ('gke_xpk.sh', 'delete', *CLUSTER, '--workload=run-1'),
  ],
  ids=lambda arguments: arguments[1],
)
def test_dry_run_prints_what_is_run(machine, arguments):
  launch_stubs.assert_dry_run_tells_the_truth(machine, *arguments)


REFUSED = {
  'run': ['action', 'run', 'create'],
  'list': ['--cluster', 'XPK_CLUSTER'],
  'list CLUSTER --zone=x': ['--zone', 'x'],
  'delete CLUSTER': ['--workload', "''"],
  'delete CLUSTER --workload=-': ['--workload', '-'],
  'list CLUSTER -- a': ['list', 'create'],
  'logs CLUSTER --workload=w --slice=x': ['--slice', 'x'],
  'logs CLUSTER --workload=w --location=x': ['--location', "'x'", 'region'],
  'list CLUSTER --xpk-flag=spot': ['--xpk-flag=spot', '--xpk-flag=--FLAG'],
  'image': ['--docker-image', "''"],
  'create NEW': ['--docker-image', '--base-docker-image'],
  'create NEW --docker-image=i --base-docker-image=b': ['image'],
  'create NEW --base-docker-image=b --script-dir=/none': ['/none'],
  'create CLUSTER --workload=w --tpu-type=v5e-16 -- --config=c': [
    '--tpu-type',
    'v5e-16',
    'v5litepod-16',
  ],
  'create CLUSTER --workload=w --tpu-type=v5litepod-9 -- --config=c': [
    '--tpu-type',
    'v5litepod-9',
  ],
  'create CLUSTER --workload=w --tpu-type=v6e-16 -- --config=c '
  '--workdir=runs/x': ['--workdir', 'runs/x', 'gs://BUCKET/RUN'],
  'create NEW --num-slices=0': ['--num-slices', '0'],
  'create NEW --max-restarts=x': ['--max-restarts', 'x'],
  'create NEW --env=A': ['--env', "'A'", 'KEY=VALUE'],
  "create CLUSTER --workload=w --tpu-type=v6e-8 -- --config='$(a)' "
  '--workdir=/d': ['$(a)', '$('],
}


@pytest.mark.parametrize('command', REFUSED)
def test_refusals(machine, command):
  words = shlex.split(
    command.replace('NEW', f'CLUSTER {shlex.join(WORKLOAD)}').replace(
      'CLUSTER', shlex.join(CLUSTER)
    )
  )
  if 'NEW' in command:
    words += ['--', *TRAINING]
  assert_refused(machine, machine.run('gke_xpk.sh', *words), *REFUSED[command])


def test_the_exit_code_of_a_failing_program_is_the_scripts(machine):
  machine.stub('xpk', 'exit 4')
  assert machine.run('gke_xpk.sh', 'list', *CLUSTER).returncode == 4
  machine.stub('docker', 'exit 5')
  machine.forget()
  result = machine.run('gke_xpk.sh', 'image', '--docker-image=i')
  assert result.returncode == 5
  assert len(machine.calls()) == 1
