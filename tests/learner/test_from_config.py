"""From a config to an update: does every number reach its place?

The train step of a config runs on a table of which token follows which, so that
NumPy can compute the same. Signals, weights, advantages and losses are compared
with loops over tokens, or with the estimator called on NumPy's inputs.
"""

import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from small_run import config

from actfocus_jax import build
from actfocus_jax.algorithm import estimators, signals
from actfocus_jax.learner import state as state_lib
from actfocus_jax.learner import train_step as step_lib
from actfocus_jax.model import architecture

VOCAB, WIDTH = 64, 8
TEMPERATURE = 0.7
STEP = 1  # finished when the step is made; ARMS['critic'] is half way then
SLOW = optax.sgd(0.1)

# In each of them what the others leave alone.
ARMS = {
  'turns': dict(
    kl__coefficient=0.3,
    kl__estimator='k1',
    learner__ratio='turn',
    learner__old_logprob='sampler',
  ),
  'rows': dict(
    weights='top_entropy',
    weights__share=0.4,
    kl__coefficient=0.5,
    kl__estimator='k2',
    loss__reduction='sequence_mean_token_mean',
    learner__importance_cap=1.3,
  ),
  'critic': dict(
    algo='ppo',
    num_steps=4,
    advantage__estimator='turn_gae',
    critic__clip=0.05,
    critic__warmup=2,
    kl__coefficient=0.2,
    kl__estimator='k3',
    learner__old_logprob='sampler',
    weights__alpha_end=0.5,
    weights__schedule_steps=2,
  ),
}


def config_of(**changes):
  """Of 4 groups of 4 rows in two micro-batches."""
  shape = dict(rollout__prompts=4, rollout__members=4, entropy_coefficient=0.1)
  return config('unused', **shape | changes)


POLICY, REFERENCE = 0, 1  # seeds


def tables(seed):
  """embedding_VD, table_DV, judge_D in float64."""
  rng = np.random.default_rng(seed)
  shapes = (VOCAB, WIDTH), (WIDTH, VOCAB), (WIDTH,)
  return [0.5 * rng.normal(size=shape) for shape in shapes]


class Bigram(nnx.Module):
  """Predicts a token from the one before it."""

  def __init__(self, seed):
    params = (nnx.Param(jnp.float32(x)) for x in tables(seed))
    self.embedding, self.table, self.judge = params

  def hidden(self, tokens_BT):
    return self.embedding[...][tokens_BT]

  def unembedding(self):
    return self.table[...]

  def value(self, hidden_BTD):
    return hidden_BTD @ self.judge[...]


def logits_of(seed, batch):
  """Logits of the tokens from 1 on, float64."""
  embedding_VD, table_DV, _ = tables(seed)
  return embedding_VD[batch.tokens[:, :-1]] @ table_DV


def after_first(x_BT):
  """A number for each token from 1 on, 0 for the first."""
  return np.pad(x_BT, ((0, 0), (1, 0)))


def scores_of(seed, batch, temperature=1.0):
  """(log-prob, entropy) of every token in float64, 0 before the first."""
  logits_BTV = logits_of(seed, batch) / temperature
  total_BT1 = np.exp(logits_BTV).sum(axis=-1, keepdims=True)
  logprob_BTV = logits_BTV - np.log(total_BT1)
  target_BT1 = batch.tokens[:, 1:, None]
  chosen_BT = np.take_along_axis(logprob_BTV, target_BT1, axis=-1)[:, :, 0]
  entropy_BT = -(np.exp(logprob_BTV) * logprob_BTV).sum(axis=-1)
  return after_first(chosen_BT), after_first(entropy_BT)


@pytest.fixture(scope='module')
def rows(batch):
  """Sampled at TEMPERATURE by a table that has since moved."""
  now_BT, _ = scores_of(POLICY, batch, TEMPERATURE)
  # Lopsided, so that the two directions of a ratio are far apart.
  drift_BT = 0.4 * np.random.default_rng(3).exponential(size=now_BT.shape) - 0.3
  logprob_BT = np.where(batch.sampled, now_BT + drift_BT, 0.0)
  return batch.replace(logprob=logprob_BT.astype(np.float32))


@pytest.fixture(scope='module')
def ran(rows):
  """Arm -> result of `run`; each is compiled once."""
  return functools.cache(lambda arm: run(ARMS[arm], rows))


def step_of(c):
  """The train step of a config, and a function that makes a state at a step."""
  actor = step_lib.Learner(nnx.split(Bigram(REFERENCE), nnx.Param)[0], SLOW)
  critic = actor if c.algo == 'ppo' else None
  train_step = build.train_step(c, build.Learners(None, actor, critic))

  def state_at(step):
    models = (nnx.state(Bigram(POLICY), nnx.Param) for _ in range(2))
    actor, judge = (state_lib.create_model_state(p, SLOW) for p in models)
    state = state_lib.create(actor, judge if critic else None)
    return state.replace(step=jnp.int32(step))

  return train_step, state_at


def prepared(c, batch):
  """(UpdateBatch, metrics) of step STEP."""
  train_step, state_at = step_of(c)
  reference = nnx.state(Bigram(REFERENCE), nnx.Param)
  return train_step.prepare(state_at(STEP), reference, batch, jax.random.key(0))


def run(arm, batch):
  """One step of an arm; `finish` makes its update again, as of another step."""
  c, key = config_of(rollout__temperature=TEMPERATURE, **arm), jax.random.key(0)
  train_step, state_at = step_of(c)
  reference = nnx.state(Bigram(REFERENCE), nnx.Param)
  rows, metrics = train_step.prepare(state_at(STEP), reference, batch, key)
  np.testing.assert_array_equal(rows.tokens_BT, batch.tokens)
  if c.algo == 'ppo':  # A critic that has moved, so that values are clipped.
    moved_BT = 0.2 * jax.random.normal(key, rows.old_value_BT.shape)
    rows = rows.replace(old_value_BT=rows.old_value_BT + moved_BT)

  def finish(step):
    return train_step.finish(state_at(step), rows, metrics, key)[1]

  return types.SimpleNamespace(
    c=c, batch=batch, rows=rows, metrics=metrics | finish(STEP), finish=finish
  )


# --- Signals, weights and advantages -----------------------------------------


def loop_signal(name, batch):
  """The signal in float64; no temperature enters it."""
  logits_BTV = logits_of(REFERENCE, batch)
  logsumexp_BT = np.log(np.exp(logits_BTV).sum(axis=-1))
  old_BT, _ = scores_of(POLICY, batch)
  ref_BT, ref_entropy_BT = scores_of(REFERENCE, batch)
  return {
    'energy': after_first(-logsumexp_BT),
    'centered_energy': after_first(logits_BTV.mean(axis=-1) - logsumexp_BT),
    'entropy': ref_entropy_BT,
    'nll': -old_BT,
    'logprob_shift': old_BT - ref_BT,
  }[name]


@pytest.mark.parametrize('name', signals.SIGNALS)
def test_weights_are_those_of_the_signal_that_the_config_names(name, rows):
  preset = 'actfocus' if name == 'energy' else name
  c = config_of(
    weights=preset, rollout__temperature=TEMPERATURE, kl__coefficient=0.1
  )
  weight_BT = np.asarray(prepared(c, rows)[0].weight_BT)
  if name == 'random':
    assert np.std(weight_BT[rows.action]) > 0.05
    return
  signal = loop_signal(name, rows)[rows.action]
  score = (signal - signal.mean()) / signal.std()
  np.testing.assert_allclose(
    weight_BT[rows.action], 1 + 0.5 / (1 + np.exp(-score)), rtol=1e-4
  )


def test_top_entropy_keeps_the_most_uncertain_tokens_of_the_policy(ran):
  this = ran('rows')
  kept_N = np.asarray(this.rows.weight_BT)[this.batch.sampled] > 0
  entropy_N = scores_of(POLICY, this.batch)[1][this.batch.sampled]
  assert abs(kept_N.sum() - this.c.weights.share * kept_N.size) <= 1
  assert entropy_N[kept_N].min() > entropy_N[~kept_N].max()


def test_weights_of_a_step_are_those_of_its_number(ran):
  """Step 1 of 2, from 0.1 to 0.5."""
  this = ran('critic')
  thought_BT = this.batch.sampled & ~this.batch.action
  np.testing.assert_allclose(this.rows.weight_BT[thought_BT], 0.3, rtol=1e-6)


# None of the numbers is a default.
NUMBERS = {
  'group_relative': dict(normalize_std=False),
  'gigpo': dict(normalize_std=False, step_weight=0.5, discount=0.7),
  'empg': dict(
    normalize_std=False, scale=2.0, clarity_scale=0.5, clarity_bonus=0.3
  ),
  'gae': dict(reward_placement='turn', discount=0.9, lam=0.8),
  'turn_gae': dict(discount=0.8, lam=0.4),
}


@pytest.mark.parametrize('name', estimators.ESTIMATORS)
def test_advantages_are_those_of_the_estimator_that_the_config_names(
  name, rows
):
  estimator, numbers = estimators.ESTIMATORS[name], NUMBERS[name]
  fields = {f'advantage__{name}__{field}': x for field, x in numbers.items()}
  c = config_of(
    algo=estimator.algo,
    advantage__estimator=name,
    rollout__temperature=TEMPERATURE,
    **fields,
  )
  found, _ = prepared(c, rows)
  embedding_VD, _, judge_D = tables(POLICY)
  value_BT = after_first(embedding_VD[rows.tokens[:, :-1]] @ judge_D)
  inputs = estimators.Inputs(
    return_PG=jnp.asarray(rows.reward.sum(axis=1).reshape(4, 4)),
    reward_BT=jnp.asarray(rows.reward),
    value_BT=jnp.float32(value_BT),
    entropy_BT=jnp.float32(scores_of(POLICY, rows)[1]),
    sampled_BT=jnp.asarray(rows.sampled),
    turn_BT=jnp.asarray(rows.turn),
    anchor_BT=jnp.asarray(rows.anchor),
    num_turns=2,
  )
  wanted = estimator.compute(inputs, **numbers)
  np.testing.assert_allclose(
    found.advantage_BT, wanted.advantage_BT, rtol=1e-4, atol=1e-5
  )
  if estimator.algo == 'ppo':
    np.testing.assert_allclose(found.return_BT, wanted.return_BT, rtol=1e-4)
    np.testing.assert_array_equal(found.critic_BT, wanted.critic_BT)


def test_importance_weights_are_the_policy_over_the_sampler(ran):
  """And not the sampler over the policy; so is the sample size."""
  this = ran('rows')
  now_BT, _ = scores_of(POLICY, this.batch, TEMPERATURE)
  wanted_BT = np.ones(now_BT.shape)
  ratios = []
  for b, t in np.argwhere(this.batch.sampled):
    ratios.append(math.exp(now_BT[b, t] - this.batch.logprob[b, t]))
    wanted_BT[b, t] = min(ratios[-1], this.c.learner.importance_cap)
  np.testing.assert_allclose(this.rows.importance_BT, wanted_BT, rtol=1e-4)
  assert min(ratios) < wanted_BT.max() < max(ratios)
  size, swapped = (
    math.fsum(rs) ** 2 / (len(rs) * math.fsum(r * r for r in rs))
    for rs in (ratios, [1 / r for r in ratios])
  )
  assert abs(size - swapped) > 0.02
  found = this.metrics['rollout/effective_sample_size']
  np.testing.assert_allclose(found, size, rtol=1e-4)


# --- The losses of a step ----------------------------------------------------


def loop_ratios(this):
  """(own, of the turn) ratio of every sampled token; 1 elsewhere."""
  batch, now_BT = this.batch, scores_of(POLICY, this.batch, TEMPERATURE)[0]
  is_fresh = this.c.learner.old_logprob == 'rescore'
  old_BT = now_BT if is_fresh else batch.logprob
  log_BT = np.where(batch.sampled, now_BT - old_BT, 0.0)
  turn_BT = np.zeros(log_BT.shape)
  for b, t in np.argwhere(batch.sampled):
    peers_T = batch.sampled[b] & (batch.turn[b] == batch.turn[b, t])
    turn_BT[b, t] = log_BT[b, peers_T].mean()
  return np.exp(log_BT), np.exp(turn_BT)


def loop_policy_losses(this, ratio_BT):
  """{reduction: loss}: over all tokens, or over rows and then over them."""
  clips, rows = this.c.loss, jax.tree.map(np.asarray, this.rows)
  credit_BT, weight_BT = rows.advantage_BT, rows.weight_BT
  near_BT = np.clip(ratio_BT, 1 - clips.clip_low, 1 + clips.clip_high)
  gain_BT = np.minimum(ratio_BT * credit_BT, near_BT * credit_BT)
  floor_BT = np.where(credit_BT < 0, clips.dual_clip * credit_BT, -np.inf)
  loss_BT = -weight_BT * np.maximum(gain_BT, floor_BT)
  if rows.importance_BT is not None:
    loss_BT *= rows.importance_BT
  pairs = zip(loss_BT, weight_BT, strict=True)
  means = [x_T.sum() / w_T.sum() for x_T, w_T in pairs if w_T.any()]
  return {
    'weighted_token_mean': loss_BT.sum() / weight_BT.sum(),
    'sequence_mean_token_mean': sum(means) / len(means),
  }


def loop_kls(this):
  """{estimator: KL to the reference}, of raw log-probs, over sampled tokens."""
  now_BT, _ = scores_of(POLICY, this.batch)
  then_BT, _ = scores_of(REFERENCE, this.batch)
  gaps = (now_BT - then_BT)[this.batch.sampled].tolist()
  terms = {
    'k1': gaps,
    'k2': [d * d / 2 for d in gaps],
    'k3': [math.exp(-d) - 1 + d for d in gaps],
  }
  assert max(terms['k3']) < 10  # Beyond it k3 is bounded.
  return {name: math.fsum(xs) / len(gaps) for name, xs in terms.items()}


@pytest.mark.parametrize('arm', ARMS)
def test_the_losses_are_those_of_loops(arm, ran):
  """Ratios, importance, temperature, reduction and KL of the config."""
  this = ran(arm)
  c, loss = this.c, 0.0
  own_BT, turn_BT = loop_ratios(this)
  is_old = c.learner.old_logprob == 'sampler'  # Else all ratios are 1.
  assert is_old == (np.abs(own_BT - turn_BT).max() > 0.1)
  ratio_BT = turn_BT if c.learner.ratio == 'turn' else own_BT
  for name, choice, coefficient, wanted in (
    ('policy_loss', c.loss.reduction, 1.0, loop_policy_losses(this, ratio_BT)),
    ('kl', c.kl.estimator, c.kl.coefficient, loop_kls(this)),
  ):
    value = wanted.pop(choice)
    np.testing.assert_allclose(this.metrics[f'actor/{name}'], value, rtol=1e-3)
    assert all(abs(x - value) > 0.02 * abs(value) for x in wanted.values())
    loss += coefficient * value
  entropy_BT = scores_of(POLICY, this.batch)[1]
  loss -= c.entropy_coefficient * entropy_BT[this.batch.sampled].mean()
  np.testing.assert_allclose(this.metrics['actor/loss'], loss, rtol=1e-3)


def test_the_critic_learns_where_turns_begin(ran):
  """Over all sampled tokens the loss would be another number."""
  this = ran('critic')
  batch, rows, clip = this.batch, this.rows, this.c.critic.clip
  embedding_VD, _, judge_D = tables(POLICY)
  errors, clipped = [], 0
  for b, t in np.argwhere(batch.sampled):
    if batch.sampled[b, t - 1] and batch.turn[b, t - 1] == batch.turn[b, t]:
      continue
    value = embedding_VD[batch.tokens[b, t - 1]] @ judge_D
    old, goal = float(rows.old_value_BT[b, t]), float(rows.return_BT[b, t])
    near = min(max(value, old - clip), old + clip)
    errors.append(0.5 * max((value - goal) ** 2, (near - goal) ** 2))
    clipped += (near - goal) ** 2 > (value - goal) ** 2
  assert 0 < clipped < len(errors) < batch.sampled.sum() / 2
  wanted = np.mean(errors)
  np.testing.assert_allclose(this.metrics['critic/loss'], wanted, rtol=1e-4)


# --- Steps -------------------------------------------------------------------


def test_spread_is_needed_where_returns_are_compared():
  cases = ('grpo', 1.0, True), ('ppo', 1.0, False), ('ppo', 0.5, True)
  for algo, ratio, wanted in cases:
    c = config_of(algo=algo, selection__ratio=ratio, learner__minibatch=8)
    assert build.train_step_config(c).needs_spread == wanted


def test_each_optimizer_has_its_own_rate(optax_promotes):
  """Adam's first step is the rate itself."""
  tiny = architecture.Config(VOCAB, WIDTH, 8, 1, 2, 1, 4)
  model = types.SimpleNamespace(
    config=tiny, dtype=jnp.float32, graphdef=None, attention='xla'
  )
  rates = dict(actor=0.5, critic=0.25)
  c = config_of(
    algo='ppo',
    optimizer__learning_rate=rates['actor'],
    optimizer__warmup_steps=0,
    critic__optimizer__learning_rate=rates['critic'],
  )
  learners, params = build.learners(c, model), {'scale': jnp.ones(3)}
  for name, rate in rates.items():
    tx = getattr(learners, name).tx
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(updates['scale'], -rate, rtol=1e-4)
