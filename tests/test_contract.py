"""Names that scripts outside the project call, with their arguments."""

import importlib
import inspect

import pytest

SIGNATURES = {
  'algorithm.signals.energy': 'logits_BTV',
  'algorithm.weights.token_weights': (
    'signal_BT sampled_BT action_BT * alpha beta eps'
  ),
  'algorithm.advantages.group_relative': 'return_PG * normalize_std eps',
  'algorithm.advantages.gae': 'reward_BT value_BT sampled_BT * discount lam',
  'algorithm.selection.keep_groups': 'return_PG * ratio rule',
  'algorithm.losses.policy_loss': (
    'logprob_BT old_logprob_BT advantage_BT weight_BT * clip_low clip_high '
    'dual_clip'
  ),
  'algorithm.losses.value_loss': (
    'value_BT old_value_BT return_BT sampled_BT * clip'
  ),
  'algorithm.losses.kl': 'logprob_BT ref_logprob_BT sampled_BT * estimator',
  'model.scoring.score_tokens': (
    'graphdef params tokens_BT valid_BT * temperature chunk'
  ),
  'model.hf.load': 'directory mesh * dtype',
  'model.hf.save': 'directory config params * tokenizer',
  'text.chat.token_bytes': 'tokenizer ids',
  'text.chat.action_mask': 'pieces',
  'text.chat.parse_answer': 'text',
}


@pytest.mark.parametrize('name', SIGNATURES)
def test_public_signature_unchanged(name):
  module, _, function = name.rpartition('.')
  module = importlib.import_module(f'actfocus_jax.{module}')
  parameters = inspect.signature(getattr(module, function)).parameters
  positional, _, keywords = SIGNATURES[name].partition('*')
  names = list(parameters)
  assert names[: len(positional.split())] == positional.split()
  assert set(keywords.split()) <= set(names)
