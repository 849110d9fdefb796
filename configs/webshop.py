"""WebShop, with the paper's settings.

python -m actfocus_jax.train --config=configs/webshop.py:size=0.5b \
  --config.env.options.data=WEBSHOP --workdir=runs/webshop

WEBSHOP is a directory with the public files: items_shuffle_1000.json,
items_ins_v2_1000.json and so on. Without it, a small built-in shop is used.

Hardware and time: an accelerator for the sizes 0.5b to 7b. size=tiny takes 30
minutes of CPU time, half of them for the warm start.
Expected: with size=tiny held-out success from 7.8 % to 10.5 % in 20 steps and
12.1 % in 40 (seed 0; the intervals include no gain; results/README.md). Other
sizes are not measured. Random clicks buy the right product in 0.2 % of the
episodes.
"""

from actfocus_jax.config import presets, schema


def get_config(arg=None):
  """Arguments: size=tiny|0.5b|1.5b|3b|7b, algo=, weights=, estimator=."""
  choice = presets.arguments(arg)
  c = schema.defaults('webshop')
  c.num_steps = 100
  c.rollout.prompts, c.rollout.members = 16, 8
  c.eval.prompts, c.eval.members = 256, 1
  if choice['algo'] == 'grpo':
    c.kl.update(coefficient=0.001, estimator='k1')
  presets.apply(c, choice)
  if choice['size'] == 'tiny':
    c.env.options.results_per_page = 3
    c.player.options.skill = 0.6
    c.player.options.habit = 0.25
    c.warm_start.update(steps=500, batch=16, observation_weight=1.0)
    c.num_steps = 20
    c.eval.every = 20
    c.rollout.prompts = 8
    c.selection.ratio = 0.5
    c.learner.update(minibatch=32, microbatch=16)
  else:
    c.limits.context = 8192
    c.rollout.lengths = (2048, 4096, 8192)
  c.lock()
  return c
