"""Scenarios of test_pair.py, played by one of two processes in turn.

PROCESS FOLDER [--coordinator=... ...]: FOLDER holds the warm starts, a run and
`hosts`, a directory for each machine's own disk. A process leaves its results
in FOLDER/seen/NAME-INDEX.json.
"""

import contextlib
import json
import os
import pathlib
import signal
import sys
import time

import small_run
from absl import flags

from actfocus_jax import errors, loop
from actfocus_jax.cli import cluster
from actfocus_jax.envs import frozen_lake
from actfocus_jax.parallel import processes
from actfocus_jax.run import directory, interrupt, locks, metrics

DEVICES = 4


def config(folder, **changes):
  """Config of a run of few steps, shared by the scenarios: it compiles once."""
  few = {
    'checkpoint__every': 1,
    'warm_start__episodes': 64,
    'warm_start__steps': 40,
  }
  few |= {'mesh__fsdp': 2, 'num_steps': 1}
  return small_run.config(folder / 'warm_starts', **few | changes)


class Pair:
  """The scenarios, in the order of `main`."""

  def __init__(self, folder: pathlib.Path):
    self.folder, self.index = folder, processes.index()

  def write(self, name: str, content):
    """Leave a result for the test."""
    file = self.folder / 'seen' / f'{name}-{self.index}.json'
    file.write_text(json.dumps(content, default=float))

  def write_refusal(self, name: str, call):
    try:
      call()
    except errors.UsageError as refusal:
      self.write(name, str(refusal))

  @contextlib.contextmanager
  def rows(self, on_row=lambda row: None):
    """Collect the rows of this process, which only process 0 writes."""
    rows, append = [], metrics.MetricsFile.append

    def appending(file, row):
      rows.append(row)
      on_row(row)
      append(file, row)

    metrics.MetricsFile.append = appending
    yield rows
    metrics.MetricsFile.append = append

  def resumes(self):
    """A second step after the first, which one process made."""
    with self.rows() as rows:
      loop.train(config(self.folder, num_steps=2), self.folder / 'run')
    steps = [row['step'] for row in rows if 'actor/loss' in row]
    self.write('resumes', steps)

  def breaks(self):
    """In process 1 one call of an environment raises and one hangs."""
    calls, step = [], frozen_lake.FrozenLake.step

    def faulty(env, state, action):
      calls.append(action)
      if self.index == 1 and len(calls) == 2:
        raise OSError('the lake is gone')
      if self.index == 1 and len(calls) == 5:
        time.sleep(30.0)
      return step(env, state, action)

    c = config(self.folder, env__threads=1, env__time_limit=1.0)
    frozen_lake.FrozenLake.step = faulty
    with self.rows() as rows:
      loop.train(c, self.folder / 'breaks')
    frozen_lake.FrozenLake.step = step
    self.write('breaks', rows)

  def is_refused(self):
    """Each host has files of its own; the directory of a run is locked."""
    place = pathlib.Path.cwd()
    os.chdir(self.folder / 'hosts' / str(self.index))
    directory._SEEN_WITHIN = 1.0
    other = config(self.folder, model__path='other')
    same = config(self.folder, model__path='same')
    run, here = self.folder / 'run', pathlib.Path('run')
    never, mine = self.folder / 'never', pathlib.Path('mine')
    for name, call in {
      'other_model': lambda: loop.train(other, never),
      'evaluate_other': lambda: loop.evaluate(other, None, None),
      'not_shared': lambda: loop.train(same, mine),
      'evaluate_not_shared': lambda: loop.evaluate(
        config(self.folder), here, None
      ),
    }.items():
      self.write_refusal(name, call)
    more = config(self.folder, num_steps=2)
    lock = contextlib.nullcontext()
    if self.index == 0:
      lock = locks.lock_file(run / '.lock')
    with lock:
      self.write_refusal('locked', lambda: loop.train(more, run))
    os.chdir(place)

  def is_stopped(self):
    """SIGTERM to process 1 in the first evaluation."""

    def on_row(row):
      if self.index == 1:
        os.kill(os.getpid(), signal.SIGTERM)

    with interrupt.Interrupt() as stop, self.rows(on_row):
      loop.train(config(self.folder), self.folder / 'stopped')
    self.write('stopped', stop.code)

  def spans(self):
    """The one row shard is spread over the devices of both processes."""
    c = config(self.folder, mesh__data=1, mesh__fsdp=1, mesh__tensor=4)
    with self.rows() as rows:
      loop.train(c, self.folder / 'spans')
    self.write('spans', rows)

  def fails(self):
    """The disk of process 0 is full after the second step; the last one."""

    def on_row(row):
      if self.index == 0 and row['step'] == 2:
        self.write('fails', time.time())
        raise OSError(28, 'No space left on device')

    with self.rows(on_row):
      loop.train(config(self.folder, num_steps=3), self.folder / 'fails')


def main():
  """Join the other process and play all scenarios."""
  folder = pathlib.Path(sys.argv[1])
  flags.FLAGS([sys.argv[0], *sys.argv[2:]])
  with cluster.joined():
    pair = Pair(folder)
    for scenario in (
      pair.resumes,
      pair.breaks,
      pair.is_refused,
      pair.is_stopped,
      pair.spans,
      pair.fails,
    ):
      begin = time.monotonic()
      scenario()
      print(f'{scenario.__name__} took {time.monotonic() - begin:.1f} s')


if __name__ == '__main__':
  main()
