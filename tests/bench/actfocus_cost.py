"""What ActFocus costs: its training step over that of uniform weights.

python tests/bench/actfocus_cost.py --config=configs/quickstart.py \
  [--repeats=9] [--config.section.field=value ...]

One process, four train steps that start from the same model: uniform weights
and ActFocus, each without KL and with (`kl.coefficient` 0.001). Every repeat
samples one batch, which all four learn from in an order drawn anew; times are
divided by those of uniform weights of the same repeat and the same KL. A whole
step is the rollout and the update; the rollout is the same for all, so that its
time is measured once per repeat and added. Printed are the medians over the
repeats, with the least and the greatest.

Without KL, uniform weights need no reference at all, so the difference is one
forward pass of it; with KL it is there anyway.
"""

import pathlib
import statistics
import sys
import time

import numpy as np
from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from actfocus_jax.cli import flags as flags_lib

_REPEATS = flags.DEFINE_integer('repeats', 9, 'Batches.', lower_bound=1)
_KL = {'off': 0.0, 'on': 0.001}
_WEIGHTS = ('uniform', 'actfocus')


def config_of(weights, coefficient):
  """The config of the command line, with other weights and KL."""
  c = flags_lib.config_with(f'weights={weights}')
  with c.unlocked():
    c.kl.coefficient = coefficient
  return c


def arms(build, model):
  """(weights, KL) -> (compiled train step, its state)."""
  made = {}
  for kl, coefficient in _KL.items():
    for weights in _WEIGHTS:
      c = config_of(weights, coefficient)
      learners = build.learners(c, model)
      made[weights, kl] = [build.train_step(c, learners), learners.create()]
  return made


def main(argv):
  del argv
  import jax

  from actfocus_jax import build, loop

  c = config_of('uniform', 0.0)
  rng, key = np.random.default_rng(0), jax.random.key(0)
  rollouts, updates = [], []
  with build.parts(c) as parts:
    cases = arms(build, parts.model)
    reference = parts.model.weights(parts.model.dtype)
    policy = build.policy(parts.model, cases['uniform', 'off'][1].actor.params)
    for repeat in range(_REPEATS.value + 1):  # the first one compiles
      first = 10_000 + repeat * c.rollout.prompts
      begin = time.perf_counter()
      played = parts.collector.collect(
        policy,
        range(first, first + c.rollout.prompts),
        loop.named_key(key, build.ROLLOUT, repeat),
        members=c.rollout.members,
        temperature=c.rollout.temperature,
      )
      batch = loop.to_batch(played, c, parts)
      rollout, took = time.perf_counter() - begin, {}
      for i in rng.permutation(len(cases)):
        name, (step, state) = list(cases.items())[i]
        begin = time.perf_counter()
        state, row = step.fused(state, reference, batch, key)
        jax.block_until_ready((state, row))
        took[name] = time.perf_counter() - begin
        cases[name][1] = state
      if repeat:
        rollouts.append(rollout)
        updates.append(took)
  report(rollouts, updates)


def report(rollouts, updates):
  """Ratios of ActFocus to uniform weights."""
  print(f'rollout {spread(rollouts, "s")}')
  for kl in _KL:
    for weights in _WEIGHTS:
      seconds = [took[weights, kl] for took in updates]
      print(f'KL {kl}, {weights}: update {spread(seconds, "s")}')
    pairs = [(took['actfocus', kl], took['uniform', kl]) for took in updates]
    alone = [a / u for a, u in pairs]
    whole = [
      (r + a) / (r + u) for r, (a, u) in zip(rollouts, pairs, strict=True)
    ]
    print(f'KL {kl}: update {spread(alone)}, whole step {spread(whole)}')


def spread(values, unit=''):
  """Median, least and greatest."""
  middle, low, high = statistics.median(values), min(values), max(values)
  return f'{middle:.3f}{unit} ({low:.3f} to {high:.3f})'


if __name__ == '__main__':
  flags_lib.run(main)
