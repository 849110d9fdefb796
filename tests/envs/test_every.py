"""Properties of every environment: purity, seeds, any response."""

import dataclasses

import numpy as np
import pytest

from actfocus_jax.config import fields
from actfocus_jax.envs import ENVS, base
from actfocus_jax.text import chat as chat_lib
from actfocus_jax.text import tokenizer
from actfocus_jax.warmstart import players


@pytest.fixture(scope='module', params=ENVS)
def game(request):
  return request.param


@pytest.fixture(scope='module')
def env(game):
  return ENVS[game]()


def visited(env, game, seeds=range(123, 129)):
  """States, their texts and the actions of episodes of the careless player."""
  player = players.PLAYERS[game]['careless']
  for seed in seeds:
    rng = np.random.default_rng(seed)
    state, text = env.reset(seed)
    for _ in range(4):
      _, actions = player.respond(env, state, rng)
      for action in actions:
        yield state, text, action
        state, step = env.step(state, action)
        text = step.text
        if step.done:
          break
      else:
        continue
      break


def test_reset_and_step_are_pure_and_of_finite_numbers(env, game):
  other = ENVS[game]()
  for seed in (0, 123, 10_000, 10**9):
    assert env.reset(seed) == env.reset(seed) == other.reset(seed)
  for state, text, action in visited(env, game):
    before = repr(state), hash(state)
    first, second = env.step(state, action), env.step(state, action)
    assert first == second and hash(first[0]) == hash(second[0])
    assert (repr(state), hash(state)) == before
    assert dataclasses.is_dataclass(state)
    # Another object gives the same.
    assert other.step(state, action) == first
    assert other.render(state) == text
    step = first[1]
    assert isinstance(step.reward, float) and np.isfinite(step.reward)
    assert isinstance(step.done, bool) and isinstance(step.success, bool)
    assert not step.success or step.done
    assert all(np.isfinite(float(x)) for x in step.info.values())


def test_seeds_give_different_boards(env):
  texts = {env.reset(seed)[1] for seed in range(123, 155)}
  assert len(texts) > 28


def test_texts_survive_the_tokenizer(env, game):
  chat = chat_lib.Chat(tokenizer.train([]))
  for _, text, action in visited(env, game, range(123, 125)):
    for written in (text, action, env.instructions):
      ids = chat.tokenizer.encode(written, add_special_tokens=False)
      assert chat.text(ids) == written


def test_action_names_match_in_any_case(env):
  state, _ = env.reset(5)
  for action in env.actions:
    assert env.step(state, action.upper()) == env.step(state, action)
    assert action in env.instructions
  if env.actions:
    with pytest.raises(ValueError, match='unknown action'):
      env.step(state, 'Jump')
  else:  # It judges what it cannot read.
    after, step = env.step(state, 'Jump')
    assert not step.info['effective'] and not step.done


@pytest.mark.parametrize(
  'name, field, wrong',
  [
    ('frozen_lake', 'size', 1),
    ('frozen_lake', 'frozen_probability', 0.0),
    ('frozen_lake', 'success_probability', 1.1),
    ('sokoban', 'rows', 2),
    ('sokoban', 'boxes', 8),
    ('sudoku', 'size', 3),
    ('sudoku', 'blanks', 17),
    ('sudoku', 'max_steps', 0),
    ('webshop', 'reward', ''),
    ('webshop', 'products', 9),
    ('webshop', 'data', '/nowhere'),
  ],
)
def test_argument_out_of_range_raises(name, field, wrong):
  with pytest.raises(ValueError, match=f'{field}.*{wrong}|^{wrong} {field}'):
    ENVS[name](**{field: wrong})


# --- Anything may come -------------------------------------------------------


def nonsense(rng, answers):
  """A response: random bytes, or an answer of the player with some changed."""
  if rng.random() < 0.5:
    data = rng.bytes(int(rng.integers(0, 40)))
    data = data if rng.random() < 0.5 else b'x</think><answer>' + data
  else:
    answer = answers[rng.integers(len(answers))]
    data = bytearray(f'so</think><answer>{answer}</answer>'.encode())
    for _ in range(rng.integers(0, 4)):
      place = int(rng.integers(len(data)))
      kind = rng.integers(3)
      if kind == 0:
        data[place] = rng.integers(256)
      elif kind == 1:
        del data[place]
      else:
        data[place:place] = data[place : place + 9]
  return bytes(data).decode('utf-8', errors='replace')


def test_turn_takes_any_response(env, game):
  limits = fields.limits(game)
  budget, most = limits['action_budget'], limits['max_actions']
  answers = [action for _, _, action in visited(env, game)]
  rng = np.random.default_rng(7)
  start, start_text = env.reset(123)
  state, text = start, start_text
  read, ran, count = 0, 0, 2000
  for _ in range(count):
    answer = chat_lib.parse_answer(nonsense(rng, answers))
    before = hash(state)
    after, turn = base.play_turn(
      env, state, text, answer, budget=budget, max_actions=most
    )
    assert hash(state) == before and turn.actions_used <= most
    read, ran = read + (answer is not None), ran + turn.valid
    if not answer:
      assert after is state and turn.penalty == -0.1 and turn.text == text
    if not turn.valid:
      assert after == state and turn.reward == 0.0
    state, text = (start, start_text) if turn.done else (after, turn.text)
  assert 0.2 < read / count < 0.9 and 0.05 < ran / count < 0.9
