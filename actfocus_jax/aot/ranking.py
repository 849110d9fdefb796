"""How long an iteration would take on a mesh, by formula: to choose one.

Nothing is compiled. Decoding reads the weights and the view of the cache at
every step; a prefill of observations multiplies, and copies the cache about;
scoring and training compute, gather what `fsdp` splits and sum activations over
`tensor`. What this leaves out is much the same on every mesh.
"""

import math

import ml_collections

from actfocus_jax.aot import chips, links, topology, workload
from actfocus_jax.config import schema, validate
from actfocus_jax.model import architecture
from actfocus_jax.parallel import mesh_shapes
from actfocus_jax.rollout import collector

# Sums over `tensor` in a layer, forward.
_SUMS = 2
# Passes over a model that learns, with remat: forward, again, and backward,
# which multiplies twice as much and sums and gathers as often.
_PRODUCTS, _PASSES = 4, 3
# About how often a prefill of observations reads or writes the view of the
# cache. What the compiler makes of 3B: on v5e and v6e 3 to 4 times, but 10 with
# 32 rows and tensor=2, on v5p 8 to 15 times.
_COPIES = {'v5e': 4, 'v6e': 4, 'v5p': 10}
_ITEMSIZE, _FLOAT32 = 2, 4


def seconds(
  c: ml_collections.ConfigDict,
  config: architecture.Config,
  shape: mesh_shapes.Shape,
  where: topology.Topology,
  work: workload.Workload,
) -> float:
  """Returns about how long an iteration takes, to compare meshes.

  Args:
    c: A checked config whose batches the mesh can share.
    config: Of the model.
    shape: The mesh.
    where: The slices.
    work: How long episodes are.
  """
  spans = links.Torus(where.sizes).spans(shape.inside)
  joined = dict(zip(mesh_shapes.AXES, spans, strict=True))
  return _rollout(c, config, shape, where, work, joined) + _learning(
    c, config, shape, where, work, joined
  )


def _rollout(c, config, shape, where, work, joined) -> float:
  """Of all steps and prefills: the longest of memory, compute and network."""
  chip, size = where.chip, shape.total
  shards, tensor = size['data'] * size['fsdp'], size['tensor']
  episodes = c.rollout.prompts * c.rollout.members
  slots = min(c.rollout.slots or episodes, episodes)
  rows = math.ceil(slots / shards)
  weights = config.num_parameters * _ITEMSIZE / tensor
  keys = 2 * config.num_layers * config.held_heads(tensor) * config.head_dim

  def cache(length: int) -> float:
    return rows * _view(c, length) * keys * _ITEMSIZE

  def network(tokens: int) -> float:
    return _sums_of_a_pass(tokens, config, tensor, chip, joined['tensor'])

  decoding = sum(
    calls * work.steps * max(_read(chip, weights, cache(n)), network(rows))
    for n, calls in work.decoding().items()
  )
  block = c.rollout.observation_block
  tokens = math.ceil(rows / 4) * collector.double_up(
    work.observation_tokens, block
  )
  products = 2 * config.num_parameters * tokens / tensor / chip.flops
  moved = {
    n: _read(chip, weights, _COPIES[chip.name] * cache(n))
    for n in work.turn_ends()
  }
  prefills = sum(
    calls * max(products, moved[n], network(tokens))
    for n, calls in work.turn_ends().items()
  )
  return math.ceil(episodes / slots) * (decoding + prefills)


def _view(c, length: int) -> int:
  """Positions of the cache that are looked at for slots of a length."""
  block = c.rollout.cache_block
  most = collector.round_up(c.limits.context, block)
  return min(collector.double_up(length, block), most)


def _read(chip, *sizes: float) -> float:
  return sum(sizes) / chip.hbm_bandwidth


def _sums_of_a_pass(tokens, config, tensor: int, chip, joined) -> float:
  """Seconds of what a forward pass sends over the tensor axis."""
  whole = _SUMS * config.num_layers
  whole *= _sum_over_tensor(tokens, config, tensor, chip, joined)
  if tensor > config.num_key_value_heads:
    # New keys and values become whole first.
    whole += 2 * config.num_layers * joined.hops * chips.HOP
  return whole


def _learning(c, config, shape, where, work, joined) -> float:
  """Of scoring and training: the longer of compute and network."""
  chip, size = where.chip, shape.total
  shards, tensor = size['data'] * size['fsdp'], size['tensor']
  kept = validate.kept_rows(c)
  micro = c.learner.microbatch or c.learner.minibatch
  models = 2 if c.algo == 'ppo' else 1
  scored = models + schema.has_reference(c)
  trained = models * c.learner.epochs
  passes = scored + trained * _PASSES
  tokens = math.ceil(kept / shards) * work.length
  products = 2 * config.num_parameters * tokens / tensor
  products *= scored + trained * _PRODUCTS
  sums = passes * _SUMS * config.num_layers
  network = sums * _sum_over_tensor(
    tokens, config, tensor, chip, joined['tensor']
  )
  parts = math.ceil(kept / micro)
  away = (size['fsdp'] - 1) / size['fsdp']
  gathered = config.num_parameters * _ITEMSIZE / tensor * away * parts * passes
  # Gradients are summed in float32 at every micro-batch: over `fsdp` each
  # device gets its own part, of which those along `data` get the sum.
  along_fsdp = config.num_parameters * _FLOAT32 / tensor * parts * trained
  along_data = along_fsdp * 2 / size['fsdp'] * (1 - 1 / size['data'])
  network += (
    (gathered + along_fsdp * away) / joined['fsdp'].share
    + along_data / joined['data'].share
  ) / chip.ici_bandwidth
  return max(products / chip.flops, network)


def _sum_over_tensor(tokens, config, tensor: int, chip, joined) -> float:
  """Seconds of one sum of hidden states over the tensor axis."""
  sent = 2 * tokens * config.hidden_size * _ITEMSIZE * (tensor - 1) / tensor
  return max(
    sent / (chip.ici_bandwidth * joined.share), 2 * joined.hops * chips.HOP
  )
