"""launch/environment.sh: what it installs, once, and how it explains itself."""

import launch_stubs
from launch_stubs import assert_refused, succeeds

machine = launch_stubs.machine


PYTHON_THAT_INSTALLS = """
case "$*" in
  *sys.version*) echo 3.12 ;;
  *"-m venv"*)
    mkdir -p "${@: -1}/bin"
    cp "$0" "${@: -1}/bin/python" 2>/dev/null || true
    ;;
esac
"""


def test_an_environment_keeps_its_accelerator(machine):
  def installs(**environment):
    machine.forget()
    succeeds(machine.run('environment.sh', **environment))
    return [call[-1] for call in machine.calls() if 'pip' in call]

  machine.stub('python3', PYTHON_THAT_INSTALLS)
  requirements = str(machine.root / 'requirements.txt')
  assert installs() == [requirements]
  assert installs() == []
  told = succeeds(machine.run('environment.sh'))
  assert told.splitlines()[-1] == '.venv has JAX for cpu'
  assert installs(ACCELERATOR='cuda12') == ['jax[cuda12]']
  assert installs() == []
  assert installs(ACCELERATOR='cpu') == [requirements]
  machine.forget()
  result = machine.run('environment.sh', ACCELERATOR='gpu')
  assert_refused(machine, result, 'ACCELERATOR', "'gpu'", 'cuda12')


def test_an_environment_takes_no_arguments(machine):
  told = succeeds(machine.run('environment.sh', '--help'))
  assert 'ACCELERATOR=cuda12 bash launch/environment.sh' in told
  result = machine.run('environment.sh', '--accelerator=cuda12')
  assert_refused(machine, result, '--accelerator=cuda12', 'ACCELERATOR')
