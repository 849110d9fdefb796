"""Demonstrations: failures lose their own episode, limits are refused."""

import dataclasses

import pytest

from actfocus_jax.envs import base
from actfocus_jax.rollout import env_pool, games
from actfocus_jax.text import chat as chat_lib
from actfocus_jax.text import tokenizer as tokenizer_lib
from actfocus_jax.warmstart import demonstrations, players

LIMITS = games.Limits(turns=2, context=10_000)


class Counting:
  """Its text is its seed; a reset or a step with one of some seeds fails."""

  instructions, actions = 'Count.', ('On',)

  def __init__(self, resets=(), steps=(), fail=None):
    self.resets, self.steps, self.fail = resets, steps, fail or self._raise

  def _raise(self):
    raise RuntimeError('no more numbers')

  def reset(self, seed):
    if seed in self.resets:
      self.fail()
    return seed, f'seed {seed}.'

  def step(self, state, action):
    if state in self.steps:
      self.fail()
    return state, base.Step(f'still {state}.', 0.0, False)


def cast(env, name='counting'):
  return [(games.Game(name, env, LIMITS), players.FOR_ALL['random'])]


@pytest.fixture(scope='module')
def plain():
  return chat_lib.Chat(tokenizer_lib.train([]))


def seeds_of(plain, episodes):
  texts = [plain.text(one.ids) for one in episodes]
  return [int(text.split('seed ')[1].split('.')[0]) for text in texts]


@pytest.mark.parametrize('threads', [0, 2])
def test_failing_episodes_are_dropped_and_reported(plain, threads):
  env, lines = Counting(resets=[2, 3], steps=[5]), []
  sound = demonstrations.play(plain, cast(Counting()), range(8))
  with env_pool.EnvPool(threads) as pool:
    played = demonstrations.play(
      plain, cast(env), range(8), pool=pool, report=lines.append
    )
  assert seeds_of(plain, played) == [0, 1, 4, 6, 7]
  assert not any(one.failure for one in played)
  assert [one.ids for one in played] == [sound[i].ids for i in (0, 1, 4, 6, 7)]
  assert lines == [
    'counting: the environment failed in 3 of 8 demonstrations, first: '
    'RuntimeError: no more numbers'
  ]
  demonstrations.play(plain, cast(Counting()), range(8), report=lines.append)
  assert len(lines) == 1


def test_tokenizer_is_trained_without_the_failed():
  broken, sound = Counting(steps=[1, 2]), Counting()
  made = demonstrations.train_tokenizer(cast(broken), range(4), 300)
  other = demonstrations.train_tokenizer(cast(sound), [0, 3], 300)
  assert made.get_vocab() == other.get_vocab()


def test_more_than_nine_in_ten_lost_is_refused(plain):
  env = Counting(resets=range(18))
  assert len(demonstrations.play(plain, cast(env), range(20))) == 2
  env = Counting(resets=range(19))
  with pytest.raises(ValueError, match='19 of 20 .*RuntimeError: no more n'):
    demonstrations.play(plain, cast(env), range(20))


def test_game_that_always_fails_is_refused_soon(plain):
  tried = []

  def fail():
    tried.append(1)
    raise RuntimeError('never')

  broken = Counting(resets=range(10_000), fail=fail)
  mixed = cast(Counting(), 'sound') + cast(broken, 'broken')
  with pytest.raises(ValueError, match='broken: .* 32 of 32 .*: never'):
    demonstrations.play(plain, mixed, range(10_000))
  assert len(tried) == 32


class Wordy:
  """Writes more on seeds that are a multiple of `every`."""

  def __init__(self, every):
    self.every = every

  def respond(self, env, state, rng):
    is_long = state % self.every == 0
    return 'On and on.' * (5 if is_long else 1), ['On']


def wordy(plain, every, count, report=lambda line: None):
  """Between a short and a long response lies the limit."""
  limit = len(plain.respond('On and on.' * 2, ['On']))
  limits = dataclasses.replace(LIMITS, response_tokens=limit)
  game = games.Game('wordy', Counting(), limits)
  return demonstrations.play(
    plain, [(game, Wordy(every))], range(1, count + 1), report=report
  )


def test_too_long_response_ends_its_demonstration(plain):
  lines = []
  episodes = wordy(plain, every=4, count=8, report=lines.append)
  # Those that end before the first response are no demonstrations.
  assert [len(one.turns) for one in episodes] == [2] * 6
  (line,) = lines
  longest = len(plain.respond('On and on.' * 5, ['On']))
  assert line.endswith(
    f'cuts 2 of 8 demonstrations of wordy short: they have '
    f'responses of up to {longest} tokens'
  )


@pytest.mark.parametrize('count', [3, 10_000])
def test_limit_that_most_responses_break_is_refused(plain, count):
  with pytest.raises(ValueError, match=r'limits.response_tokens is \d+, which'):
    wordy(plain, every=1, count=count)
