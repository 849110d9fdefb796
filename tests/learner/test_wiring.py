"""From a config to a changed update: does every number reach its place?

Three runs that share no choice go through the train step of their config; what
they say is compared with loops over tokens. The model is a table of which token
follows which, so that NumPy knows as much of it as the learner does.
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

from actfocus_jax import recipe as recipe_lib
from actfocus_jax.algorithm import estimators, losses, signals
from actfocus_jax.config import schema
from actfocus_jax.learner import prepare as prepare_lib
from actfocus_jax.learner import state as state_lib
from actfocus_jax.learner import step as step_lib
from actfocus_jax.model import architecture, scoring

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
  """Says of a token what the one before it lets expect."""

  def __init__(self, seed):
    params = (nnx.Param(jnp.float32(x)) for x in tables(seed))
    self.embedding, self.table, self.judge = params

  def hidden(self, tokens_BT):
    return self.embedding[...][tokens_BT]

  def unembedding(self):
    return self.table[...]

  def value(self, hidden_BTD):
    return hidden_BTD @ self.judge[...]


def says(seed, batch, temperature=1.0):
  """(log-prob, entropy) of every token in float64, 0 before the first."""
  embedding_VD, table_DV, _ = tables(seed)
  logits_BTV = embedding_VD[batch.tokens[:, :-1]] @ table_DV / temperature
  total_BT1 = np.exp(logits_BTV).sum(axis=-1, keepdims=True)
  logprob_BTV = logits_BTV - np.log(total_BT1)
  target_BT1 = batch.tokens[:, 1:, None]
  chosen_BT = np.take_along_axis(logprob_BTV, target_BT1, axis=-1)[:, :, 0]
  entropy_BT = -(np.exp(logprob_BTV) * logprob_BTV).sum(axis=-1)
  return [np.pad(x_BT, ((0, 0), (1, 0))) for x_BT in (chosen_BT, entropy_BT)]


@pytest.fixture(scope='module')
def rows(batch):
  """Sampled at TEMPERATURE by a table that has since moved."""
  now_BT, _ = says(POLICY, batch, TEMPERATURE)
  # Lopsided, so that the two directions of a ratio are far apart.
  drift_BT = 0.4 * np.random.default_rng(3).exponential(size=now_BT.shape) - 0.3
  logprob_BT = np.where(batch.sampled, now_BT + drift_BT, 0.0)
  return batch.replace(logprob=logprob_BT.astype(np.float32))


@pytest.fixture(scope='module')
def ran(rows):
  """Arm -> what `run` gives; each is compiled once."""
  return functools.cache(lambda arm: run(ARMS[arm], rows))


def run(arm, batch):
  """One step of an arm; `finish` makes its update again, as of another step."""
  c = config_of(rollout__temperature=TEMPERATURE, **arm)
  graphdef, reference = nnx.split(Bigram(REFERENCE), nnx.Param)
  actor = step_lib.Learner(graphdef, SLOW)
  critic = actor if c.algo == 'ppo' else None
  who = recipe_lib.Learners(None, actor, critic)
  train_step = recipe_lib.train_step(c, who)

  def state_at(step):
    models = (nnx.state(Bigram(POLICY), nnx.Param) for _ in range(2))
    actor, judge = (state_lib.trained(params, SLOW) for params in models)
    state = state_lib.create(actor, judge if critic else None)
    return state.replace(step=jnp.int32(step))

  key = jax.random.key(0)
  ready, said = train_step.prepare(state_at(STEP), reference, batch, key)
  np.testing.assert_array_equal(ready.tokens_BT, batch.tokens)
  if critic:  # One that has moved since, so that some values are clipped.
    moved_BT = 0.2 * jax.random.normal(key, ready.old_value_BT.shape)
    ready = ready.replace(old_value_BT=ready.old_value_BT + moved_BT)

  def finish(step):
    return train_step.finish(state_at(step), ready, said, key)[1]

  return types.SimpleNamespace(
    c=c, batch=batch, ready=ready, metrics=said | finish(STEP), finish=finish
  )


# --- The weights of a step ---------------------------------------------------


def test_importance_weights_are_the_policy_over_the_sampler(ran):
  """And not the sampler over the policy; the sample size likewise."""
  this = ran('rows')
  now_BT, _ = says(POLICY, this.batch, TEMPERATURE)
  wanted_BT = np.ones(now_BT.shape)
  ratios = []
  for b, t in np.argwhere(this.batch.sampled):
    ratios.append(math.exp(now_BT[b, t] - this.batch.logprob[b, t]))
    wanted_BT[b, t] = min(ratios[-1], this.c.learner.importance_cap)
  np.testing.assert_allclose(this.ready.importance_BT, wanted_BT, rtol=1e-4)
  assert min(ratios) < wanted_BT.max() < max(ratios)
  size, swapped = (
    math.fsum(rs) ** 2 / (len(rs) * math.fsum(r * r for r in rs))
    for rs in (ratios, [1 / r for r in ratios])
  )
  assert abs(size - swapped) > 0.02
  found = this.metrics['rollout/effective_sample_size']
  np.testing.assert_allclose(found, size, rtol=1e-4)


def test_weights_in_a_step_are_those_of_its_number(ran):
  """Step 1 of a way of 2, from 0.1 to 0.5."""
  this = ran('critic')
  thought_BT = this.batch.sampled & ~this.batch.action
  np.testing.assert_allclose(this.ready.weight_BT[thought_BT], 0.3, rtol=1e-6)


def test_what_is_said_goes_to_who_asks(rows, recipe):
  """Each array has a number of its own, by which it is known again."""
  seen = {}

  def spy(name, result):
    def told(*args, **kwargs):
      for key, x in (*enumerate(args), *kwargs.items()):
        seen[f'{name} {key}'] = x
      return result

    return told

  def full(label):
    return jnp.full(rows.tokens.shape, label, jnp.float32)

  old = scoring.Scores(*map(full, range(5)))
  frozen = scoring.Scores(*map(full, range(5, 10)))
  credit = estimators.Credit(full(20), full(21), jnp.asarray(rows.sampled))
  chosen = recipe(
    signal=spy('signal', full(22)),
    token_weights=spy('weights', full(23)),
    advantage=spy('advantage', credit),
    kl_coefficient=1.0,
  )
  batch = jax.tree.map(jnp.asarray, rows)
  said = prepare_lib.ModelScores(old, frozen, full(24))
  ready, _ = prepare_lib.weigh(batch, full(25)[:4, :4], said, None, 7, chosen)
  seen |= {f'ready {name}': x for name, x in vars(ready).items()}
  wanted = {
    'signal ref_logprob_BT': frozen.raw_logprob_BT,
    'signal ref_logsumexp_BT': frozen.logsumexp_BT,
    'signal ref_mean_logit_BT': frozen.mean_logit_BT,
    'signal ref_entropy_BT': frozen.entropy_BT,
    'signal old_logprob_BT': old.raw_logprob_BT,
    'weights 1': old.entropy_BT,
    'advantage value_BT': said.value_BT,
    'advantage entropy_BT': old.entropy_BT,
    'ready return_BT': credit.return_BT,
    'ready old_value_BT': said.value_BT,
    'ready ref_logprob_BT': frozen.raw_logprob_BT,
  }
  for name in ('reward', 'turn', 'anchor', 'sampled'):
    wanted[f'advantage {name}_BT'] = getattr(batch, name)
  for name, x in wanted.items():
    np.testing.assert_array_equal(seen[name], x, err_msg=name)


# --- The losses of a step ----------------------------------------------------


def loop_ratios(this):
  """(own, of the turn) ratio of every sampled token; 1 elsewhere."""
  batch, now_BT = this.batch, says(POLICY, this.batch, TEMPERATURE)[0]
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
  clips, ready = this.c.loss, jax.tree.map(np.asarray, this.ready)
  credit_BT, weight_BT = ready.advantage_BT, ready.weight_BT
  near_BT = np.clip(ratio_BT, 1 - clips.clip_low, 1 + clips.clip_high)
  gain_BT = np.minimum(ratio_BT * credit_BT, near_BT * credit_BT)
  floor_BT = np.where(credit_BT < 0, clips.dual_clip * credit_BT, -np.inf)
  loss_BT = -weight_BT * np.maximum(gain_BT, floor_BT)
  if ready.importance_BT is not None:
    loss_BT *= ready.importance_BT
  rows = zip(loss_BT, weight_BT, strict=True)
  means = [x_T.sum() / w_T.sum() for x_T, w_T in rows if w_T.any()]
  return {
    'weighted_token_mean': loss_BT.sum() / weight_BT.sum(),
    'sequence_mean_token_mean': sum(means) / len(means),
  }


def loop_kls(this):
  """{estimator: KL to the reference}, of raw log-probs, over sampled tokens."""
  now_BT, _ = says(POLICY, this.batch)
  then_BT, _ = says(REFERENCE, this.batch)
  gaps = (now_BT - then_BT)[this.batch.sampled].tolist()
  terms = {
    'k1': gaps,
    'k2': [d * d / 2 for d in gaps],
    'k3': [math.exp(-d) - 1 + d for d in gaps],
  }
  assert max(terms['k3']) < 10  # Where it is bounded it is no k3.
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
  entropy_BT = says(POLICY, this.batch)[1]
  loss -= c.entropy_coefficient * entropy_BT[this.batch.sampled].mean()
  np.testing.assert_allclose(this.metrics['actor/loss'], loss, rtol=1e-3)


def test_the_critic_learns_where_turns_begin(ran):
  """Its estimator says so; over all sampled tokens the loss is another."""
  this = ran('critic')
  batch, ready, clip = this.batch, this.ready, this.c.critic.clip
  embedding_VD, _, judge_D = tables(POLICY)
  errors, clipped = [], 0
  for b, t in np.argwhere(batch.sampled):
    if batch.sampled[b, t - 1] and batch.turn[b, t - 1] == batch.turn[b, t]:
      continue
    value = embedding_VD[batch.tokens[b, t - 1]] @ judge_D
    old, goal = float(ready.old_value_BT[b, t]), float(ready.return_BT[b, t])
    near = min(max(value, old - clip), old + clip)
    errors.append(0.5 * max((value - goal) ** 2, (near - goal) ** 2))
    clipped += (near - goal) ** 2 > (value - goal) ** 2
  assert 0 < clipped < len(errors) < batch.sampled.sum() / 2
  wanted = np.mean(errors)
  np.testing.assert_allclose(this.metrics['critic/loss'], wanted, rtol=1e-4)


def test_the_critic_learns_alone_until_its_warm_up_is_over(ran):
  this = ran('critic')
  later = this.finish(this.c.critic.warmup)
  assert this.metrics['actor/update_norm'] == 0 < later['actor/update_norm']
  assert this.metrics['critic/update_norm'] > 0


# --- From the config to the recipe -------------------------------------------

# Field of the config: the recipe's, and a value that is not the default. What
# the learner does with it is tested above, and beside it in this room.
FIELDS = dict(
  rollout__members=('members', 4),
  rollout__temperature=('temperature', 0.7),
  selection__ratio=('ratio', 0.6),
  selection__rule=('rule', 'top_p'),
  entropy_coefficient=('entropy_coefficient', 0.03),
  kl__coefficient=('kl_coefficient', 0.2),
  kl__estimator=('kl_estimator', 'k3'),
  critic__warmup=('critic_warmup', 1),
  learner__importance_cap=('importance_cap', 1.7),
  learner__minibatch=('minibatch', 4),
  learner__microbatch=('microbatch', 2),
  learner__epochs=('epochs', 3),
  learner__score_chunk=('score_chunk', 300),
  loss__reduction=('reduction', 'sequence_mean_token_mean'),
)
CLIPS = dict(clip_low=0.1, clip_high=0.3, dual_clip=2.5)


def test_numbers_reach_the_recipe():
  usual = recipe_lib.stages_of(config('unused'))
  changes = {field: value for field, (_, value) in FIELDS.items()}
  changes |= {f'loss__{name}': value for name, value in CLIPS.items()}
  c = config_of(algo='ppo', critic__clip=0.07, **changes)
  made = recipe_lib.stages_of(c)
  for name, value in FIELDS.values():
    assert getattr(made, name) == value != getattr(usual, name), name
  assert made.policy_loss.func is losses.policy_loss
  assert made.policy_loss.keywords == CLIPS | dict(reduction=made.reduction)
  assert made.value_loss.func is losses.value_loss
  assert made.value_loss.keywords == dict(clip=0.07)
  assert usual.value_loss is None
  c = config_of(learner__minibatch=8, learner__microbatch=0)
  assert recipe_lib.stages_of(c).microbatch == 8
  c = config_of(learner__old_logprob='sampler')
  assert made.rescore and not recipe_lib.stages_of(c).rescore


def test_spread_is_needed_where_returns_are_compared():
  cases = ('grpo', 1.0, True), ('ppo', 1.0, False), ('ppo', 0.5, True)
  for algo, ratio, wanted in cases:
    c = config_of(algo=algo, selection__ratio=ratio, learner__minibatch=8)
    assert recipe_lib.stages_of(c).needs_spread == wanted


@pytest.mark.parametrize('name', signals.SIGNALS)
def test_the_signal_is_the_named_one(name):
  weights = 'actfocus' if name == 'energy' else name
  made = recipe_lib.stages_of(config_of(weights=weights))
  assert made.signal is signals.SIGNALS[name]
  assert made.has_reference == (name not in ('nll', 'random'))


@pytest.mark.parametrize('name', estimators.ESTIMATORS)
def test_the_estimator_has_its_numbers(name):
  algo = 'ppo' if name in schema.ESTIMATORS_OF['ppo'] else 'grpo'
  usual = schema.defaults().advantage[name].to_dict()
  number = 'discount' if 'discount' in usual else 'normalize_std'
  zero = type(usual[number])(0)
  changes = {f'advantage__{name}__{number}': zero}
  c = config_of(algo=algo, advantage__estimator=name, **changes)
  made = recipe_lib.stages_of(c).advantage
  assert made.func is estimators.ESTIMATORS[name]
  assert made.keywords == {**usual, number: zero, 'num_turns': 2}
  assert usual[number] != zero


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
  who, params = recipe_lib.learners(c, model), {'scale': jnp.ones(3)}
  for name, rate in rates.items():
    tx = getattr(who, name).tx
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(updates['scale'], -rate, rtol=1e-4)


def weigh(c, batch, step):
  """(weight_BT by the config, the random signal, the random entropy)."""
  random = jnp.float32(np.random.default_rng(0).normal(size=(2, 16, 24)))
  masks = jnp.asarray(batch.sampled), jnp.asarray(batch.action)
  weights = recipe_lib.token_weights(c)
  return map(
    np.asarray, (weights(*random, *masks, step=jnp.int32(step)), *random)
  )


@pytest.mark.parametrize('step', [0, 3, 8, 11])
@pytest.mark.parametrize('moving', ['alpha', 'beta', 'neither'])
def test_alpha_and_beta_move_in_a_straight_line(step, moving, batch):
  """From 0.1 and 0.5 to 0.9 within 8 steps, or not at all."""
  ends, numbers = {}, dict(alpha=0.1, beta=0.5)
  if moving != 'neither':
    ends = {f'weights__{moving}_end': 0.9, 'weights__schedule_steps': 8}
    numbers[moving] += min(step / 8, 1) * (0.9 - numbers[moving])
  weight_BT, signal_BT, _ = weigh(config_of(**ends), batch, step)
  action = signal_BT[batch.action]
  score_BT = (signal_BT - action.mean()) / action.std()
  height_BT = 1 + numbers['beta'] / (1 + np.exp(-score_BT))
  wanted_BT = np.where(batch.action, height_BT, numbers['alpha'])
  wanted_BT = np.where(batch.sampled, wanted_BT, 0)
  np.testing.assert_allclose(weight_BT, wanted_BT, rtol=1e-4)


@pytest.mark.parametrize('share', [0.25, 0.6])
def test_top_entropy_keeps_its_share(share, batch):
  c = config_of(weights='top_entropy', weights__share=share)
  weight_BT, _, entropy_BT = weigh(c, batch, 0)
  assert set(np.unique(weight_BT)) == {0.0, 1.0}
  kept_N, entropy_N = weight_BT[batch.sampled] > 0, entropy_BT[batch.sampled]
  assert abs(kept_N.sum() - share * kept_N.size) <= 1
  assert entropy_N[kept_N].min() > entropy_N[~kept_N].max()
