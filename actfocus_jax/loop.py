"""The loop: collect episodes, make one train step, log, evaluate, save.

`train` is the outer loop of the algorithm box of arXiv 2605.14558; the box is
`learner.train_step`. `Run` has one method for each line of the loop. Every
random number is named by the number of its step, so that a resumed run needs
no stored generator. Boards are counted: a step takes the next `rollout.prompts`
seeds, and the checkpoint holds the next one, so that none repeats and none is
left out when the number of prompts changes.
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

from actfocus_jax import build, errors, evaluation
from actfocus_jax.config import schema
from actfocus_jax.learner import self_check
from actfocus_jax.learner import train_step as train_step_lib
from actfocus_jax.parallel import mesh as mesh_lib
from actfocus_jax.parallel import processes
from actfocus_jax.rollout import collector as collector_lib
from actfocus_jax.rollout import episode
from actfocus_jax.rollout import statistics as statistics_lib
from actfocus_jax.run import directory, interrupt, metrics, progress

Row = dict[str, float]


def train(c: ml_collections.ConfigDict, workdir: pathlib.Path) -> pathlib.Path:
  """Train, or go on training, in `workdir`.

  Args:
    c: checked config.
    workdir: run directory, checked by `paths.check_workdir`.

  Returns:
    The summary file of the report.

  Raises:
    UsageError: the config does not fit this model or machine; the workdir is
      untouched.
    Stopped: a signal came during the warm start.
    FloatingPointError: a metric of a step is not finite.
    RunError: the first batch fails the self-check, or every environment of a
      step fails.
    NoLearningSignal: `selection.patience` steps in a row had no group with
      spread; the run has been evaluated, saved and reported.
  """
  metrics.count_compilations()  # Counts from here on.
  with contextlib.ExitStack() as stack:
    parts = stack.enter_context(build.parts(c))
    stop = stack.enter_context(interrupt.Interrupt())
    run = stack.enter_context(open_run(c, parts, workdir))
    # A signal may reach one process of several.
    if run.done == 0 and not stop.agreed():
      run.evaluate()
    while not (stopped := stop.agreed()):
      if run.done >= c.num_steps or run.stalled:
        break
      begin = time.perf_counter()
      played = run.collect()
      batch = to_batch(played, c, parts)
      rolled = time.perf_counter()
      run.check_first(batch)
      learned = run.learn(batch)
      run.log(
        to_row(run.done, played, learned)
        | {
          'rollout/padded_length': batch.tokens.shape[1],
          'time/rollout': rolled - begin,
          'compiles': metrics.count_compilations(),
        }
      )
      run.evaluate_and_save()
    if stopped and run.done:
      run.save(None)  # Does nothing if this step is saved already.
  return _end(run, workdir, stopped)


def evaluate(
  c: ml_collections.ConfigDict, workdir: pathlib.Path | None, step: int | None
) -> tuple[int, dict[str, float]]:
  """Evaluate a checkpoint of a run, or the model that a config starts from.

  Args:
    c: checked config; its section `eval` sets boards, episodes and temperature.
    workdir: run directory; None evaluates the model itself, as step 0.
    step: step of the checkpoint; None is the newest.

  Returns:
    The step, and the row of `evaluation.evaluate`.

  Raises:
    UsageError: there is no such checkpoint, or the processes name different
      ones.
  """
  # Each process would read its slices from the checkpoint that it was given.
  for flag, value in (
    ('--workdir', workdir and str(workdir)),
    ('--step', step),
  ):
    processes.check_equal(value, flag, 'the same in all processes')
  with build.parts(c) as parts:
    if workdir is None:
      build.same_model(parts.model)
      step, params = 0, parts.model.weights()
    else:
      step, params = build.checkpoint(parts.model, workdir, step)
    row, _ = evaluation.evaluate(
      parts.collector,
      build.policy(parts.model, params),
      build.evaluation_key(c),
      **build.held_out(c),
    )
  return step, row


@contextlib.contextmanager
def open_run(
  c: ml_collections.ConfigDict, parts: build.Parts, workdir: pathlib.Path
) -> Iterator['Run']:
  """Make the learner and restore the newest checkpoint, if there is one.

  Leaving the context waits for the last checkpoint.
  """
  model = parts.model
  described = build.same_model(model)
  learners = build.learners(c, model)
  train_step = build.train_step(c, learners)
  reference = None
  if schema.has_reference(c):
    reference = model.weights(model.dtype)
  with directory.open_run(workdir, schema.to_json(c), described) as files:
    state, next_seed = files.restore(learners.abstract())
    if state is None:
      state = learners.create()
    if processes.is_first():
      seeds = range(c.eval.first_seed, c.eval.first_seed + c.eval.prompts)
      row = evaluation.random_baseline(parts.collector, seeds)
      files.write('baselines.json', row)
    # The others wait here without a time limit: this collective has run before,
    # and only the first one among devices has a time limit on GPUs.
    processes.allgather(None)
    with progress.Progress('train', c.num_steps) as display:
      run = Run(
        c, parts, files, display, train_step, reference, state, next_seed
      )
      run.log_resume()
      yield run


@dataclasses.dataclass
class Run:
  """A run in progress: one method for each part of an iteration.

  Attributes:
    c: config.
    parts: model, environments and devices.
    files: run directory.
    display: progress display.
    train_step: compiled train step.
    reference: parameters of the frozen reference, or None.
    state: train state.
    next_seed: seed of the first board that no step has seen.
    done: finished iterations.
    row: metrics of the latest iteration; empty before.
    key: root PRNG key of the run.
  """

  c: ml_collections.ConfigDict
  parts: build.Parts
  files: directory.RunDirectory
  display: progress.Progress
  train_step: train_step_lib.TrainStep
  reference: Any
  state: Any
  next_seed: int

  def __post_init__(self):
    self.done = int(self.state.step)
    self.row: Row = {}
    self.key = jax.random.key(self.c.seed)

  @property
  def stalled(self) -> bool:
    """True if the latest steps were skipped for lack of spread."""
    skipped = self.row.get('selection/skipped_in_a_row', 0)
    return skipped >= self.c.selection.patience

  def log_resume(self):
    """Show the resumed step and the changed config fields."""
    for change in self.files.changes:
      self.display.note(f'Going on from step {self.done}: {change}.')
    if self.done >= self.c.num_steps:
      self.display.note(
        f'Nothing to train: the run is at step {self.done}, num_steps is '
        f'{self.c.num_steps}.'
      )

  def collect(self) -> collector_lib.Rollout:
    """Play the next boards with the newest policy."""
    rollout = self.c.rollout
    seeds = range(self.next_seed, self.next_seed + rollout.prompts)
    played = self.parts.collector.collect(
      build.policy(self.parts.model, self.state.actor.params),
      seeds,
      named_key(self.key, build.ROLLOUT, self.done),
      members=rollout.members,
      temperature=rollout.temperature,
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
        build.train_step_config(self.c),
        limits=self_check.EXACT if is_exact else self_check.ROUNDED,
      )
    except self_check.Failed as error:
      raise errors.RunError(str(error)) from error

  def learn(self, batch) -> Row:
    """Make one train step; return its metrics."""
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

  def log(self, row: Row):
    """Write the metrics of an iteration, and show some."""
    check_finite(row)
    self.row = row
    self.files.metrics.append(row)
    self.display.update(self.done, **_shown(row))

  def evaluate_and_save(self):
    """Evaluate and save at the intervals of the config, and at the end."""
    c, success = self.c, None
    is_last = self.done == c.num_steps or self.stalled
    if is_last or (c.eval.every and self.done % c.eval.every == 0):
      success = self.evaluate()
    if is_last or self.done % c.checkpoint.every == 0:
      self.save(success)

  def evaluate(self) -> float:
    """Write a row and episodes of held-out boards; return the success rate."""
    c, parts, step = self.c, self.parts, self.done
    row, played = evaluation.evaluate(
      parts.collector,
      build.policy(parts.model, self.state.actor.params),
      build.evaluation_key(c),
      **build.held_out(c),
    )
    self.files.evaluations.append({'step': step, **row})
    if c.eval.save:
      shown = evaluation.episodes_to_show(
        played,
        parts.chat,
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
    """Start to write a checkpoint."""
    self.files.save(self.done, self.state, success, self.next_seed)


def _end(run: Run, workdir: pathlib.Path, stopped: str | None) -> pathlib.Path:
  """Print how the run ended, and write the report."""
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
  """Write the report in process 0; return its summary file.

  The others wait: a process that exits early would end process 0, too.
  """
  if processes.is_first():
    from actfocus_jax.report import summary  # Matplotlib loads slowly.

    summary.write_report(workdir)
  processes.allgather(None)
  return workdir / 'report' / 'summary.md'


def report_failures(played: collector_lib.Rollout, when: str, display):
  """Show failed environments; raise RunError if all of them failed."""
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
  """PRNG key of one stream at one step."""
  return jax.random.fold_in(jax.random.fold_in(root, stream), step)


def to_batch(
  played: collector_lib.Rollout,
  c: ml_collections.ConfigDict,
  parts: build.Parts,
):
  """Put the episodes on the devices, right-padded to one of a few lengths."""
  longest = max(len(one.ids) for one in played.episodes)
  lengths = tuple(c.rollout.lengths) or (c.limits.context,)
  length = next(n for n in lengths if n >= longest)
  batch = episode.to_trajectory(
    played.episodes, played.groups, length=length, pad=parts.chat.pad_id
  )
  return mesh_lib.put_rows(parts.mesh, batch)


def run_step(
  train_step: train_step_lib.TrainStep,
  state,
  reference,
  batch,
  key,
  *,
  fused: bool,
) -> tuple[Any, Row]:
  """Make one train step; return the state, and its metrics on the host.

  It is one program if `fused`, else two that are timed apart; the results are
  equal. The state is donated.
  """
  begin = time.perf_counter()
  if fused:
    state, row = train_step.fused(state, reference, batch, key)
    row = jax.device_get(row)
    return state, row | {'time/update': time.perf_counter() - begin}
  update_batch, row = train_step.prepare(state, reference, batch, key)
  jax.block_until_ready(update_batch)
  scored = time.perf_counter()
  state, row = train_step.finish(state, update_batch, row, key)
  row = jax.device_get(row)
  times = {
    'time/score': scored - begin,
    'time/update': time.perf_counter() - scored,
  }
  return state, row | times


def to_row(step: int, played: collector_lib.Rollout, learned: Row) -> Row:
  """Metrics of one iteration under the names of metrics.jsonl."""
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
  """Raise FloatingPointError if a metric is not finite; name step and term."""
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
