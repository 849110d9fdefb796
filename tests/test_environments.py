"""Environments of the user's own, mixtures and failures, in whole runs."""

import json
import os
import pathlib
import re
import runpy
import subprocess
import sys
import textwrap
import threading
import time
import types

import jax
import pytest
import small_run
from small_run import config

from actfocus_jax import build, casting, errors, evaluation, loop
from actfocus_jax.config import schema
from actfocus_jax.rollout import env_pool, games
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
  """Every fourth number cannot be asked for, and every fourth takes long."""

  def reset(self, seed):
    if seed % 4 == 1:
      raise RuntimeError(f'no number for {seed}')
    if seed % 4 == 2 and seed < 1000:
      time.sleep(60)
    return super().reset(seed)


class Strict(Guess):
  def __init__(self, lowest):
    pass


class Cardless:
  def __init__(self, highest=9):
    raise RuntimeError('no card')


class Stepless(Guess):
  step = None


class Silent:
  """No player: it never responds."""
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
  (folder / 'cardless.py').write_text('raise RuntimeError("no card")')
  sys.path.insert(0, str(folder))
  yield folder
  sys.path.remove(str(folder))


def command(module, *arguments, folder, **kwargs):
  return subprocess.run(
    [sys.executable, '-m', f'actfocus_jax.{module}', *arguments],
    cwd=ROOT,
    env={**os.environ, 'PYTHONPATH': str(folder)},
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
    **kwargs,
  )


def refusal(folder, env, argument):
  """The one line with which `train` refuses an environment."""
  own = f'--config=configs/own.py:env={env}'
  done = command('train', own, argument, folder=folder)
  assert done.returncode == 2, done.stderr
  (line,) = done.stderr.strip().splitlines()
  return line


def test_the_readmes_example_plays_as_it_says(own):
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
def test_a_mixture_with_a_failing_environment_of_ones_own(
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
  chance = json.loads((tmp_path / 'run' / 'baselines.json').read_text())
  assert chance['random_success'] is None
  (row,) = metrics.read(tmp_path / 'run' / 'metrics.jsonl')
  assert 0 < row['train/failed'] < 1
  assert row['train/failed'] < row['train/brittle/failed'] <= 1
  assert row['train/frozen_lake/failed'] == 0
  first, last = metrics.read(tmp_path / 'run' / 'eval.jsonl')
  both = [last[f'{name}/success'] for name in ('brittle', 'frozen_lake')]
  assert last['success'] == pytest.approx(sum(both) / 2)
  assert last['episodes'] == 32 == 2 * last['brittle/episodes']
  assert first['brittle/success_low'] <= first['brittle/success']
  said = capsys.readouterr()
  said = said.out + said.err
  assert 'evaluation at step 1: the environment failed in' in said
  told = evaluation.line(1, last)
  assert f'failed in {last["failed"]:.1%} of them' in told and told in said
  assert f'brittle {last["brittle/success"]:.1%}, frozen_lake' in told
  snapshot = json.loads((tmp_path / 'run' / 'config.json').read_text())
  assert schema.from_json(snapshot).to_dict() == c.to_dict()


@pytest.mark.slow
def test_resets_that_fail_or_hang_cost_their_own_episodes(
  own, cache, tmp_path, capsys
):
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
  chance = json.loads((tmp_path / 'baselines.json').read_text())
  assert chance['random_success'] is None
  said = capsys.readouterr().out
  assert 'failed in 16 of 64 demonstrations, first: RuntimeError: no' in said
  assert 'evaluation at step 0: the environment failed in 8 of 16' in said
  assert 'No chance level of closed: the environment failed, Runtime' in said


class Resetting:
  """An environment of which some seeds cannot be reset."""

  instructions, actions = 'Go.', ('Go',)

  def __init__(self, fail, seeds, text=''):
    self.fail, self.seeds, self.text = fail, seeds, text

  def reset(self, seed):
    if seed in self.seeds:
      self.fail()
    return seed, self.text


def look_at_first_prompts(monkeypatch, env, pool):
  c = schema.defaults()
  assert (c.eval.first_seed, c.eval.prompts) == (123, 32)
  bridge = chat_lib.Chat(tokenizer.train([]))
  monkeypatch.setattr(build, '_early_chat', lambda *_: bridge)
  limits = games.Limits(context=2000)
  build.check_first_prompts(c, [games.Game('own', env, limits)], pool)


def raises():
  raise RuntimeError('no board')


@pytest.mark.parametrize('threads', [0, 2])
def test_first_prompts_are_looked_at_where_resets_may_fail(
  monkeypatch, threads
):
  pool = env_pool.EnvPool(threads)
  but_one = Resetting(raises, {*range(123, 155)} - {140})
  look_at_first_prompts(monkeypatch, but_one, pool)
  but_one.text = 'x' * 3000
  with pytest.raises(ValueError, match='limits.context is 2000'):
    look_at_first_prompts(monkeypatch, but_one, pool)
  none = Resetting(raises, range(123, 155))
  with pytest.raises(
    ValueError, match='^own: .* 123 to 154, first: RuntimeError: no board$'
  ):
    look_at_first_prompts(monkeypatch, none, pool)
  pool.close()


def test_first_prompts_are_not_waited_for_ever(monkeypatch):
  end = threading.Event()
  pool = env_pool.EnvPool(8, time_limit=0.2)
  hanging = Resetting(lambda: end.wait(30), range(125, 155))
  begin = time.monotonic()
  look_at_first_prompts(monkeypatch, hanging, pool)
  assert time.monotonic() - begin < 15
  end.set()
  pool.close()


def test_a_step_in_which_all_fail_stops_the_run():
  failure = env_pool.Failed('RuntimeError: gone', 'Traceback: gone')
  lost = types.SimpleNamespace(failure=failure)
  sound = types.SimpleNamespace(failure=None)
  told = []
  display = types.SimpleNamespace(note=told.append)

  def report(*episodes):
    played = types.SimpleNamespace(episodes=episodes)
    loop.report_failures(played, 'step 5', display)

  report(sound, sound)
  assert not told
  report(sound, lost)
  (line,) = told
  assert line == (
    'step 5: the environment failed in 1 of 2 episodes, first: '
    'RuntimeError: gone'
  )
  with pytest.raises(errors.RunError, match='2 of 2(.*\n)+Traceback: gone'):
    report(lost, lost)


# --- Boards of evaluation ----------------------------------------------------


def shop_config(prompts, **options):
  c = schema.defaults('webshop')
  c.env.options.update(options)
  c.eval.prompts = prompts
  return c


def test_no_evaluation_counts_a_goal_twice():
  """10 products give 61 goals, of which a third is for evaluation."""
  (game,) = casting.games(shop_config(20, products=10))
  first = schema.defaults().eval.first_seed
  goals = {game.env.reset(seed)[0].goal for seed in range(first, first + 21)}
  assert len(goals) == game.env.evaluation_boards == 20
  sentence = (
    r"eval\.prompts is 21, but 'webshop' with these env\.options has 20 "
    r'different boards for evaluation; allowed: 1 to 20\.'
  )
  with pytest.raises(ValueError, match=sentence):
    casting.games(shop_config(21, products=10))


def test_a_shop_of_a_mixture_has_goals_enough():
  c = schema.defaults({'frozen_lake': 1.0, 'webshop': 1.0})
  c.mixture.webshop.options.products = 10
  with pytest.raises(ValueError, match=r'with these mixture\.webshop\.options'):
    casting.games(c)
  c.eval.prompts = 20
  assert len(casting.games(c)) == 2


def test_the_paper_s_evaluation_has_goals_enough():
  path = ROOT / 'configs' / 'webshop.py'
  c = runpy.run_path(str(path))['get_config']('size=tiny')
  (game,) = casting.games(c)
  assert game.env.evaluation_boards >= c.eval.prompts == 256


# --- Commands ----------------------------------------------------------------


@pytest.mark.parametrize(
  ('env', 'words'),
  [
    ('nowhere:Guess', ['env.name', 'nowhere:Guess', 'package.module:Class']),
    ('guessing:Gues', ['env.name', 'guessing:Gues', 'package.module:Class']),
    ('brittle:Strict', ['lowest', 'no default', 'allowed: keyword arguments']),
    ('cardless:Guess', ['env.name', 'RuntimeError: no card', 'cardless.py']),
    ('chess', ['env.name', 'chess', 'frozen_lake']),
    ('frozen_lake+chess', ['env.name', 'chess', 'frozen_lake']),
  ],
)
def test_bad_environments_are_refused(own, tmp_path, env, words):
  line = refusal(own, env, f'--workdir={tmp_path / "run"}')
  for word in words:
    assert word in line
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  ('env', 'change', 'words'),
  [
    ('guessing:Guess', 'player.options.skill=0.3', 'player.options has none'),
    ('guessing:Guess', 'env.options.high=3', 'env.options has highest.'),
    (
      'sokoban+guessing:Guess',
      'env.options.highest=3',
      'did you mean mixture.guess.options.highest?',
    ),
  ],
)
def test_fields_that_are_not_there_are_refused(own, env, change, words):
  line = refusal(own, env, f'--config.{change}')
  field = change.partition('=')[0]
  assert line.startswith(f'error: {field} is not a field') and words in line


def test_what_is_made_must_be_whole(own):
  def assembled(make, **names):
    c = schema.defaults(names.get('env', 'guessing:Guess'))
    c.player.name = names.get('player', 'random')
    c.env.options.update(names.get('options', {}))
    (section,) = schema.sections(c)
    with pytest.raises(ValueError) as error:
      make(c, section)
    return str(error.value)

  told = assembled(casting.environment, env='brittle:Stepless')
  assert told.startswith("env.name is 'brittle:Stepless', which has no method")
  told = assembled(casting.environment, env='brittle:Cardless')
  assert "env.name is 'brittle:Cardless', which cannot be made with" in told
  assert 'env.options (highest=9): RuntimeError: no card (brittle.py' in told
  told = assembled(
    casting.environment, env='sokoban', options={'boxes': 5, 'rows': 3}
  )
  assert told == 'env.options: 5 boxes do not fit into 3 x 6 cells.'
  told = assembled(lambda c, s: casting.player(s), player='brittle:Silent')
  assert "player.name is 'brittle:Silent', which has no method `resp" in told
  told = assembled(lambda c, s: casting.player(s), player='brittle:Nobody')
  assert "player.name is 'brittle:Nobody', which cannot be imported" in told


def test_play_by_hand_shows_what_the_model_sees(own):
  done = command(
    'play', '--env=guessing:Guess', '--seed=3', folder=own, input='9\n1 || 2\n'
  )
  assert done.returncode == 0, done.stderr
  assert '<|im_start|>system\nGuess a number from 1 to 9.' in done.stdout
  assert 'Actions left: 10\n' in done.stdout
  assert done.stdout.count('<|im_start|>assistant\n<think>') == 3
  assert "read: ['1', '2'], 2 run, reward 0" in done.stdout
  assert 'left after 2 turns' in done.stdout


@pytest.mark.parametrize(
  ('arguments', 'words'),
  [
    ([], ['--env is missing', 'sokoban']),
    (['--env=chess'], ['env.name', 'chess']),
    (['--env=sokoban', '--step=3'], ['--step needs --workdir']),
    (['--env=sokoban', '--seed=-1'], ['seed']),
    (['--env=sokoban', '--workdir=x'], ['excludes']),
    (['--workdir=nowhere'], ['nowhere', 'no run']),
  ],
)
def test_play_refuses(own, arguments, words):
  done = command('play', *arguments, folder=own)
  assert done.returncode == 2, done.stderr
  (line,) = done.stderr.strip().splitlines()
  for word in words:
    assert word in line
