"""Sampled ids occur as often as the softmax says."""

import collections
import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

MEMBERS = 400


def probabilities(policy, ids, temperature):
  """Of the id after `ids`, by a full pass, in float64."""
  model = nnx.merge(policy.graphdef, policy.params)
  hidden_BTD = model.hidden(jnp.asarray([ids], jnp.int32))
  logits_V = np.asarray(model.unembed(hidden_BTD[0, -1]), np.float64)
  power_V = np.exp((logits_V - logits_V.max()) / temperature)
  return power_V / power_V.sum()


def chi_square(found, prob_V):
  """Pearson's statistic and its degrees of freedom; rare ids share a bin."""
  order = np.argsort(-prob_V)
  expected_V = prob_V[order] * len(found)
  bin_V = np.floor(np.cumsum(expected_V) / 8).astype(int)
  bin_V = np.unique(bin_V, return_inverse=True)[1]
  expected = np.bincount(bin_V, weights=expected_V)
  count_V = np.bincount(found, minlength=len(prob_V))[order]
  count = np.bincount(bin_V, weights=count_V)
  return ((count - expected) ** 2 / expected).sum(), len(count) - 1


def is_plausible(found, prob_V):
  """Within four standard deviations of what chance alone would give."""
  statistic, degrees = chi_square(found, prob_V)
  assert degrees >= 3
  return statistic < degrees + 4 * np.sqrt(2 * degrees)


@pytest.mark.slow
@pytest.mark.parametrize('temperature', [1.0, 1.7])
def test_frequencies_are_the_softmax(collect, policy, limits, temperature):
  """Three ids in a row: the first, and the third after the commonest two."""
  short = dataclasses.replace(limits, turns=1, response_tokens=3)
  episodes = collect(
    seeds=(3,), members=MEMBERS, temperature=temperature, limits=short
  ).episodes
  start = episodes[0].turns[0].start
  prompt = episodes[0].ids[:start]
  first = [episode.ids[start] for episode in episodes]
  prob_V = probabilities(policy, prompt, temperature)
  assert is_plausible(first, prob_V)
  other = {1.0: 1.7, 1.7: 1.0}[temperature]
  assert not is_plausible(first, probabilities(policy, prompt, other))

  pairs = collections.Counter(tuple(e.ids[start : start + 2]) for e in episodes)
  (pair, count) = pairs.most_common(1)[0]
  third = [e.ids[start + 2] for e in episodes if tuple(e.ids[start:-1]) == pair]
  assert len(third) == count > 30
  prob_V = probabilities(policy, [*prompt, *pair], temperature)
  assert is_plausible(third, prob_V)
