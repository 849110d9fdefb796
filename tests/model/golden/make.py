"""Makes the golden models: small random ones, and torch's results for them.

transformers builds each variant, every weight is drawn, transformers writes the
directory and reads it again, and torch computes `expected.npz` in float32.
Tests read both and need no torch. Run by hand, where torch is installed; it
replaces the directories beside it. A longer form of this script made them with
torch 2.13.0, transformers 5.23.0, safetensors 0.8.0 and numpy 2.4.6, on CPU.
"""

import pathlib
import shutil
from typing import NamedTuple

import numpy as np
import torch
import transformers

NEW_TOKENS = 64
TEMPERATURE = 0.7
CLASSES = {
  'qwen2': (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
  'qwen3': (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}


class Variant(NamedTuple):
  """One model: `heads` are query heads, key heads and the size of a head."""

  family: str
  heads: tuple[int, int, int]
  width: int
  hidden: int
  layers: int
  vocab: int
  theta: float
  eps: float
  tied: bool
  seed: int
  dtype: str = 'float32'
  shard: str = '1GB'  # Largest file.


# Layers, widths and key heads as uneven as the architecture allows, and a pair
# whose sizes divide over a mesh of eight devices. The seeds are chosen for
# continuations that vary and are no close calls.
VARIANTS = {
  'qwen2_tied': Variant(
    *('qwen2', (6, 1, 6), 36, 52, 3, 101),
    **dict(theta=1e4, eps=1e-2, tied=True, seed=1),
  ),
  'qwen2_tied_bfloat16': Variant(
    *('qwen2', (4, 2, 8), 32, 48, 2, 96),
    **dict(theta=500.0, eps=1e-3, tied=True, seed=8, dtype='bfloat16'),
  ),
  'qwen2_untied_sharded': Variant(
    *('qwen2', (4, 2, 10), 25, 37, 2, 97),
    **dict(theta=1e6, eps=1e-6, tied=False, seed=8, shard='20KB'),
  ),
  'qwen3_tied': Variant(
    *('qwen3', (4, 2, 8), 28, 43, 3, 101),
    **dict(theta=1e4, eps=1e-6, tied=True, seed=8),
  ),
  'qwen3_untied_float16': Variant(
    *('qwen3', (6, 3, 4), 35, 53, 2, 103),
    **dict(theta=50.0, eps=1e-2, tied=False, seed=3, dtype='float16'),
  ),
  'qwen3_untied_sharded': Variant(
    *('qwen3', (8, 2, 8), 32, 48, 2, 96),
    **dict(theta=1e6, eps=1e-3, tied=False, seed=7, shard='20KB'),
  ),
}


def build(variant: Variant) -> torch.nn.Module:
  """Returns the model in float32, nothing in it at its initial value."""
  make_config, make_model = CLASSES[variant.family]
  query, key, size = variant.heads
  # Where a head is what the heads leave of the width, Qwen2's own files do not
  # name its size.
  named = variant.family != 'qwen2' or query * size != variant.width
  config = make_config(
    vocab_size=variant.vocab,
    hidden_size=variant.width,
    intermediate_size=variant.hidden,
    num_hidden_layers=variant.layers,
    num_attention_heads=query,
    num_key_value_heads=key,
    rope_parameters={'rope_type': 'default', 'rope_theta': variant.theta},
    rms_norm_eps=variant.eps,
    tie_word_embeddings=variant.tied,
    max_position_embeddings=512,
    attn_implementation='eager',
    **({'head_dim': size} if named else {}),
  )
  model = make_model(config).eval().requires_grad_(False)
  draw(model, variant.seed)
  return model


def draw(model: torch.nn.Module, seed: int) -> None:
  """Fills every parameter: wide enough that logits and attention differ.

  NumPy draws, so that a seed means the same in every version of torch.
  """
  rng = np.random.default_rng(seed)
  for name, parameter in sorted(model.named_parameters()):
    noise = rng.standard_normal(tuple(parameter.shape))
    if 'norm' in name:
      value = 1 + 0.4 * noise
    elif name.endswith('bias'):
      value = 0.3 * noise
    elif 'embed' in name:
      # Small beside what the layers add: a tied model would else say its last
      # token for ever.
      value = 0.25 * noise
    else:
      value = 1.2 * noise / parameter.shape[1] ** 0.5
    parameter.copy_(torch.tensor(value))


def write(variant: Variant, directory: pathlib.Path) -> torch.nn.Module:
  """Writes a variant; returns it as transformers reads it, in float32.

  Read again, because `model.to(torch.bfloat16)` also rounds the frequencies of
  the rotary positions, which no file holds and `.float()` does not bring back.
  """
  model = build(variant).to(getattr(torch, variant.dtype))
  model.save_pretrained(directory, max_shard_size=variant.shard)
  return transformers.AutoModelForCausalLM.from_pretrained(
    directory, dtype=torch.float32, attn_implementation='eager'
  ).eval()


def expect(model: torch.nn.Module, seed: int) -> dict[str, np.ndarray]:
  """Returns the results of a float32 model, a row at a time, without padding.

  tokens_BT and length_B: random ids, the rows padded with zeros. Of these:
  logits_BTV; and, of every token given those before it, logprob_BT,
  cool_logprob_BT (at TEMPERATURE), logsumexp_BT and entropy_BT. greedy_BN:
  the ids of `generate(do_sample=False)` after them. margin: the smallest lead
  of one of those over the second best.
  """
  rng = np.random.default_rng([seed, 1])
  lengths = (23, 14)
  rows = [rng.integers(0, model.config.vocab_size, n) for n in lengths]
  found, margins = [], []
  for tokens_T in rows:
    tokens_BT = torch.tensor(tokens_T)[None]
    out_BT = model.generate(
      tokens_BT,
      attention_mask=torch.ones_like(tokens_BT),
      do_sample=False,
      max_new_tokens=NEW_TOKENS,
    )
    with torch.no_grad():
      logits_TV = model(tokens_BT, use_cache=False).logits[0].numpy()
      all_TV = model(out_BT, use_cache=False).logits[0].numpy()
    second, first = np.sort(all_TV[len(tokens_T) - 1 : -1], axis=1)[:, -2:].T
    margins.append(np.min(first - second))
    greedy_N = out_BT[0, len(tokens_T) :].numpy().astype(np.int32)
    scores = score(logits_TV, tokens_T)
    found.append({'logits_BTV': logits_TV, 'greedy_BN': greedy_N, **scores})
  return {
    'tokens_BT': pad(rows).astype(np.int32),
    'length_B': np.array(lengths, np.int32),
    'margin': min(margins),
    **{name: pad([row[name] for row in found]) for name in found[0]},
  }


def pad(rows: list[np.ndarray]) -> np.ndarray:
  """Stacks arrays of unequal length, zeros after the shorter ones."""
  padded = np.zeros((len(rows), max(map(len, rows)), *rows[0].shape[1:]))
  for target, row in zip(padded, rows, strict=True):
    target[: len(row)] = row
  return padded.astype(rows[0].dtype)


def score(logits_TV: np.ndarray, tokens_T: np.ndarray) -> dict[str, np.ndarray]:
  """Returns what logits say of each token after the first, in float64."""
  logits = torch.tensor(logits_TV[:-1], dtype=torch.float64)
  target = torch.tensor(tokens_T[1:])[:, None]
  warm = torch.log_softmax(logits, -1)
  cool = torch.log_softmax(logits / TEMPERATURE, -1)
  scores = {
    'logprob_BT': warm.gather(1, target)[:, 0],
    'cool_logprob_BT': cool.gather(1, target)[:, 0],
    'logsumexp_BT': torch.logsumexp(logits, -1),
    'entropy_BT': torch.distributions.Categorical(logits=logits).entropy(),
  }
  return {name: np.pad(x.numpy(), (1, 0)) for name, x in scores.items()}


def main() -> None:
  """Writes the directory of every variant."""
  torch.set_num_threads(1)
  for name, variant in VARIANTS.items():
    directory = pathlib.Path(__file__).parent / name
    shutil.rmtree(directory, ignore_errors=True)
    expected = expect(write(variant, directory), seed=variant.seed)
    # Rounding moves logits by some 1e-6; another seed has a clearer choice.
    assert expected['margin'] > 1e-4, 'a greedy choice is too close'
    np.savez(directory / 'expected.npz', **expected)


if __name__ == '__main__':
  main()
