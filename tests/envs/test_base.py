"""The rules of a turn, as a table of cases."""

import numpy as np
import pytest

from actfocus_jax.envs import base, frozen_lake, sokoban

UNKNOWN = -0.1

# name: (answer, budget, max_actions) ->
#   (column of the player, reward, penalty, done, used, valid, effective)
# on the board `SFFG`, where three steps to the right reach the goal.
CASES = {
  'one': ((['Right'], 10, 2), (1, 0.0, 0.0, False, 1, True, 1)),
  'any case': ((['right', 'LEFT'], 10, 2), (0, 0.0, 0.0, False, 2, True, 2)),
  'no effect': ((['Up', 'Right'], 10, 2), (1, 0.0, 0.0, False, 2, True, 1)),
  'dropped unknown': (
    (['Right', 'Right', 'Jump'], 10, 2),
    (2, 0.0, 0.0, False, 2, True, 2),
  ),
  'budget': ((['Right', 'Right'], 1, 2), (1, 0.0, 0.0, False, 1, True, 1)),
  'mixed': ((['Jump', 'Right'], 10, 2), (1, 0.0, UNKNOWN, False, 1, True, 1)),
  'unknown': ((['Jump', 'Fly'], 10, 2), (0, 0.0, UNKNOWN, False, 0, False, 0)),
  'empty': (([], 10, 2), (0, 0.0, UNKNOWN, False, 0, False, 0)),
  'malformed': ((None, 10, 2), (0, 0.0, UNKNOWN, False, 0, False, 0)),
  'done within': ((['Right'] * 4, 10, 4), (3, 1.0, 0.0, True, 3, True, 3)),
  'unknown after done': (
    (['Right', 'Right', 'Right', 'Jump'], 10, 4),
    (3, 1.0, UNKNOWN, True, 3, True, 3),
  ),
}


@pytest.mark.parametrize('name', CASES)
def test_turn_by_hand(name):
  (answer, budget, max_actions), expected = CASES[name]
  env = frozen_lake.FrozenLake(success_probability=1.0)
  start, text = env.load('SFFG')
  state, turn = base.play_turn(
    env, start, text, answer, budget=budget, max_actions=max_actions
  )
  assert (
    state.player[1],
    turn.reward,
    turn.penalty,
    turn.done,
    turn.actions_used,
    turn.valid,
    turn.effective,
  ) == expected
  assert turn.success == turn.done
  assert turn.text == env.render(state)
  assert isinstance(turn.reward, float)


def test_turn_reward_is_the_sum_of_the_actions_run():
  env = sokoban.Sokoban()
  state, _ = env.load('P_XO')
  _, turn = base.play_turn(
    env, state, '', ['Right', 'Right', 'Right'], budget=10, max_actions=3
  )
  assert turn.reward == pytest.approx(-0.1 + 10.9)
  assert turn.actions_used == 2


def test_turn_penalty_is_an_argument():
  env = sokoban.Sokoban()
  state, _ = env.load('P_XO')
  _, turn = base.play_turn(
    env, state, '', None, budget=1, max_actions=1, format_penalty=-0.5
  )
  assert (turn.reward, turn.penalty) == (0.0, -0.5)


class Judge:
  """An environment without a table of names; the state counts the actions."""

  instructions = 'Say anything.'
  actions = ()

  def reset(self, seed):
    return seed, str(seed)

  def step(self, state, action):
    reward = 1.0 if action == 'Good' else -0.25
    info = {'effective': action == 'Good'}
    return state + 1, base.Step(str(state + 1), reward, False, False, info)


@pytest.mark.parametrize(
  'answer, expected',
  [
    (['Good', 'nonsense', 'dropped'], (0.75, 0.0, 2, True, 1)),
    (['GOOD'], (-0.25, 0.0, 1, True, 0)),
    ([], (0.0, UNKNOWN, 0, False, 0)),
    (None, (0.0, UNKNOWN, 0, False, 0)),
  ],
)
def test_turn_without_a_table_of_actions_runs_any_string(answer, expected):
  state, turn = base.play_turn(
    Judge(), 0, '0', answer, budget=16, max_actions=2
  )
  assert expected == (
    turn.reward,
    turn.penalty,
    turn.actions_used,
    turn.valid,
    turn.effective,
  )
  assert state == turn.actions_used


# --- Results of an environment are checked -----------------------------------


class Giving:
  """An environment that returns fixed values."""

  instructions, actions = 'Go.', ('Go',)

  def __init__(self, reset=None, step=None):
    self.reset = lambda seed: reset
    self.step = lambda state, action: step


def given(**changes):
  return (1, base.Step(**{'text': '', 'reward': 0, 'done': False} | changes))


def go(step):
  return base.play_turn(
    Giving(step=step), 0, '', ['Go', 'Go'], budget=2, max_actions=2
  )


@pytest.mark.parametrize(
  ('reset', 'words'),
  [
    ((1,), 'reset returned 1 values; allowed: a state and a text'),
    ((1, 'x\udc80'), r"The text of a reset has '\\udc80', which UTF-8"),
  ],
)
def test_reset_of_a_wrong_kind_raises(reset, words):
  with pytest.raises(ValueError, match=words):
    base.reset(Giving(reset=reset), 3)


@pytest.mark.parametrize(
  ('step', 'words'),
  [
    (given(), None),
    (given()[1], 'step returned Step; allowed: a state and a Step'),
    (given(text=None), 'The text of a step is of NoneType'),
    (given(reward=float('nan')), 'The reward of a step is nan'),
    (given(done=1), 'Step.done is 1; allowed: True and False'),
    (given(info={'x': float('nan')}), r"Step.info\['x'\] is nan"),
    (given(info={3: 1.0}), 'A name in Step.info is of int'),
  ],
)
def test_step_of_a_wrong_kind_raises(step, words):
  if words is None:
    assert go(step)[1].actions_used == 2
    return
  with pytest.raises(ValueError, match=words):
    go(step)


def test_numpy_numbers_become_plain_ones():
  """JSON cannot write NumPy's."""
  one = np.float32(1)
  _, turn = go(
    given(reward=one, done=np.True_, success=np.True_, info={'x': one})
  )
  assert (turn.reward, turn.done, turn.success, turn.info) == (
    *(1.0, True, True),
    {'x': 1.0},
  )
  kinds = [type(x) for x in (turn.reward, turn.done, turn.success)]
  assert kinds == [float, bool, bool] and type(turn.info['x']) is float
