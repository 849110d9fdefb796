"""The loop: collect episodes, make one step, write down what happened.

Read it top to bottom like the algorithm box of arXiv 2605.14558. Everything
it calls is a part made by `assemble`; everything that a step draws at random
is named by the step's number, so a resumed run needs no stored generator.
"""

import json
import math
import os
import pathlib
import time
from typing import Any

import jax
import ml_collections
import numpy as np

from actfocus_jax import assemble, base_model, evaluation
from actfocus_jax.agent import chat as chat_lib
from actfocus_jax.agent import episode, records, rollout
from actfocus_jax.envs import players
from actfocus_jax.learner import state as state_lib
from actfocus_jax.learner import step as step_lib
from actfocus_jax.report import summary
from actfocus_jax.run import (
  checkpoint,
  compilations,
  interrupt,
  metrics,
  progress,
  settings,
)

# Names of the random streams below the root key.
_ROLLOUT, _UPDATE, _EVALUATION = range(3)
_FIRST_TRAINING_SEED = 10_000


def train(c: ml_collections.ConfigDict, workdir: pathlib.Path) -> pathlib.Path:
  """Trains, or goes on training, in `workdir`.

  Args:
    c: A checked config.
    workdir: The run directory; another config's run has been refused before.

  Returns:
    The report's summary file.

  Raises:
    ValueError: When the config cannot work with this model or machine; the
      workdir is untouched then.
    FloatingPointError: When a loss or gradient is not finite.
  """
  # --- The machine, the model, the environment -------------------------------
  compilations.start()
  mesh = assemble.mesh(c)
  env = assemble.environment(c)
  assemble.player(c)
  _check_first_prompt(c, env)
  with jax.set_mesh(mesh):
    path = base_model.ensure(c, mesh)
    chat = assemble.chat(str(path))
    model = assemble.model(c, str(path), mesh)
    collector = assemble.collector(c, chat, env, mesh)
    tx = assemble.optimizer(c)
    train_step = step_lib.TrainStep(
      model.graphdef, model.graphdef, tx, assemble.recipe(c)
    )
    state = state_lib.create(model.params, tx)

    # --- The run directory, and what an earlier run left in it ---------------
    run = RunDirectory(workdir, c)
    state = run.restore(state)
    run.write_baseline(c, env)
    key = jax.random.key(c.seed)

    def evaluate(step: int):
      row, played = evaluation.evaluate(
        collector,
        assemble.policy(model, state.params, mesh),
        jax.random.fold_in(key, _EVALUATION),
        prompts=c.eval.prompts,
        members=c.eval.members,
        temperature=c.eval.temperature,
        first_seed=c.eval.first_seed,
      )
      run.log_evaluation(step, row, played, chat, c.eval.save)
      return row

    # --- Training ------------------------------------------------------------
    with (
      progress.Progress('train', c.num_steps) as display,
      interrupt.Interrupt() as stop,
    ):
      first = int(state.step)
      if first == 0:
        display.note(evaluation_line(0, evaluate(0)))
      for step in range(first, c.num_steps):
        begin = time.perf_counter()
        played = collector.collect(
          assemble.policy(model, state.params, mesh),
          training_seeds(step, c.rollout.prompts),
          named_key(key, _ROLLOUT, step),
          members=c.rollout.members,
          temperature=c.rollout.temperature,
        )
        batch = to_batch(played, c, mesh, chat)
        rolled = time.perf_counter()
        state, row = run_step(
          train_step,
          state,
          model.reference,
          batch,
          named_key(key, _UPDATE, step),
          fused=c.learner.fused,
        )
        done = step + 1
        row = _row(done, row, played, batch) | {
          'time/rollout': rolled - begin,
          'time/step': time.perf_counter() - begin,
          'compiles': compilations.count(),
        }
        check_finite(row)
        run.metrics.append(row)
        display.update(done, **_shown(row))

        is_last = done == c.num_steps
        is_due = c.eval.every and done % c.eval.every == 0
        success = None
        if is_due or is_last:
          evaluated = evaluate(done)
          success = evaluated['success']
          display.note(evaluation_line(done, evaluated))
        if done % c.checkpoint.every == 0 or is_last or stop.requested:
          run.save(done, state, success)
        if stop.requested:
          break
    run.close()

  # --- The report ------------------------------------------------------------
  if stop.requested and not is_last:
    print(
      f'Stopped by {stop.signal} after step {done} of {c.num_steps}, saved. '
      'The same command goes on from there.'
    )
  return summary.write_report(workdir)


# --- Stages of an iteration --------------------------------------------------


def named_key(root: jax.Array, stream: int, step: int) -> jax.Array:
  """The key of one stream at one step."""
  return jax.random.fold_in(jax.random.fold_in(root, stream), step)


def training_seeds(step: int, prompts: int) -> range:
  """Boards of an iteration: 10000 + step * P + i; they never repeat."""
  first = _FIRST_TRAINING_SEED + step * prompts
  return range(first, first + prompts)


def to_batch(played: rollout.Rollout, c: ml_collections.ConfigDict, mesh, chat):
  """Lays episodes side by side at one of a few lengths, on the devices."""
  longest = max(len(episode.ids) for episode in played.episodes)
  lengths = tuple(c.rollout.lengths) or (c.limits.context,)
  length = next(n for n in lengths if n >= longest)
  batch = episode.to_trajectory(
    played.episodes, played.groups, length=length, pad=chat.pad_id
  )
  return assemble.mesh_lib.put_rows(mesh, batch)


def run_step(
  train_step: step_lib.TrainStep, state, reference, batch, key, *, fused: bool
) -> tuple[Any, dict[str, float]]:
  """One step, fused or in two timed halves; waits for its metrics."""
  begin = time.perf_counter()
  if fused:
    state, row = train_step(state, reference, batch, key)
    row = jax.device_get(row)
    return state, row | {'time/update': time.perf_counter() - begin}
  weigh_key, order_key = jax.random.split(key)
  ready, row = train_step.prepare(state.params, reference, batch, weigh_key)
  jax.block_until_ready(ready)
  scored = time.perf_counter()
  state, row = train_step.finish(state, ready, row, order_key)
  row = jax.device_get(row)
  times = {
    'time/score': scored - begin,
    'time/update': time.perf_counter() - scored,
  }
  return state, row | times


def check_finite(row: dict[str, float]):
  """Raises FloatingPointError that names the step and the term."""
  for name, value in row.items():
    if not math.isfinite(value):
      raise FloatingPointError(
        f'{name} is {value} at step {row["step"]}. Nothing of this step was '
        'saved; the last checkpoint is sound. A lower '
        'optimizer.learning_rate is the usual remedy.'
      )


def _row(step: int, row, played: rollout.Rollout, batch) -> dict[str, float]:
  statistics = records.statistics(played)
  return {
    'step': step,
    **{f'train/{name}': value for name, value in statistics.items()},
    **{name: np.asarray(value).item() for name, value in row.items()},
    **{f'rollout/{k}': v for k, v in records.speed(played).items()},
    'rollout/seconds': played.seconds,
    'rollout/padded_length': batch.tokens.shape[1],
  }


def _shown(row: dict[str, float]) -> dict[str, float]:
  return {
    'success': row['train/success'],
    'return': row['train/return'],
    'action mass': row['weights/action_mass'],
    'tokens/s': row['rollout/tokens_per_second'],
    's/step': row['time/step'],
  }


def evaluation_line(step: int, row: dict[str, float]) -> str:
  """One evaluation as people read it."""
  return (
    f'step {step}: held-out success {row["success"]:.1%} '
    f'(95 % interval {row["success_low"]:.1%} to {row["success_high"]:.1%}), '
    f'pass@G {row["pass_at_g"]:.1%}, {row["episodes"]} episodes'
  )


def _check_first_prompt(c: ml_collections.ConfigDict, env):
  """Refuses a context that the first prompt fills, before a model is made."""
  if c.model.path:
    chat = assemble.chat(c.model.path)
  else:
    chat = chat_lib.Chat(base_model.tokenizer(c))
  opening = episode.open_episode(
    chat, env, assemble.limits(c), c.eval.first_seed
  )
  rollout.check_opening(opening, assemble.limits(c))


# --- The run directory -------------------------------------------------------


class RunDirectory:
  """config.json, metrics.jsonl, eval.jsonl, checkpoints/, rollouts/."""

  def __init__(self, path: pathlib.Path, c: ml_collections.ConfigDict):
    """Makes the directory and writes the config."""
    path.mkdir(parents=True, exist_ok=True)
    text = json.dumps(settings.to_json(c), indent=2) + '\n'
    _write(path / 'config.json', text)
    self._path = path
    self.metrics = metrics.MetricsFile(path / 'metrics.jsonl')
    self.evaluations = metrics.MetricsFile(path / 'eval.jsonl')
    self._checkpoints = checkpoint.Checkpoints(
      path / 'checkpoints', keep=c.checkpoint.keep
    )

  def restore(self, state):
    """The newest checkpoint in the place of `state`, or `state` itself.

    Rows that were written after that checkpoint are dropped: their steps will
    be done again.
    """
    latest = self._checkpoints.latest_step()
    if latest is not None:
      abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        state,
      )
      state, _ = self._checkpoints.restore(latest, abstract)
    kept = 0 if latest is None else latest + 1
    self.metrics.truncate(kept)
    self.evaluations.truncate(kept)
    return state

  def write_baseline(self, c: ml_collections.ConfigDict, env):
    """How often uniformly random actions solve the held-out boards."""
    first, plays = c.eval.first_seed, 16
    seeds = range(first, first + c.eval.prompts)
    success = players.random_play_success(
      env, seeds, actions=c.limits.action_budget, plays=plays
    )
    baseline = {
      'random_success': success,
      'random_episodes': plays * c.eval.prompts,
    }
    _write(self._path / 'baselines.json', json.dumps(baseline) + '\n')

  def log_evaluation(self, step: int, row, played, chat, save: int):
    """Appends to eval.jsonl and keeps some episodes for the viewer."""
    self.evaluations.append({'step': step, **row})
    if save:
      evaluation.save_episodes(
        self._path / 'rollouts' / f'step_{step:06d}.jsonl',
        played,
        chat,
        step=step,
        count=save,
      )

  def save(self, step: int, state, success: float | None):
    """Starts to write a checkpoint."""
    self._checkpoints.save(step, state, {'step': step}, success=success)

  def close(self):
    """Waits for the last checkpoint."""
    self._checkpoints.wait()
    self._checkpoints.close()
    self.metrics.close()
    self.evaluations.close()


def _write(path: pathlib.Path, text: str):
  """Whole or not at all."""
  partial = path.with_name(f'.{path.name}.partial')
  partial.write_text(text)
  os.replace(partial, path)
