"""Environments of the user's own, mixtures and failures, in whole runs."""

import json
import pathlib
import re
import sys
import textwrap
import types

import jax
import pytest
import small_run
from small_run import config

from actfocus_jax import build, errors, evaluation, loop
from actfocus_jax.config import schema
from actfocus_jax.rollout import collector, env_pool, games
from actfocus_jax.run import metrics
from actfocus_jax.text import chat as chat_lib
from actfocus_jax.text import tokenizer

ROOT = pathlib.Path(__file__).resolve().parent.parent

BRITTLE = '''
"""Environments that fail, or cannot be made."""

import time

from guessing import Guess


class Brittle(Guess):
  def step(self, state, action):
    if action == '5':
      raise RuntimeError('five is broken')
    if action == '6':
      time.sleep(60)
    return super().step(state, action)


class Closed(Guess):
  """Every fourth reset fails, and every fourth takes long."""

  def reset(self, seed):
    if seed % 4 == 1:
      raise RuntimeError(f'no number for {seed}')
    if seed % 4 == 2 and seed < 1000:
      time.sleep(60)
    return super().reset(seed)

'''


@pytest.fixture(scope='module', autouse=True)
def ordinary_promotion():
  with jax.numpy_dtype_promotion('standard'):
    yield


@pytest.fixture(scope='module')
def own(tmp_path_factory):
  """A folder with the page's example and some that fail, importable."""
  folder = tmp_path_factory.mktemp('own')
  page = (ROOT / 'actfocus_jax/envs/README.md').read_text()
  found = re.search(r'    """Guess a number.*?\n(?=\S)', page, re.DOTALL)
  code = textwrap.dedent(found[0])
  assert 30 <= len(code.strip().splitlines()) <= 45
  (folder / 'guessing.py').write_text(code)
  (folder / 'brittle.py').write_text(BRITTLE)
  sys.path.insert(0, str(folder))
  yield folder
  sys.path.remove(str(folder))


def test_example_of_the_page_plays_as_it_says(own):
  import guessing

  game = guessing.Guess()
  state, text = game.reset(3)
  assert text == 'Nothing guessed yet.' and game.reset(3) == (state, text)
  for number in range(1, 10):
    after, step = game.step(state, str(number))
    assert step.success == step.done == (number == state.secret)
    assert step.reward == step.success
    word = {-1: 'low', 0: 'right', 1: 'high'}
    side = (number > state.secret) - (number < state.secret)
    assert word[side] in step.text and after.secret == state.secret
  assert state.text == 'Nothing guessed yet.'


@pytest.mark.slow
def test_mixture_with_a_failing_environment_trains(
  own, cache, tmp_path, capsys
):
  env = {'frozen_lake': 1.0, 'brittle:Brittle': 1.0}
  changes = dict(
    num_steps=1,
    mixture__brittle__turns=2,
    mixture__frozen_lake__turns=2,
    env__threads=2,
    env__time_limit=0.5,
  )
  c = config(cache, env, **changes)
  # Its demonstrations have to be sound: the model is made from what works.
  sound = config(cache, {'frozen_lake': 1.0, 'guessing:Guess': 1.0})
  with pytest.MonkeyPatch.context() as patch:
    brittle = sys.modules.get('brittle') or __import__('brittle')
    patch.setattr(brittle.Brittle, 'step', brittle.Guess.step)
    small_run.make_warm_start(c)
  assert c.warm_start == sound.warm_start
  loop.train(c, tmp_path / 'run')
  baseline = json.loads((tmp_path / 'run' / 'baselines.json').read_text())
  assert baseline['random_success'] is None
  (row,) = metrics.read(tmp_path / 'run' / 'metrics.jsonl')
  assert 0 < row['train/failed'] < 1
  assert row['train/failed'] < row['train/brittle/failed'] <= 1
  assert row['train/frozen_lake/failed'] == 0
  first, last = metrics.read(tmp_path / 'run' / 'eval.jsonl')
  both = [last[f'{name}/success'] for name in ('brittle', 'frozen_lake')]
  assert last['success'] == pytest.approx(sum(both) / 2)
  assert last['episodes'] == 32 == 2 * last['brittle/episodes']
  assert first['brittle/success_low'] <= first['brittle/success']
  printed = capsys.readouterr()
  printed = printed.out + printed.err
  assert 'evaluation at step 1: the environment failed in' in printed
  line = evaluation.line(1, last)
  assert f'failed in {last["failed"]:.1%} of them' in line and line in printed
  assert f'brittle {last["brittle/success"]:.1%}, frozen_lake' in line
  snapshot = json.loads((tmp_path / 'run' / 'config.json').read_text())
  assert schema.from_json(snapshot).to_dict() == c.to_dict()


@pytest.mark.slow
def test_failing_resets_cost_their_own_episodes(own, cache, tmp_path, capsys):
  c = config(
    cache,
    'brittle:Closed',
    num_steps=0,
    env__threads=2,
    env__time_limit=0.5,
    limits__turns=2,
    warm_start__episodes=64,
    warm_start__steps=2,
  )
  loop.train(c, tmp_path)
  (row,) = metrics.read(tmp_path / 'eval.jsonl')
  assert row['failed'] == 0.5  # Seeds 123 to 130.
  baseline = json.loads((tmp_path / 'baselines.json').read_text())
  assert baseline['random_success'] is None
  printed = capsys.readouterr().out
  assert 'failed in 16 of 64 demonstrations, first: RuntimeError: no' in printed
  assert 'evaluation at step 0: the environment failed in 8 of 16' in printed
  assert 'No random baseline of closed: the environment failed, Ru' in printed


def test_run_stops_if_every_episode_of_a_step_fails():
  failure = env_pool.Failed('RuntimeError: gone', 'Traceback: gone')
  lost = types.SimpleNamespace(failure=failure)
  sound = types.SimpleNamespace(failure=None)
  lines = []
  display = types.SimpleNamespace(note=lines.append)

  def report(*episodes):
    played = types.SimpleNamespace(episodes=episodes)
    loop.report_failures(played, 'step 5', display)

  report(sound, sound)
  assert not lines
  report(sound, lost)
  assert lines == [
    'step 5: the environment failed in 1 of 2 episodes, first: '
    'RuntimeError: gone'
  ]
  with pytest.raises(errors.RunError, match='2 of 2(.*\n)+Traceback: gone'):
    report(lost, lost)


@pytest.mark.parametrize('threads', [0, 2])
def test_first_prompts_are_checked_where_resets_may_fail(threads):
  """One board that can be reset is enough to measure the first prompt."""

  class Resetting:
    instructions, actions = 'Go.', ('Go',)
    sound, text = (140,), ''

    def reset(self, seed):
      if seed not in self.sound:
        raise RuntimeError('no board')
      return seed, self.text

  env, chat = Resetting(), chat_lib.Chat(tokenizer.train([]))
  played = [games.Game('own', env, games.Limits(context=2000))]
  with env_pool.EnvPool(threads) as pool:

    def check():
      collector.check_first_prompts(chat, played, pool, range(123, 155))

    check()
    env.text = 'x' * 3000
    with pytest.raises(ValueError, match='limits.context is 2000'):
      check()
    env.sound = ()
    with pytest.raises(ValueError, match='^own: .*, first: RuntimeError: no b'):
      check()


def test_evaluation_of_more_goals_than_the_shop_has_is_refused():
  """10 products give 61 goals, of which a third is for evaluation."""
  c = schema.defaults('webshop')
  c.env.options.products, c.eval.prompts = 10, 20
  (game,) = build.games(c)
  first, c.eval.prompts = c.eval.first_seed, 21
  goals = {game.env.reset(seed)[0].goal for seed in range(first, first + 21)}
  assert len(goals) == game.env.evaluation_boards == 20
  sentence = (
    r"eval\.prompts is 21, but 'webshop' with these env\.options has 20 "
    r'different boards for evaluation; allowed: 1 to 20\.'
  )
  with pytest.raises(ValueError, match=sentence):
    build.games(c)
