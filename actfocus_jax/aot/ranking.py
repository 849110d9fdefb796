"""How long an iteration would take on a mesh, by formula: to choose one.

Nothing is compiled. Decoding reads the weights and the cache at every step;
scoring and training compute, gather what `fsdp` splits and sum activations over
`tensor`. What this leaves out is much the same on every mesh.
"""

import math

import ml_collections

from actfocus_jax.aot import chips, collectives, topology, workload
from actfocus_jax.model import architecture
from actfocus_jax.parallel import mesh_shapes
from actfocus_jax.run import checks, settings

# Sums over `tensor` in a layer, forward; what a forward pass costs in them,
# in products, and in gathers of the weights: forward, and with remat forward
# twice and backward.
_SUMS = 2
_SCORED, _TRAINED = 1, 4
# What decoding takes longer where key heads are repeated: compiled programs of
# 1.5B and 3B on 16 chips move 1.2 to 1.4 times what the formula says then, most
# of it in the prefill of observations.
_REPEATED = 1.3
_ITEMSIZE = 2


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
  return _decoding(c, config, shape, where, work) + _learning(
    c, config, shape, where, work
  )


def _decoding(c, config, shape, where, work) -> float:
  """Of all steps: the longer of memory and network."""
  chip, size = where.chip, shape.total
  shards, tensor = size['data'] * size['fsdp'], size['tensor']
  episodes = c.rollout.prompts * c.rollout.members
  slots = min(c.rollout.slots or episodes, episodes)
  rows = math.ceil(slots / shards)
  keys = 2 * config.num_layers * config.held_heads(tensor) * config.head_dim
  read = config.num_parameters / tensor
  read += rows * work.length / 2 * keys
  read *= _ITEMSIZE
  sums = _SUMS * config.num_layers
  network = sums * _sum_over_tensor(rows, config, tensor, where)
  step = max(read / chip.hbm_bandwidth, network)
  if config.key_repeats(tensor) > 1:
    step *= _REPEATED
  return work.sampled * math.ceil(episodes / slots) * step


def _learning(c, config, shape, where, work) -> float:
  """Of scoring and training: the longer of compute and network."""
  chip, size = where.chip, shape.total
  shards, tensor = size['data'] * size['fsdp'], size['tensor']
  kept = checks.kept_rows(c)
  micro = c.learner.microbatch or c.learner.minibatch
  # Passes of a model over the kept rows, forward ones counted as 1.
  models = 2 if c.algo == 'ppo' else 1
  scored = models + settings.has_reference(c)
  passes = scored * _SCORED + models * _TRAINED * c.learner.epochs
  tokens = math.ceil(kept / shards) * work.length
  products = 2 * config.num_parameters * tokens * passes / tensor
  sums = passes * _SUMS * config.num_layers
  network = sums * _sum_over_tensor(tokens, config, tensor, where)
  parts = math.ceil(kept / micro)
  gathered = config.num_parameters * _ITEMSIZE / tensor
  gathered *= (size['fsdp'] - 1) / size['fsdp'] * parts * passes
  # Gradients in float32 are summed over `data` at every micro-batch.
  split = size['fsdp'] * tensor
  summed = 2 * config.num_parameters * 4 / split * (1 - 1 / size['data'])
  summed *= parts * models * c.learner.epochs
  network += (gathered + summed) / chip.ici_bandwidth
  return max(products / chip.flops, network)


def _sum_over_tensor(tokens, config, tensor: int, where) -> float:
  """Seconds of one sum of hidden states over the tensor axis."""
  if tensor == 1:
    return 0.0
  sent = 2 * tokens * config.hidden_size * _ITEMSIZE * (tensor - 1) / tensor
  hops = 2 * collectives.hops(tensor, where.dimensions)
  return max(sent / where.chip.ici_bandwidth, hops * chips.HOP)
