"""The loop: collect episodes, make one step, write down what happened.

Read `train` top to bottom like the algorithm box of arXiv 2605.14558. Its
parts are made by `assemble`; everything that a step draws at random is named
by the step's number, so a resumed run needs no stored generator. Boards are
counted: step n takes the next `rollout.prompts` seeds, so that none repeats and
none is left out where the number of prompts changes; the checkpoint has the
next one.
"""

import contextlib
import math
import pathlib
import time
import uuid
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np

from actfocus_jax import assemble, chance, evaluation, recipe
from actfocus_jax.agent import episode, records, rollout
from actfocus_jax.learner import self_check
from actfocus_jax.learner import step as step_lib
from actfocus_jax.parallel import mesh as mesh_lib
from actfocus_jax.parallel import processes
from actfocus_jax.report import summary
from actfocus_jax.run import (
  compilations,
  directory,
  interrupt,
  progress,
  settings,
  storage,
)

Row = dict[str, float]

# Seconds in which a shared directory must show what another process wrote.
_SEEN_WITHIN = 40.0


def train(c: ml_collections.ConfigDict, workdir: pathlib.Path) -> pathlib.Path:
  """Trains, or goes on training, in `workdir`.

  Args:
    c: A checked config.
    workdir: The run directory; another config's run has been refused before.

  Returns:
    The report's summary file.

  Raises:
    Refused: When the config cannot work with this model or machine; the
      workdir is untouched then.
    Stopped: When a signal came during the warm start.
    FloatingPointError: When a metric of a step is not finite.
    Halted: When the first batch fails the self-check, or every environment of
      a step fails. Stalled, when `selection.patience` steps in a row had
      nothing to learn from; the run is evaluated, saved and reported then.
  """
  compilations.start()
  with contextlib.ExitStack() as stack:
    parts = stack.enter_context(assemble.parts(c))
    stop = stack.enter_context(interrupt.Interrupt())
    # --- The learner, and what an earlier run left behind --------------------
    model = parts.model
    learners = recipe.learners(c, model)
    train_step = recipe.train_step(c, learners)
    reference = None
    if settings.has_reference(c):
      reference = model.weights(model.dtype)
    run = stack.enter_context(open_run(workdir, c, model.described()))
    state, next_seed = run.restore(
      learners.abstract(), agreed=processes.of_first
    )
    if state is None:
      state = learners.create()
    if processes.is_first():
      run.write('baselines.json', chance.level(c, parts.collector))
    key = jax.random.key(c.seed)

    def evaluate(step: int) -> float:
      row, played = evaluate_and_keep(
        step,
        state.actor.params,
        c,
        parts,
        run,
        lambda batch: train_step.explain(state, reference, batch, key),
      )
      report_failures(played, f'evaluation at step {step}', display)
      display.note(evaluation.line(step, row))
      return row['success']

    with progress.Progress('train', c.num_steps) as display:
      done, stalled = int(state.step), False
      for change in run.changes:
        display.note(f'Going on from step {done}: {change}.')
      stopped = stop.agreed(processes.first_said)
      if done == 0 and not stopped:
        evaluate(0)
      elif done >= c.num_steps:
        display.note(
          f'Nothing to train: the run is at step {done}, num_steps is '
          f'{c.num_steps}.'
        )
      # A signal may have come to one process of several.
      while not (stopped := stop.agreed(processes.first_said)):
        if done >= c.num_steps:
          break
        # --- One iteration ---------------------------------------------------
        begin = time.perf_counter()
        seeds = range(next_seed, next_seed + c.rollout.prompts)
        played = parts.collector.collect(
          assemble.policy(model, state.actor.params),
          seeds,
          named_key(key, assemble.ROLLOUT, done),
          members=c.rollout.members,
          temperature=c.rollout.temperature,
        )
        report_failures(played, f'step {done + 1}', display)
        batch = to_batch(played, c, parts)
        rolled = time.perf_counter()
        if done == 0 and c.learner.self_check:
          check_first_batch(c, model, state, reference, batch)
        state, learned = run_step(
          train_step,
          state,
          reference,
          batch,
          named_key(key, assemble.UPDATE, done),
          fused=c.learner.fused,
        )
        done, next_seed = done + 1, seeds.stop

        # --- What happened ---------------------------------------------------
        row = to_row(done, played, learned) | {
          'rollout/padded_length': batch.tokens.shape[1],
          'time/rollout': rolled - begin,
          'compiles': compilations.count(),
        }
        check_finite(row)
        run.metrics.append(row)
        display.update(done, **_shown(row))

        # --- Evaluation and checkpoint ---------------------------------------
        stalled = row['selection/skipped_in_a_row'] >= c.selection.patience
        is_last = done == c.num_steps or stalled
        success = None
        if is_last or (c.eval.every and done % c.eval.every == 0):
          success = evaluate(done)
        if is_last or done % c.checkpoint.every == 0:
          run.save(done, state, success, next_seed)
        if stalled:
          break
      if stopped and done:
        # A step that is saved stays as it is.
        run.save(done, state, None, next_seed)

  if stalled and done < c.num_steps:
    _report(workdir)
    raise settings.Stalled(_why_stalled(c, row))
  if done < c.num_steps:
    saved = ', saved' if done else ', before anything was learned'
    print(
      f'Stopped by {stopped} after step {done} of {c.num_steps}{saved}. '
      'The same command goes on from there.'
    )
  return _report(workdir)


def open_run(
  workdir: pathlib.Path, c: ml_collections.ConfigDict, model: dict[str, str]
) -> directory.RunDirectory:
  """Opens the run directory in every process; the first one writes.

  Args:
    workdir: Of the run.
    c: The config.
    model: As of RunDirectory.

  Returns:
    The run directory.

  Raises:
    Refused: As of RunDirectory; when processes read different models; when
      they do not all see the directory.
  """
  processes.check_equal(
    model['sha256'],
    f'the sha256 of {model["path"]}',
    'the same files in all processes; a warm start can be shared by '
    'warm_start.cache, or its directory copied',
  )
  if processes.count() > 1:
    check_shared(workdir)
  return directory.RunDirectory(workdir, c, model, writes=processes.is_first())


def check_shared(workdir: pathlib.Path):
  """Refuses a directory that not all processes see, before they wait in it."""
  mark, word = workdir / '.processes', None
  if processes.is_first():
    workdir.mkdir(parents=True, exist_ok=True)
    word = uuid.uuid4().hex
    storage.write(mark, word)
  word = processes.of_first(word)
  end = time.monotonic() + _SEEN_WITHIN
  while not (is_seen := _reads(mark, word)) and time.monotonic() < end:
    list(workdir.parent.iterdir())  # Asks a network's file system anew.
    time.sleep(1.0)
  seen = processes.exchange(is_seen)
  if processes.is_first():
    mark.unlink()
  if not all(seen):
    raise settings.Refused(
      f'--workdir is {workdir}, of which process {seen.index(False)} does not '
      'see what process 0 writes there; allowed: a directory that all '
      'processes share, or gs://BUCKET/FOLDER.'
    )


def _reads(mark: pathlib.Path, word: str) -> bool:
  return mark.exists() and mark.read_text() == word


def _report(workdir: pathlib.Path) -> pathlib.Path:
  """Writes the report in the process that writes; where its summary is.

  The others wait for it: who leaves early with an error ends the writer too.
  """
  if processes.is_first():
    summary.write_report(workdir)
  processes.exchange(None)
  return workdir / 'report' / 'summary.md'


def evaluate_and_keep(
  step: int,
  params,
  c: ml_collections.ConfigDict,
  parts: assemble.Parts,
  run: directory.RunDirectory,
  explain: Callable,
) -> tuple[Row, rollout.Rollout]:
  """Plays the held-out boards; writes the row, and episodes for the viewer.

  Args:
    step: Finished iterations.
    params: Of the policy.
    c: The config.
    parts: Of the run.
    run: Where it is written.
    explain: (batch) -> (signal_BT, weight_BT), for the viewer.

  Returns:
    The row, and the episodes.
  """
  row, played = evaluation.evaluate(
    parts.collector,
    assemble.policy(parts.model, params),
    evaluation.evaluation_key(c),
    **evaluation.evaluation_arguments(c),
  )
  run.evaluations.append({'step': step, **row})
  if c.eval.save:
    shown = evaluation.episodes_to_show(
      played,
      parts,
      explain,
      step=step,
      count=c.eval.save,
      length=c.limits.context,
    )
    run.write_episodes(step, shown)
  return row, played


def report_failures(played: rollout.Rollout, when: str, display):
  """Tells of environments that failed; raises Halted when all of them did."""
  failures = [one.failure for one in played.episodes if one.failure]
  if not failures:
    return
  text = (
    f'{when}: the environment failed in {len(failures)} of '
    f'{len(played.episodes)} episodes, first: {failures[0].reason}'
  )
  if len(failures) == len(played.episodes):
    raise settings.Halted(f'{text}\n{failures[0].details}'.strip())
  display.note(text)


def named_key(root: jax.Array, stream: int, step: int) -> jax.Array:
  """The key of one stream at one step."""
  return jax.random.fold_in(jax.random.fold_in(root, stream), step)


def to_batch(
  played: rollout.Rollout, c: ml_collections.ConfigDict, parts: assemble.Parts
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


def check_first_batch(
  c: ml_collections.ConfigDict, model, state, reference, batch
):
  """Raises Halted unless what should be equal is, before the first update."""
  is_exact = model.dtype == 'float32'
  try:
    self_check.run(
      model.graphdef,
      state,
      reference,
      batch,
      recipe.stages_of(c),
      limits=self_check.EXACT if is_exact else self_check.ROUNDED,
    )
  except self_check.Failed as error:
    raise settings.Halted(str(error)) from error


def to_row(step: int, played: rollout.Rollout, learned: Row) -> Row:
  """The metrics of one iteration under the names of metrics.jsonl."""
  seen, speed = records.statistics(played), records.speed(played)
  parts = records.by_game(played)
  if len(parts) > 1:
    for game, part in parts.items():
      of_game = records.statistics(part)
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
