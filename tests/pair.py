"""What one of two processes does for test_pair.py, one thing after the other.

PROCESS FOLDER [--coordinator=... ...]: FOLDER holds the warm starts, a run and
the two `hosts`, what each machine has on its own disk. What a process saw is
left in FOLDER/seen/NAME-INDEX.json.
"""

import json
import os
import pathlib
import signal
import sys
import time

import small_run
from absl import flags

from actfocus_jax import build, errors, evaluation, loop
from actfocus_jax.cli import cluster
from actfocus_jax.envs import frozen_lake
from actfocus_jax.parallel import processes
from actfocus_jax.run import directory, interrupt, metrics, shared

DEVICES = 4


def config(folder, **changes):
  """A run of few steps that every scenario plays, so that it compiles once."""
  few = {
    'checkpoint__every': 1,
    'warm_start__episodes': 64,
    'warm_start__steps': 40,
  }
  few |= {'mesh__fsdp': 2, 'num_steps': 1}
  return small_run.config(folder / 'warm_starts', **few | changes)


class Pair:
  """The scenarios, in the order of their names in `main`."""

  def __init__(self, folder: pathlib.Path):
    self.folder, self.me = folder, processes.index()
    self.rows = []
    note = loop.Run.note

    def noting(run, row):
      self.rows.append(row)
      note(run, row)

    loop.Run.note = noting
    # Compiled once for all runs, which differ in nothing there but the mesh.
    self.made, make = [], build.train_step

    def once(*arguments):
      if not self.made:
        self.made.append(make(*arguments))
      return self.made[0]

    build.train_step = once

  def says(self, name: str, what):
    """Leaves what this process saw for the test."""
    seen = self.folder / 'seen' / f'{name}-{self.me}.json'
    seen.write_text(json.dumps(what))

  def refusal(self, name: str, call):
    """Leaves the sentence by which a call is refused."""
    try:
      call()
    except errors.UsageError as refused:
      self.says(name, str(refused))

  def goes_on(self):
    """A second step after the first, which one process made."""
    loop.train(config(self.folder, num_steps=2), self.folder / 'run')
    self.says('goes_on', [row['step'] for row in self.rows])

  def breaks(self):
    """In process 1 one call of an environment raises and one hangs."""
    calls, step, collect = [], frozen_lake.FrozenLake.step, loop.Run.collect

    def faulty(env, state, action):
      calls.append(action)
      if self.me == 1 and len(calls) == 2:
        raise OSError('the lake is gone')
      if self.me == 1 and len(calls) == 5:
        time.sleep(30.0)
      return step(env, state, action)

    def collecting(run):
      frozen_lake.FrozenLake.step = faulty
      try:
        return collect(run)
      finally:
        frozen_lake.FrozenLake.step = step

    loop.Run.collect = collecting
    self.rows.clear()
    c = config(self.folder, env__threads=1, env__time_limit=1.0)
    loop.train(c, self.folder / 'breaks')
    loop.Run.collect = collect
    self.says('breaks', self.rows)

  def is_refused(self):
    """Each host has files of its own; the directory of a run is taken."""
    place = pathlib.Path.cwd()
    os.chdir(self.folder / 'hosts' / str(self.me))
    shared._SEEN_WITHIN = 1.0
    other = config(self.folder, model__path='other')
    same = config(self.folder, model__path='same')
    run, here = self.folder / 'run', pathlib.Path('run')
    train, evaluate = loop.train, evaluation.evaluate_checkpoint
    self.refusal('other_model', lambda: train(other, self.folder / 'never'))
    self.refusal('evaluate_other', lambda: evaluate(other, None, None))
    self.refusal('not_shared', lambda: train(same, pathlib.Path('mine')))
    c = config(self.folder)
    self.refusal('evaluate_not_shared', lambda: evaluate(c, here, None))
    with directory.lock(run / '.lock') if self.me == 0 else open(os.devnull):
      goes_on = config(self.folder, num_steps=2)
      self.refusal('taken', lambda: train(goes_on, run))
    os.chdir(place)

  def is_stopped(self):
    """SIGTERM to process 1 in the first evaluation."""
    play = evaluation.evaluate

    def interrupted(*arguments, **more):
      if self.me == 1:
        os.kill(os.getpid(), signal.SIGTERM)
      return play(*arguments, **more)

    evaluation.evaluate = interrupted
    with interrupt.Interrupt() as stop:
      loop.train(config(self.folder), self.folder / 'stopped')
    evaluation.evaluate = play
    self.says('stopped', stop.code)

  def spans(self):
    """The one row shard is spread over the devices of both processes."""
    self.made.clear()
    self.rows.clear()
    c = config(self.folder, mesh__data=1, mesh__fsdp=1, mesh__tensor=4)
    loop.train(c, self.folder / 'spans')
    self.made.clear()
    self.says('spans', self.rows)

  def fails(self):
    """The disk of process 0 is full after the second step: the last thing."""
    append = metrics.MetricsFile.append

    def full(file, row):
      if self.me == 0 and row['step'] == 2:
        self.says('fails', time.time())
        raise OSError(28, 'No space left on device')
      append(file, row)

    metrics.MetricsFile.append = full
    loop.train(config(self.folder, num_steps=3), self.folder / 'fails')


def main():
  """Joins the other and does everything."""
  folder = pathlib.Path(sys.argv[1])
  flags.FLAGS([sys.argv[0], *sys.argv[2:]])
  with cluster.joined():
    pair = Pair(folder)
    for part in (
      pair.goes_on,
      pair.breaks,
      pair.is_refused,
      pair.is_stopped,
      pair.spans,
      pair.fails,
    ):
      begin = time.monotonic()
      part()
      print(f'{part.__name__} took {time.monotonic() - begin:.1f} s')


if __name__ == '__main__':
  main()
