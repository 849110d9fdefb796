"""The gradient of a mini-batch: by a loop, in pieces, and where there is none.

Gradients are compared, not Adam's steps: Adam divides by the size of the
gradient, so it makes a step of a rounding error.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest


def assert_close(found, wanted, tolerance=1e-5):
  """Every leaf, to a share of the largest entry of the wanted gradient."""
  scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(wanted))
  assert scale > 1e-3
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      np.asarray(a), np.asarray(b), rtol=1e-3, atol=tolerance * scale
    ),
    found,
    wanted,
  )


def largest(tree):
  return max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))


# --- Against a loop ----------------------------------------------------------


def loop_advantages(batch, members=4):
  """(R - mean) / (std + 1e-6) by row, with the unbiased standard deviation."""
  returns = [math.fsum(row.tolist()) for row in batch.reward]
  advantages = []
  for first in range(0, len(returns), members):
    group = returns[first : first + members]
    mean = math.fsum(group) / members
    variance = math.fsum((x - mean) ** 2 for x in group) / (members - 1)
    std = math.sqrt(variance)
    advantages += [(x - mean) / (std + 1e-6) if std else 0.0 for x in group]
  return advantages


def loop_actfocus_weights(batch, signal_BT, alpha, beta):
  action = [float(s) for s in np.asarray(signal_BT)[batch.action]]
  mean = math.fsum(action) / len(action)
  variance = math.fsum((s - mean) ** 2 for s in action) / len(action)
  weight_BT = np.zeros(batch.tokens.shape)
  for b, t in zip(*np.nonzero(batch.sampled), strict=True):
    weight_BT[b, t] = alpha
    if batch.action[b, t]:
      z = (float(signal_BT[b, t]) - mean) / math.sqrt(variance + 1e-6)
      weight_BT[b, t] = 1 + beta / (1 + math.exp(-z))
  return weight_BT


def loop_grpo(batch, logprob_BT, weight_BT=None):
  """(loss, d loss / d logprob): ratio, clip, mean over the sampled tokens."""
  total, mass, tokens = 0.0, 0.0, list(np.argwhere(batch.sampled))
  slope_BT = np.zeros(batch.tokens.shape)
  advantage_B = loop_advantages(batch)
  clipped = 0
  for b, t in tokens:
    weight = 1.0 if weight_BT is None else weight_BT[b, t]
    ratio = math.exp(float(logprob_BT[b, t]) - float(batch.logprob[b, t]))
    free = ratio * advantage_B[b]
    bounded = min(max(ratio, 0.8), 1.28) * advantage_B[b]
    total -= weight * min(free, bounded)
    mass += weight
    # Only the unclipped branch depends on the policy: d ratio = ratio.
    slope_BT[b, t] = -weight * free if free <= bounded else 0.0
    clipped += bounded < free
  assert 0 < clipped < len(tokens)
  return total / mass, slope_BT / mass


@pytest.fixture(scope='module')
def chain(model, score):
  """Gradient of sum_t slope_t logprob_t - 0.1 mean_t entropy_t."""

  def surrogate(params, batch, slope_BT):
    scores = score(model[0], params, batch.tokens, batch.valid)
    entropy = jnp.where(batch.sampled, scores.entropy_BT, 0).sum()
    count = batch.sampled.sum(dtype=jnp.float32)
    return jnp.sum(scores.logprob_BT * slope_BT) - 0.1 * entropy / count

  compiled = jax.jit(jax.grad(surrogate))
  return lambda batch, slope_BT: compiled(
    model[1], batch, slope_BT.astype(np.float32)
  )


@pytest.mark.parametrize('method', ['uniform', 'actfocus'])
def test_equals_a_loop(
  method, model, reference, batch, step_config, prepared, score, gradient, chain
):
  """Uniform is plain GRPO: its loop knows no weights."""
  graphdef, params = model
  alpha, beta = {'uniform': (1.0, 0.0), 'actfocus': (0.1, 0.5)}[method]
  minibatch, _ = prepared(
    batch, step_config(weights__alpha=alpha, weights__beta=beta)
  )
  grads, metrics = gradient(minibatch, step_config())

  weight_BT = None
  if method == 'actfocus':
    scores = score(graphdef, reference, batch.tokens, batch.valid)
    weight_BT = loop_actfocus_weights(batch, -scores.logsumexp_BT, alpha, beta)
    assert np.std(weight_BT[batch.action]) > 0.01
  now = score(graphdef, params, batch.tokens, batch.valid)
  loss, slope_BT = loop_grpo(batch, now.logprob_BT, weight_BT)
  entropy = np.asarray(now.entropy_BT, np.float64)[batch.sampled].mean()
  for name, value in (
    ('policy_loss', loss),
    ('entropy', entropy),
    ('loss', loss - 0.1 * entropy),
  ):
    np.testing.assert_allclose(
      metrics[f'actor/{name}'], value, rtol=1e-4, err_msg=name
    )
  assert_close(grads, chain(batch, slope_BT), 1e-4)


# --- In pieces ---------------------------------------------------------------


def test_micro_batches_give_the_same_gradient(
  batch, step_config, prepared, gradient
):
  """One, two and eight of them."""
  minibatch, _ = prepared(batch, step_config())
  counts = minibatch.sampled_BT.reshape(8, -1).sum(axis=1)
  assert len(set(counts.tolist())) > 1  # A mean of means would differ.
  wanted, metrics = gradient(minibatch, step_config())
  for rows in (8, 2):
    grads, found = gradient(minibatch, step_config(learner__microbatch=rows))
    assert_close(grads, wanted)
    for name, value in metrics.items():
      np.testing.assert_allclose(
        found[name], value, rtol=1e-4, atol=1e-6, err_msg=name
      )


# --- Where there is none -----------------------------------------------------


def test_tokens_that_were_not_sampled_change_nothing(
  batch, step_config, prepared, gradient
):
  """Prompts, observations, forced tokens and padding."""
  chosen = step_config()
  minibatch, _ = prepared(batch, chosen)
  np.testing.assert_array_equal(minibatch.weight_BT > 0, batch.sampled)
  wanted, _ = gradient(minibatch, chosen)
  off = ~batch.sampled
  loud = dataclasses.replace(
    minibatch,
    advantage_BT=jnp.where(off, 50.0, minibatch.advantage_BT),
    old_logprob_BT=jnp.where(off, -3.0, minibatch.old_logprob_BT),
    tokens_BT=jnp.where(batch.valid, minibatch.tokens_BT, 9),
  )
  assert (loud.tokens_BT != minibatch.tokens_BT).any()
  found, _ = gradient(loud, chosen)
  assert largest(wanted) > 1e-3
  jax.tree.map(np.testing.assert_array_equal, found, wanted)
  # The same changes on a token that was sampled are seen.
  loud = dataclasses.replace(
    minibatch,
    advantage_BT=jnp.where(batch.sampled, 5.0, minibatch.advantage_BT),
  )
  assert largest(jax.tree.map(jnp.subtract, gradient(loud, chosen)[0], wanted))


def test_the_stop_token_is_trained(batch, step_config, prepared, gradient):
  """With the weight of a thought, and towards its own column of the head."""
  minibatch, _ = prepared(batch, step_config())
  np.testing.assert_array_equal(minibatch.tokens_BT == 1, batch.turn_end)
  taught = batch.turn_end & (np.asarray(minibatch.advantage_BT) != 0)
  row, token = np.argwhere(taught)[0].tolist()
  assert minibatch.weight_BT[row, token] == np.float32(0.1)
  mute_BT = jnp.where(batch.turn_end, 0.0, minibatch.weight_BT)
  mute = dataclasses.replace(minibatch, weight_BT=mute_BT)
  column, without = (
    np.asarray(gradient(x, step_config())[0]['head'][...])[:, 1]
    for x in (minibatch, mute)
  )
  assert np.abs(column - without).max() > 1e-3


def test_metrics_are_of_sampled_tokens_and_kept_groups(
  model, batch, step_config, prepared, score
):
  _, metrics = prepared(batch, step_config())
  now_BT = np.asarray(score(*model, batch.tokens, batch.valid).logprob_BT)
  gap = np.abs(now_BT - batch.logprob)[batch.sampled]
  for name, value in (
    ('mean', gap.mean()),
    ('p99', np.quantile(gap, 0.99)),
    ('max', gap.max()),
  ):
    np.testing.assert_allclose(
      metrics[f'rollout/sampler_gap_{name}'], value, rtol=1e-4
    )
  share = batch.action.sum() / batch.sampled.sum()
  np.testing.assert_allclose(metrics['weights/action_share'], share, rtol=1e-6)
  assert int(metrics['selection/kept']) == 4
  assert int(metrics['selection/kept_with_spread']) == 3
