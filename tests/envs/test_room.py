"""What holds for every environment, and for the room as a whole."""

import copy
import pathlib
import subprocess
import sys

import pytest

from actfocus_jax.envs import ENVS

ROOT = pathlib.Path(__file__).resolve().parents[2]
SEEDS = (0, 1, 123, 10_000)


def test_room_needs_no_jax():
  code = (
    'import sys, actfocus_jax.envs.players; '
    'print(sorted({"jax", "flax", "transformers"} & set(sys.modules)))'
  )
  result = subprocess.run(
    [sys.executable, '-c', code],
    capture_output=True,
    text=True,
    check=True,
    cwd=ROOT,
  )
  assert result.stdout.strip() == '[]'


@pytest.mark.parametrize('name', ENVS)
def test_equal_arguments_give_equal_results(name):
  for seed in SEEDS:
    env, twin = ENVS[name](), ENVS[name]()
    state, text = env.reset(seed)
    assert (state, text) == twin.reset(seed)
    assert text == env.render(state)
    assert hash(state) == hash(twin.reset(seed)[0])
    for action in env.actions * 3:
      before = copy.deepcopy(state)
      following, step = env.step(state, action)
      assert state == before
      assert (following, step) == twin.step(before, action)
      assert step.text == env.render(following)
      state = following


@pytest.mark.parametrize('name', ENVS)
def test_seeds_give_different_boards(name):
  env = ENVS[name]()
  assert len({env.reset(seed)[1] for seed in range(50)}) > 40


@pytest.mark.parametrize('name', ENVS)
def test_step_types(name):
  env = ENVS[name]()
  _, step = env.step(env.reset(3)[0], env.actions[0])
  assert type(step.text) is str
  assert type(step.reward) is float
  assert type(step.done) is bool
  assert type(step.success) is bool
  assert type(step.info['effective']) is bool


@pytest.mark.parametrize('name', ENVS)
def test_action_names(name):
  env = ENVS[name]()
  state, _ = env.reset(5)
  for action in env.actions:
    assert env.step(state, action.upper()) == env.step(state, action)
    assert action in env.instructions
  with pytest.raises(ValueError, match='unknown action'):
    env.step(state, 'Jump')


@pytest.mark.parametrize('name', ENVS)
def test_instructions_are_a_field(name):
  assert ENVS[name](instructions='Play.').instructions == 'Play.'
