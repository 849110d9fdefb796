"""How much memory a run needs on each device, by formula.

Nothing is compiled and no weight is read, so this answers in no time and for
machines that one does not have. What a compiler adds (copies, padding to
tiles, fragmentation) is not in it: leave a tenth free. Parts that live through
the whole run, and those of the three phases that take turns:

1. always: master weights and Adam's moments in float32 of each trained model,
   the frozen reference in the dtype of the computation;
2. rollout: the decoding copy of the policy, which fsdp does not split, and the
   cache of keys and values;
3. gradient: the one summed so far and that of the micro-batch, and the
   activations of one micro-batch;
4. optimizer step: the gradient, as it is and clipped, and what is added to the
   weights.

Policy and critic are updated one after the other, each in a loop over the
mini-batches, and the later one takes the memory of the earlier one. Where there
is one mini-batch there is no loop: XLA mixes the two updates, so that 3 and 4
hold those of both models.
"""

from actfocus_jax.model import architecture

_FLOAT32 = 4
# Arrays of [tokens, vocabulary] in float32 that live at the same time where
# logits are reduced: themselves, their softmax, and their gradient.
_LOGITS = 3
# Arrays of the MLP's hidden size that live while a layer is computed again and
# differentiated: gate, up, activation, product, and gradients of each.
_MLP = 8
# Arrays of attention scores likewise: themselves, the softmax, the gradient.
_SCORES = 3


def per_device(
  config: architecture.Config,
  *,
  algo: str,
  slots: int,
  context: int,
  microbatch: int,
  score_chunk: int,
  has_reference: bool = True,
  data: int = 1,
  fsdp: int = 1,
  tensor: int = 1,
  itemsize: int = 2,
  updates: int = 1,
) -> dict[str, float]:
  """Returns the bytes of each part on one device.

  Args:
    config: the architecture of policy, reference and critic.
    algo: 'grpo', or 'ppo', which trains a critic beside the policy.
    slots: episodes that decode at a time.
    context: most tokens of an episode.
    microbatch: trajectories in one backward pass.
    score_chunk: tokens that have logits at one time.
    has_reference: whether there is a frozen reference.
    data: size of the mesh axis; this and the two below.
    fsdp: splits weights and rows.
    tensor: splits heads, hidden units and the vocabulary.
    itemsize: bytes of a number in the computation: 2 for bfloat16.
    updates: optimizer updates of an iteration, of each model.

  Returns:
    Part -> bytes. `total` counts the largest of the phases.

  Raises:
    ValueError: if the devices cannot share the micro-batch.
  """
  c, count = config, config.num_parameters
  split = fsdp * tensor
  if microbatch % (data * fsdp):
    raise ValueError(
      f'microbatch={microbatch} is no multiple of data * fsdp={data * fsdp}.'
    )
  rows = microbatch // (data * fsdp)
  critic = critic_parameters(c) if algo == 'ppo' else 0
  # A key head is not cut: of too few of them, devices hold the same ones.
  keys = 2 * c.num_layers * c.held_heads(tensor) * c.head_dim
  always = {
    'actor': count * _FLOAT32 / split,
    'critic': critic * _FLOAT32 / split,
    'optimizers': 2 * (count + critic) * _FLOAT32 / split,
    'reference': has_reference * count * itemsize / split,
  }
  rollout = {
    'decoding copy': count * itemsize / tensor,
    'cache': slots / (data * fsdp) * context * keys * itemsize,
  }
  together = count + critic if updates == 1 else max(count, critic)
  one_each = together * _FLOAT32 / split
  gradient = {
    'gradients': 2 * one_each,
    'activations': _activations(
      c, rows * context, context, score_chunk, tensor, itemsize
    ),
  }
  step = {'optimizer step': 3 * one_each}
  phase = max(sum(parts.values()) for parts in (rollout, gradient, step))
  total = sum(always.values()) + phase
  return always | rollout | gradient | step | {'total': total}


def critic_parameters(config: architecture.Config) -> int:
  """A policy's, with a number per unit in place of the unembedding."""
  c = config
  own_table = 0 if c.tie_word_embeddings else c.vocab_size * c.hidden_size
  return c.num_parameters - own_table + c.hidden_size


def _activations(
  c: architecture.Config,
  tokens: int,
  context: int,
  score_chunk: int,
  tensor: int,
  itemsize: int,
) -> float:
  """Bytes of a micro-batch, at the later of two peaks of its backward pass.

  The inputs of all layers are kept. First the logits of one piece exist, with
  the unembedding in float32 and its gradient; then one layer is computed again
  and differentiated, in which the blocks of attention overlap.
  """
  table = c.vocab_size * c.hidden_size * _FLOAT32 / tensor
  kept = tokens * c.num_layers * c.hidden_size * itemsize
  logits = _LOGITS * min(score_chunk, tokens) * c.vocab_size * _FLOAT32
  heads = 2 * (c.num_heads + 2 * c.num_key_value_heads) * c.head_dim
  units = (heads + _MLP * c.intermediate_size) / tensor + 4 * c.hidden_size
  # Causal: half of the pairs of positions.
  scores = _SCORES * c.num_heads * context / 2 * _FLOAT32 / tensor
  layer = tokens * (itemsize * units + scores)
  return kept + max(2 * table + logits, table + layer)
