"""The self-check passes what is sound and names what is not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from actfocus_jax.learner import self_check
from actfocus_jax.learner import state as state_lib
from actfocus_jax.parallel import mesh as mesh_lib

TX = optax.sgd(0.1)


@pytest.fixture(scope='module', autouse=True)
def one_device():
  with jax.set_mesh(mesh_lib.make_mesh(devices=jax.devices()[:1])):
    yield


@pytest.fixture(scope='module')
def sound(model, batch, score):
  """A first batch: the sampler is the policy, the policy the reference."""
  logprob_BT = np.asarray(score(*model, batch.tokens, batch.valid).logprob_BT)
  fresh = dataclasses.replace(
    batch, logprob=np.where(batch.sampled, logprob_BT, 0.0)
  )
  return jax.tree.map(jnp.asarray, fresh)


@pytest.fixture(scope='module')
def check(model, step_config):
  def run(batch, reference, chosen=None):
    state = state_lib.create(state_lib.create_model_state(model[1], TX))
    return self_check.run(
      model[0],
      state,
      reference,
      batch,
      chosen or step_config(learner__microbatch=8),
      limits=self_check.EXACT,
    )

  return run


def test_a_sound_start_passes(check, model, sound):
  found = check(sound, model[1])
  assert found.keys() == {'ratio', 'sampler', 'reference', 'padding'}
  assert max(found.values()) < 1e-5
  assert check(sound, None).keys() == {'ratio', 'sampler', 'padding'}


def test_another_sampler(check, model, sound, step_config):
  """Other log-probs, and a temperature that the sampler did not have."""
  other = dataclasses.replace(sound, logprob=sound.logprob * 1.1)
  cold = step_config(learner__microbatch=8, rollout__temperature=0.8)
  for batch, chosen in ((other, None), (sound, cold)):
    with pytest.raises(self_check.Failed, match='sampler drew from another'):
      check(batch, model[1], chosen)


def test_another_reference(check, model, sound, reference):
  """NaN is not within any limit."""
  broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), model[1])
  for other in (reference, broken):
    with pytest.raises(self_check.Failed, match='not the model that training'):
      check(sound, other)


def test_rewards_that_are_no_floats(check, model, sound):
  whole = dataclasses.replace(sound, reward=sound.reward.astype(jnp.int32))
  with pytest.raises(self_check.Failed, match='rewards are int32'):
    check(whole, model[1])
  broken = dataclasses.replace(sound, reward=sound.reward.at[0, 0].set(jnp.nan))
  with pytest.raises(self_check.Failed, match='not finite'):
    check(broken, model[1])


def test_padding_that_is_attended_to(check, model, sound):
  """As if rows were padded on the left: real tokens come after."""
  first_BT = jnp.arange(sound.tokens.shape[1])[None] < 2
  valid_BT = sound.valid & ~first_BT
  shifted = dataclasses.replace(sound, valid=valid_BT)
  with pytest.raises(self_check.Failed, match='padding is being attended to'):
    check(shifted, model[1])


def test_copies_that_differ(model, batch, spread_out):
  mesh, place = spread_out
  params, _ = place(model[1], batch)
  with jax.set_mesh(mesh):
    state = state_lib.create(state_lib.create_model_state(params, TX))
    self_check._check_copies(state)
    scale = params['norm']['scale'][...]
    parts = [
      jax.device_put(np.asarray(shard.data) + (i == 3) * 1e-3, shard.device)
      for i, shard in enumerate(scale.addressable_shards)
    ]
    torn = jax.make_array_from_single_device_arrays(
      scale.shape, scale.sharding, parts
    )
    params['norm']['scale'][...] = torn
    state = state_lib.create(state_lib.create_model_state(params, TX))
    with pytest.raises(self_check.Failed, match='different copies of .*norm'):
      self_check._check_copies(state)


def test_only_the_rows_that_are_kept_are_looked_at(
  check, model, sound, step_config
):
  """Three of four groups: twelve rows, which do not divide the sixteen."""
  kept = step_config(
    selection__ratio=0.75, learner__minibatch=12, learner__microbatch=12
  )
  assert max(check(sound, model[1], kept).values()) < 1e-5


def test_a_batch_that_teaches_nothing_passes(check, model, sound, step_config):
  """`top_p` takes every token of groups without spread out of the loss."""
  flat = dataclasses.replace(sound, reward=jnp.zeros_like(sound.reward))
  top_p = step_config(selection__rule='top_p', learner__microbatch=8)
  found = check(flat, model[1], top_p)
  assert set(found.values()) == {0.0}
