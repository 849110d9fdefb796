"""One GRPO iteration at the true shape of Qwen2.5-0.5B, on the CPU.

python tests/bench/full_size.py --config=SHAPE/config.json --tokenizer=DIR \
  [--out=DIR] [--prompts=2] [--members=2] [--iterations=2]

Makes a model directory with random weights in bfloat16 (the shape is that of a
real config.json), then measures in fresh processes:

1. loading: peak memory while the weights are read, as float32 and as bfloat16;
2. an iteration: rollout of prompts x members episodes of FrozenLake with short
   answers, score, update; seconds and peak memory of each phase, float32. The
   first iteration compiles. Rewards are drawn at random after the rollout:
   random weights earn none, and a batch without spread would not be learned
   from.

Memory is that of the process (VmRSS in /proc/self/status), read every 20 ms.
Random weights take as long as trained ones; what they say is noise.
"""

import argparse
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
GB = 1e9


class Memory:
  """Peak resident memory of this process by phase, in bytes."""

  def __init__(self):
    self.peaks: dict[str, float] = {}
    self.seconds: dict[str, float] = {}

  @contextlib.contextmanager
  def phase(self, name):
    done, peak = threading.Event(), [resident()]

    def watch():
      while not done.wait(0.02):
        peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.perf_counter()
    try:
      yield
    finally:
      self.seconds[name] = time.perf_counter() - begin
      done.set()
      watcher.join()
      self.peaks[name] = max(peak[0], resident())


def resident() -> int:
  for line in pathlib.Path('/proc/self/status').read_text().splitlines():
    if line.startswith('VmRSS:'):
      return int(line.split()[1]) * 1024
  raise RuntimeError('no VmRSS in /proc/self/status')


# --- Each in a process of its own --------------------------------------------


def make(args):
  """A directory of random weights in bfloat16, with the given tokenizer."""
  import jax
  import jax.numpy as jnp

  from actfocus_jax.model import architecture, hf, transformer
  from actfocus_jax.parallel import mesh as mesh_lib
  from actfocus_jax.text import chat

  raw = json.loads(args.config.read_text())
  config = architecture.Config.from_hf(raw)
  mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
  _, params = transformer.create(
    config, mesh, jax.random.key(0), dtype=jnp.float32, param_dtype=jnp.bfloat16
  )
  tokenizer = chat.load_tokenizer(args.tokenizer)
  hf.save(args.out / 'model', config, params, tokenizer=tokenizer)


def load(args):
  """Peak memory of reading the directory."""
  import jax
  import jax.numpy as jnp

  from actfocus_jax.model import hf
  from actfocus_jax.parallel import mesh as mesh_lib

  mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
  model, before, memory = args.out / 'model', resident(), Memory()
  with memory.phase('load'):
    _, _, params = hf.load(
      model, mesh, dtype=jnp.float32, param_dtype=jnp.dtype(args.dtype)
    )
    jax.block_until_ready(params)
  leaves = jax.tree.leaves(params)
  return {
    'dtype': args.dtype,
    'disk_gb': sum(f.stat().st_size for f in model.glob('*.safetensors')) / GB,
    'arrays_gb': sum(x.nbytes for x in leaves) / GB,
    'largest_array_gb': max(x.nbytes for x in leaves) / GB,
    'peak_gb': (memory.peaks['load'] - before) / GB,
    'seconds': memory.seconds['load'],
  }


def config_of(args):
  """FrozenLake with short answers, at the real shape."""
  from actfocus_jax.config import presets, schema, validate

  c = schema.defaults('frozen_lake')
  presets.apply(c, presets.arguments('size=0.5b'))
  c.model.path = str(args.out / 'model')
  c.model.dtype = 'float32'
  c.limits.turns, c.limits.response_tokens, c.limits.context = 2, 32, 768
  c.rollout.prompts, c.rollout.members = args.prompts, args.members
  c.rollout.slots, c.rollout.lengths = 0, (768,)
  c.learner.fused = False
  c.learner.minibatch = args.prompts * args.members
  c.learner.microbatch = 1
  c.eval.prompts = 1
  c.mesh.data = 1
  validate.check(c)
  return c


def iterate(args):
  """Seconds and peak memory of the phases of an iteration."""
  import jax

  from actfocus_jax import build, loop

  c, memory = config_of(args), Memory()
  with build.parts(c) as parts:
    model = parts.model
    learners = build.learners(c, model)
    step = build.train_step(c, learners)
    with memory.phase('load policy, reference, optimizer'):
      reference = model.weights(model.dtype)
      state = learners.create()
      jax.block_until_ready(state)
    key, row = jax.random.key(0), {}
    for i in range(args.iterations):
      first = 10_000 + i * c.rollout.prompts
      with memory.phase(f'{i} rollout'):
        played = parts.collector.collect(
          build.policy(model, state.actor.params),
          range(first, first + c.rollout.prompts),
          loop.named_key(key, build.ROLLOUT, i),
          members=c.rollout.members,
          temperature=c.rollout.temperature,
        )
      batch = with_rewards(loop.to_batch(played, c, parts), i)
      with memory.phase(f'{i} score'):
        update_batch, row = step.prepare(state, reference, batch, key)
        jax.block_until_ready(update_batch)
      with memory.phase(f'{i} update'):
        state, row = step.finish(state, update_batch, row, key)
        row = jax.device_get(row)
  return {
    'seconds': memory.seconds,
    'peak_gb': {name: peak / GB for name, peak in memory.peaks.items()},
    'sampled_tokens': sum(one.sampled_count for one in played.episodes),
    'tokens': sum(len(one.ids) for one in played.episodes),
    'row': {k: float(v) for k, v in row.items()},
  }


def with_rewards(batch, seed):
  """The batch with rewards of N(0, 1) on its turn ends."""
  import jax
  import jax.numpy as jnp

  reward_BT = jax.random.normal(jax.random.key(seed), batch.reward.shape)
  return batch.replace(reward=jnp.where(batch.turn_end, reward_BT, 0.0))


STAGES = {'make': make, 'load': load, 'iterate': iterate}


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--config', type=pathlib.Path, required=True)
  parser.add_argument('--tokenizer', type=pathlib.Path, required=True)
  parser.add_argument('--out', type=pathlib.Path, default='runs/full_size')
  parser.add_argument('--prompts', type=int, default=2)
  parser.add_argument('--members', type=int, default=2)
  parser.add_argument('--iterations', type=int, default=2)
  parser.add_argument('--dtype', default='float32')
  parser.add_argument('--stage', choices=STAGES)
  args = parser.parse_args()
  if args.stage:
    print(json.dumps(STAGES[args.stage](args)))
    return
  stages = ['load', 'load --dtype=bfloat16', 'iterate']
  if not (args.out / 'model').exists():
    stages.insert(0, 'make')
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'PYTHONPATH': str(ROOT),
    'TRANSFORMERS_VERBOSITY': 'error',
  }
  for stage in stages:
    print(f'{stage}: ', end='', flush=True)
    command = [sys.executable, __file__, *sys.argv[1:], '--stage']
    done = subprocess.run(
      [*command, *stage.split()],
      env=environment,
      stdout=subprocess.PIPE,
      text=True,
      check=True,
    )
    print(json.dumps(json.loads(done.stdout.splitlines()[-1]), indent=2))


if __name__ == '__main__':
  main()
