"""The flags by which a command becomes one of several processes."""

import socket

import pytest
from absl.testing import flagsaver
from parallel import test_processes

from actfocus_jax import errors
from actfocus_jax.cli import cluster


@pytest.fixture(autouse=True)
def parsed():
  flags = cluster.flags.FLAGS
  if not flags.is_parsed():
    flags.mark_as_parsed()
  with flagsaver.flagsaver():
    yield


@pytest.fixture
def open_mpi_5(monkeypatch):
  for name, value in test_processes.OPEN_MPI_5.items():
    monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
  ('given', 'told'),
  [
    ({'num_processes': 2}, 'missing: --coordinator, --process_id; '),
    ({'coordinator': 'a:1'}, 'missing: --num_processes, --process_id; '),
    ({'coordinator': 'a:0', 'num_processes': 1, 'process_id': 0}, 'HOST:PORT'),
    ({'coordinator': 'a:1', 'num_processes': 0, 'process_id': 0}, '1 or more'),
    ({'coordinator': 'a:1', 'num_processes': 2, 'process_id': 2}, '0 to 1, '),
  ],
)
def test_the_three_flags_go_together(given, told):
  cluster.check()
  with (
    flagsaver.flagsaver(**given),
    pytest.raises(errors.UsageError, match=told),
  ):
    cluster.check()


def test_open_mpi_5_needs_only_the_coordinator(open_mpi_5):
  with pytest.raises(errors.UsageError, match='^missing: --coordinator; Open'):
    cluster.check()
  with flagsaver.flagsaver(coordinator='n1:1234'):
    cluster.check()
    given = {'coordinator': 'n1:1234', 'num_processes': 4, 'process_id': 3}
    assert cluster._given() == given
  with flagsaver.flagsaver(distributed='off'):
    cluster.check()


def test_a_port_that_is_taken_is_refused_by_process_0():
  with socket.create_server(('', 0)) as made:
    port = made.getsockname()[1]
    who = {'coordinator': f'localhost:{port}', 'num_processes': 2}
    with flagsaver.flagsaver(**who, process_id=1):
      cluster.check()
    with (
      flagsaver.flagsaver(**who, process_id=0),
      pytest.raises(errors.UsageError, match='whose port is taken'),
    ):
      cluster.check()
  with flagsaver.flagsaver(**who, process_id=0):
    cluster.check()
