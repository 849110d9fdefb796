"""The loop: collect episodes, make one step, write down what happened.

Read `train` top to bottom like the algorithm box of arXiv 2605.14558; `Run` has
what each line does, in that order, and `assemble` makes its parts. Everything
that a step draws at random is named by the step's number, so a resumed run
needs no stored generator. Boards are counted: step n takes the next
`rollout.prompts` seeds, so that none repeats and none is left out where the
number of prompts changes; the checkpoint has the next one.
"""

import contextlib
import dataclasses
import math
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
import numpy as np

from actfocus_jax import build, chance, errors, evaluation, recipe
from actfocus_jax.config import schema
from actfocus_jax.learner import self_check
from actfocus_jax.learner import step as step_lib
from actfocus_jax.parallel import mesh as mesh_lib
from actfocus_jax.parallel import processes
from actfocus_jax.report import summary
from actfocus_jax.rollout import collector as collector_lib
from actfocus_jax.rollout import episode
from actfocus_jax.rollout import statistics as statistics_lib
from actfocus_jax.run import (
  compilations,
  directory,
  interrupt,
  progress,
  shared,
)

Row = dict[str, float]


def train(c: ml_collections.ConfigDict, workdir: pathlib.Path) -> pathlib.Path:
  """Trains, or goes on training, in `workdir`.

  Args:
    c: A checked config.
    workdir: The run directory; another config's run has been refused before.

  Returns:
    The report's summary file.

  Raises:
    UsageError: When the config cannot work with this model or machine; the
      workdir is untouched then.
    Stopped: When a signal came during the warm start.
    FloatingPointError: When a metric of a step is not finite.
    RunError: When the first batch fails the self-check, or every environment of
      a step fails. NoLearningSignal, when `selection.patience` steps in a row
      had nothing to learn from; the run is evaluated, saved and reported then.
  """
  compilations.start()
  with contextlib.ExitStack() as stack:
    parts = stack.enter_context(build.parts(c))
    stop = stack.enter_context(interrupt.Interrupt())
    run = stack.enter_context(opened(c, parts, workdir))
    # A signal may have come to one process of several.
    if run.done == 0 and not stop.agreed(processes.first_non_none):
      run.evaluate()
    while not (stopped := stop.agreed(processes.first_non_none)):
      if run.done >= c.num_steps or run.stalled:
        break
      begin = time.perf_counter()
      played = run.collect()
      batch = to_batch(played, c, parts)
      rolled = time.perf_counter()
      run.check_first(batch)
      learned = run.learn(batch)
      run.note(
        to_row(run.done, played, learned)
        | {
          'rollout/padded_length': batch.tokens.shape[1],
          'time/rollout': rolled - begin,
          'compiles': compilations.count(),
        }
      )
      run.evaluate_and_save()
    if stopped and run.done:
      run.save(None)  # A step that is saved stays as it is.
  return _end(run, workdir, stopped)


@contextlib.contextmanager
def opened(
  c: ml_collections.ConfigDict, parts: build.Parts, workdir: pathlib.Path
) -> Iterator['Run']:
  """Makes the learner, and goes on where an earlier run stopped.

  Args:
    c: The config.
    parts: Of the run.
    workdir: The run directory.

  Yields:
    The run; leaving it waits for its last checkpoint.

  Raises:
    UsageError: As of `train`.
  """
  model = parts.model
  described = build.same_model(model)
  learners = recipe.learners(c, model)
  train_step = recipe.train_step(c, learners)
  reference = None
  if schema.has_reference(c):
    reference = model.weights(model.dtype)
  with shared.open_run(workdir, c, described) as files:
    state, next_seed = files.restore(
      learners.abstract(), agreed=processes.broadcast
    )
    if state is None:
      state = learners.create()
    if processes.is_first():
      files.write('baselines.json', chance.level(c, parts.collector))
    # The others wait here for as long as it takes, where every process has
    # been before: the first meeting of some devices has a time limit on GPUs.
    processes.allgather(None)
    with progress.Progress('train', c.num_steps) as display:
      run = Run(
        c, parts, files, display, train_step, reference, state, next_seed
      )
      run.greet()
      yield run


@dataclasses.dataclass
class Run:
  """A run under way: one method for each part of an iteration.

  Attributes:
    c: The config.
    parts: Model, environments and devices.
    files: The run directory.
    display: For people.
    train_step: Compiled stages.
    reference: Parameters of the frozen reference, or None.
    state: What is learned.
    next_seed: Of the first board that no step has seen.
    done: Finished iterations.
    row: The metrics of the latest one; empty before.
    key: Root of all that is drawn.
  """

  c: ml_collections.ConfigDict
  parts: build.Parts
  files: directory.RunDirectory
  display: progress.Progress
  train_step: step_lib.TrainStep
  reference: Any
  state: Any
  next_seed: int

  def __post_init__(self):
    self.done = int(self.state.step)
    self.row: Row = {}
    self.key = jax.random.key(self.c.seed)

  @property
  def stalled(self) -> bool:
    """Whether the latest steps had nothing to learn from."""
    skipped = self.row.get('selection/skipped_in_a_row', 0)
    return skipped >= self.c.selection.patience

  def greet(self):
    """Says what the run goes on with."""
    for change in self.files.changes:
      self.display.note(f'Going on from step {self.done}: {change}.')
    if self.done >= self.c.num_steps:
      self.display.note(
        f'Nothing to train: the run is at step {self.done}, num_steps is '
        f'{self.c.num_steps}.'
      )

  def collect(self) -> collector_lib.Rollout:
    """Plays the next boards with the newest policy."""
    how = self.c.rollout
    seeds = range(self.next_seed, self.next_seed + how.prompts)
    played = self.parts.collector.collect(
      build.policy(self.parts.model, self.state.actor.params),
      seeds,
      named_key(self.key, build.ROLLOUT, self.done),
      members=how.members,
      temperature=how.temperature,
    )
    self.next_seed = seeds.stop
    report_failures(played, f'step {self.done + 1}', self.display)
    return played

  def check_first(self, batch):
    """Run the self-check on the first batch."""
    if self.done or not self.c.learner.self_check:
      return
    model = self.parts.model
    is_exact = model.dtype == 'float32'
    try:
      self_check.run(
        model.graphdef,
        self.state,
        self.reference,
        batch,
        recipe.stages_of(self.c),
        limits=self_check.EXACT if is_exact else self_check.ROUNDED,
      )
    except self_check.Failed as error:
      raise errors.RunError(str(error)) from error

  def learn(self, batch) -> Row:
    """One train step; its metrics."""
    self.state, learned = run_step(
      self.train_step,
      self.state,
      self.reference,
      batch,
      named_key(self.key, build.UPDATE, self.done),
      fused=self.c.learner.fused,
    )
    self.done += 1
    return learned

  def note(self, row: Row):
    """Writes the metrics of an iteration, and shows some."""
    check_finite(row)
    self.row = row
    self.files.metrics.append(row)
    self.display.update(self.done, **_shown(row))

  def evaluate_and_save(self):
    """As often as the config says, and after the last step."""
    c, success = self.c, None
    is_last = self.done == c.num_steps or self.stalled
    if is_last or (c.eval.every and self.done % c.eval.every == 0):
      success = self.evaluate()
    if is_last or self.done % c.checkpoint.every == 0:
      self.save(success)

  def evaluate(self) -> float:
    """Plays the held-out boards; writes the row, and episodes for the viewer.

    Returns:
      Held-out success.
    """
    c, parts, step = self.c, self.parts, self.done
    row, played = evaluation.evaluate(
      parts.collector,
      build.policy(parts.model, self.state.actor.params),
      evaluation.evaluation_key(c),
      **evaluation.evaluation_arguments(c),
    )
    self.files.evaluations.append({'step': step, **row})
    if c.eval.save:
      shown = evaluation.episodes_to_show(
        played,
        parts,
        lambda batch: self.train_step.explain(
          self.state, self.reference, batch, self.key
        ),
        step=step,
        count=c.eval.save,
        length=c.limits.context,
      )
      self.files.write_episodes(step, shown)
    report_failures(played, f'evaluation at step {step}', self.display)
    self.display.note(evaluation.line(step, row))
    return row['success']

  def save(self, success: float | None):
    """Starts to write a checkpoint."""
    self.files.save(self.done, self.state, success, self.next_seed)


def _end(run: Run, workdir: pathlib.Path, stopped: str | None) -> pathlib.Path:
  """Says how a run ended, and reports."""
  done, of = run.done, run.c.num_steps
  if run.stalled and done < of:
    _report(workdir)
    raise errors.NoLearningSignal(_why_stalled(run.c, run.row))
  if done < of:
    saved = ', saved' if done else ', before anything was learned'
    print(
      f'Stopped by {stopped} after step {done} of {of}{saved}. '
      'The same command goes on from there.'
    )
  return _report(workdir)


def _report(workdir: pathlib.Path) -> pathlib.Path:
  """Writes the report in the process that writes; where its summary is.

  The others wait for it: who leaves early with an error ends the writer too.
  """
  if processes.is_first():
    summary.write_report(workdir)
  processes.allgather(None)
  return workdir / 'report' / 'summary.md'


def report_failures(played: collector_lib.Rollout, when: str, display):
  """Tells of environments that failed; raises RunError when all of them did."""
  failures = [one.failure for one in played.episodes if one.failure]
  if not failures:
    return
  text = (
    f'{when}: the environment failed in {len(failures)} of '
    f'{len(played.episodes)} episodes, first: {failures[0].reason}'
  )
  if len(failures) == len(played.episodes):
    raise errors.RunError(f'{text}\n{failures[0].details}'.strip())
  display.note(text)


def named_key(root: jax.Array, stream: int, step: int) -> jax.Array:
  """The key of one stream at one step."""
  return jax.random.fold_in(jax.random.fold_in(root, stream), step)


def to_batch(
  played: collector_lib.Rollout,
  c: ml_collections.ConfigDict,
  parts: build.Parts,
):
  """Lays episodes side by side at one of a few lengths, on the devices."""
  longest = max(len(one.ids) for one in played.episodes)
  lengths = tuple(c.rollout.lengths) or (c.limits.context,)
  length = next(n for n in lengths if n >= longest)
  batch = episode.to_trajectory(
    played.episodes, played.groups, length=length, pad=parts.chat.pad_id
  )
  return mesh_lib.put_rows(parts.mesh, batch)


def run_step(
  train_step: step_lib.TrainStep, state, reference, batch, key, *, fused: bool
) -> tuple[Any, Row]:
  """One train step as one program, or as two that are timed apart.

  Args:
    train_step: Compiled stages.
    state: Before; donated.
    reference: Parameters of the frozen reference.
    batch: Of all episodes.
    key: Of this step.
    fused: Which of the two; the result is the same.

  Returns:
    The state after, and its metrics on the host.
  """
  begin = time.perf_counter()
  if fused:
    state, row = train_step.fused(state, reference, batch, key)
    row = jax.device_get(row)
    return state, row | {'time/update': time.perf_counter() - begin}
  weigh_key, order_key = jax.random.split(key)
  ready, row = train_step.prepare(state, reference, batch, weigh_key)
  jax.block_until_ready(ready)
  scored = time.perf_counter()
  state, row = train_step.finish(state, ready, row, order_key)
  row = jax.device_get(row)
  times = {
    'time/score': scored - begin,
    'time/update': time.perf_counter() - scored,
  }
  return state, row | times


def to_row(step: int, played: collector_lib.Rollout, learned: Row) -> Row:
  """The metrics of one iteration under the names of metrics.jsonl."""
  seen, speed = (
    statistics_lib.episode_means(played),
    statistics_lib.throughput(played),
  )
  parts = statistics_lib.rollouts_by_game(played)
  if len(parts) > 1:
    for game, part in parts.items():
      of_game = statistics_lib.episode_means(part)
      seen |= {f'{game}/{name}': value for name, value in of_game.items()}
  return {
    'step': step,
    **{f'train/{name}': value for name, value in seen.items()},
    **{name: np.asarray(value).item() for name, value in learned.items()},
    **{f'rollout/{name}': value for name, value in speed.items()},
  }


def check_finite(row: Row):
  """Raises FloatingPointError that names the step and the term."""
  for name, value in row.items():
    if not math.isfinite(value):
      raise FloatingPointError(
        f'{name} is {value} at step {row["step"]}. Nothing of this step was '
        'saved; the last checkpoint is sound. The usual remedy is a lower '
        'optimizer.learning_rate, in a new workdir.'
      )


def _why_stalled(c: ml_collections.ConfigDict, row: Row) -> str:
  return (
    f'Stopped after step {row["step"]}, saved: in the last '
    f'{c.selection.patience} steps (selection.patience) the '
    f'{c.rollout.members} members of every group had the same return, so '
    'there was nothing to compare. Latest success '
    f'{row["train/success"]:.0%}, valid turns {row["train/valid_turns"]:.0%}: '
    'where both are 0 the model does not hit the format or the task is too '
    'hard for it, where success is 100 % it is learned. Remedies: an easier '
    'task, more members, a longer limits.response_tokens.'
  )


def _shown(row: Row) -> Row:
  return {
    'success': row['train/success'],
    'return': row['train/return'],
    'action mass': row['weights/action_mass'],
    'tokens/s': row['rollout/tokens_per_second'],
    's/step': sum(v for k, v in row.items() if k.startswith('time/')),
  }
