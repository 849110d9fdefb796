"""How long an iteration would take on a mesh, by formula: to choose one.

Nothing is compiled. Decoding reads the weights and the cache at every step;
scoring and training compute, gather what `fsdp` splits and sum activations over
`tensor`. What this leaves out is much the same on every mesh.
"""

import math

import ml_collections

from actfocus_jax.aot import chips, links, topology, workload
from actfocus_jax.model import architecture
from actfocus_jax.parallel import mesh_shapes
from actfocus_jax.run import checks, settings

# Sums over `tensor` in a layer, forward.
_SUMS = 2
# Passes over a model that learns, with remat: forward, again, and backward,
# which multiplies twice as much and sums and gathers as often.
_PRODUCTS, _PASSES = 4, 3
# What decoding takes longer where `tensor` is more than the key heads: compiled
# programs of 1.5B and 3B on 16 chips move 1.2 to 1.4 times what the formula
# says then, most of it in the prefill of observations.
_REPEATED = 1.3
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
  return _decoding(c, config, shape, where, work, joined) + _learning(
    c, config, shape, where, work, joined
  )


def _decoding(c, config, shape, where, work, joined) -> float:
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
  network = sums * _sum_over_tensor(
    rows, config, tensor, chip, joined['tensor']
  )
  dearer = 1.0
  if tensor > config.num_key_value_heads:
    # New keys and values become whole first.
    network += 2 * config.num_layers * joined['tensor'].hops * chips.HOP
    dearer = _REPEATED
  step = dearer * max(read / chip.hbm_bandwidth, network)
  return work.sampled * math.ceil(episodes / slots) * step


def _learning(c, config, shape, where, work, joined) -> float:
  """Of scoring and training: the longer of compute and network."""
  chip, size = where.chip, shape.total
  shards, tensor = size['data'] * size['fsdp'], size['tensor']
  kept = checks.kept_rows(c)
  micro = c.learner.microbatch or c.learner.minibatch
  models = 2 if c.algo == 'ppo' else 1
  scored = models + settings.has_reference(c)
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
