"""`train --dry_run`: the config, the work of a step and its memory by formula.

Nothing is compiled and no weight is read. A compiler adds copies, padding to
tiles and fragmentation: leave a tenth of the memory free. The formula has parts
that live through the whole run, and three phases that take turns:

1. always: master weights and Adam's moments in float32 of each trained model,
   the frozen reference in the dtype of the computation;
2. rollout: the decoding copy of the policy, which fsdp does not split, and the
   KV cache;
3. gradient: the sum so far and that of the micro-batch, and the activations of
   one micro-batch;
4. optimizer step: the gradient, as it is and clipped, and the weight update.

Policy and critic are updated one after the other, each in a loop over the
mini-batches, and the later one reuses the memory of the earlier one. With one
mini-batch there is no loop: XLA interleaves the two updates, so that 3 and 4
hold those of both models.
"""

import ml_collections

from actfocus_jax.config import schema, validate
from actfocus_jax.model import architecture

_ITEMSIZE = {'float32': 4, 'bfloat16': 2, 'auto': 2}
_FLOAT32 = 4
# Arrays of [tokens, vocabulary] in float32 that live at the same time where
# logits are reduced: themselves, their softmax, and their gradient.
_LOGITS = 3
# Arrays of the MLP's hidden size that live while a layer is computed again and
# differentiated: gate, up, activation, product, and gradients of each.
_MLP = 8
# Arrays of attention scores there: themselves, the softmax, the gradient.
_SCORES = 3


def describe(c: ml_collections.ConfigDict, config: architecture.Config) -> str:
  """Return the effective config, the work of one step, and its memory."""
  lines = ['Config:']
  default = schema.flatten(schema.schema_of(c))
  for field, value in sorted(schema.flatten(c).items()):
    mark = ' ' if value == default[field] else '*'
    lines.append(f' {mark} {field} = {value!r}')
  lines += ['(* differs from the default)', '', 'One step:']
  lines += [f'  {name}: {value}' for name, value in work(c).items()]
  lines += ['', 'Memory of one device by formula, GB:']
  for part, size in needs(c, config).items():
    lines.append(f'  {part:<14} {size / 1e9:8.2f}')
  if c.model.dtype == 'auto':
    lines.append(
      '  (model.dtype=auto counted as 2 bytes; on a CPU it is float32, 4 bytes)'
    )
  is_open = [f'mesh.{name}' for name, size in c.mesh.items() if size < 1]
  if is_open:
    lines.append(f'  ({" and ".join(is_open)}, -1, counted as 1)')
  return '\n'.join(lines)


def work(c: ml_collections.ConfigDict) -> dict[str, str]:
  """Episodes, tokens and optimizer updates of one step."""
  episodes = c.rollout.prompts * c.rollout.members
  sampled = schema.most_turns(c) * c.limits.response_tokens
  return {
    'episodes': f'{episodes} ({c.rollout.prompts} groups of '
    f'{c.rollout.members})',
    'tokens sampled': f'at most {episodes * sampled:,}',
    'tokens in context': f'at most {episodes * c.limits.context:,}',
    'trajectories trained on': f'{validate.kept_rows(c)}',
    'optimizer updates': f'{_updates(c)} of {c.learner.minibatch} trajectories',
    'frozen reference': 'read' if schema.has_reference(c) else 'not read',
    'critic': 'trained' if c.algo == 'ppo' else 'none',
  }


def needs(
  c: ml_collections.ConfigDict, config: architecture.Config
) -> dict[str, float]:
  """Bytes of each part on one device, `per_device` for a config."""
  m = {name: max(size, 1) for name, size in c.mesh.items()}
  episodes = max(
    c.rollout.prompts * c.rollout.members, c.eval.prompts * c.eval.members
  )
  return per_device(
    config,
    algo=c.algo,
    slots=min(c.rollout.slots or episodes, episodes),
    context=c.limits.context,
    microbatch=c.learner.microbatch or c.learner.minibatch,
    score_chunk=c.learner.score_chunk,
    has_reference=schema.has_reference(c),
    data=m['data'] * m['dcn_data'],
    fsdp=m['fsdp'] * m['dcn_fsdp'],
    tensor=m['tensor'],
    itemsize=_ITEMSIZE[c.model.dtype],
    updates=_updates(c),
  )


def _updates(c: ml_collections.ConfigDict) -> int:
  """Optimizer updates of one step."""
  return validate.kept_rows(c) // c.learner.minibatch * c.learner.epochs


# --- Memory by formula --------------------------------------------------------


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
  """Bytes of each part on one device.

  Args:
    config: the architecture of policy, reference and critic.
    algo: 'grpo', or 'ppo', which trains a critic beside the policy.
    slots: episodes that decode at a time.
    context: most tokens of an episode.
    microbatch: trajectories in one backward pass.
    score_chunk: tokens that have logits at one time.
    has_reference: true if there is a frozen reference.
    data: size of the mesh axis `data`, which splits rows.
    fsdp: size of the axis that splits weights and rows.
    tensor: size of the axis that splits heads, hidden units and the
      vocabulary.
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
      f'microbatch={microbatch} is not a multiple of data * fsdp={data * fsdp}.'
    )
  rows = microbatch // (data * fsdp)
  critic = critic_parameters(c) if algo == 'ppo' else 0
  # A key head is not split: if there are too few, devices hold copies.
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
  """Number of parameters of a critic: a scalar head, no unembedding."""
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
