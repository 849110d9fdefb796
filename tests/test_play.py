"""Playing by hand and watching a checkpoint."""

import io
import os
import pathlib
import pty
import signal
import subprocess
import sys
import types

import processes
import pytest
from command import ROOT, assert_refused, command

from actfocus_jax import build, play
from actfocus_jax.config import presets, schema
from actfocus_jax.envs import base
from actfocus_jax.rollout import env_pool, games
from actfocus_jax.rollout import episode as episode_lib
from actfocus_jax.text import chat as chat_lib
from actfocus_jax.text import tokenizer


class Counting:
  """Counts, and breaks at a certain number."""

  instructions = 'Say go.'
  actions = ('go',)

  def __init__(self, breaks_at=100):
    self.breaks_at = breaks_at

  def reset(self, seed):
    if self.breaks_at == 0:
      raise RuntimeError('broken at once')
    return 0, 'At 0.'

  def step(self, state, action):
    if state + 1 == self.breaks_at:
      raise RuntimeError(f'broken at {state + 1}')
    return state + 1, base.Step(f'At {state + 1}.', 1.0, done=False)


@pytest.fixture(scope='module')
def chat():
  return chat_lib.Chat(tokenizer.train([]))


def by_hand(chat, env, said, monkeypatch, capsys, **limits):
  monkeypatch.setattr(sys, 'stdin', io.StringIO(said))
  game = games.Game('counting', env, games.Limits(**limits))
  play.by_hand(chat, [game], 3)
  return capsys.readouterr().out


def test_by_hand_has_no_context_limit(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  c = schema.defaults('frozen_lake')
  presets.tiny(c)
  (tmp_path / 'lakes.txt').write_text('SFG')
  c.env.boards = '~/lakes.txt'
  (game,) = build.games(c, by_hand=True)
  assert game.limits.context > 10**6 and c.limits.context == 512
  assert game.limits.response_tokens == c.limits.response_tokens
  assert game.env.reset(123)[0].lake.cols == 3
  with pytest.raises(ValueError, match='128 boards or more'):
    build.games(c)


def test_by_hand_accepts_shop_of_few_goals():
  c = schema.defaults('webshop')
  c.env.options.products = 10
  (game,) = build.games(c, by_hand=True)
  assert game.env.evaluation_boards < c.eval.prompts
  with pytest.raises(ValueError, match='eval.prompts is 32'):
    build.games(c)


def test_reset_without_pair_is_reported(chat, monkeypatch, capsys):
  env = Counting()
  env.reset = lambda seed: 'hello'
  out = by_hand(chat, env, 'go\n', monkeypatch, capsys)
  assert 'The environment failed: ' in out and 'reset returned str' in out


def test_full_context_is_reported(chat, monkeypatch, capsys):
  out = by_hand(
    chat, Counting(), 'go\ngo\ngo\n', monkeypatch, capsys, context=600
  )
  assert 'The context is full: limits.context is 600.\nover after ' in out
  out = by_hand(chat, Counting(), 'go\n\n', monkeypatch, capsys)
  assert 'context' not in out and 'ended early after 1 turns' in out


@pytest.mark.parametrize('breaks_at', [0, 2])
def test_failing_environment_shows_traceback(
  chat, monkeypatch, capsys, breaks_at
):
  env = Counting(breaks_at)
  out = by_hand(chat, env, 'go\ngo\ngo\n', monkeypatch, capsys)
  assert (
    'Traceback' in out
    and "raise RuntimeError(f'broken" in out
    or (breaks_at == 0)
  )
  assert 'The environment failed: RuntimeError: broken at' in out
  assert out.count('read: ') == max(breaks_at - 1, 0)


def test_watch_shows_response_before_failure(chat, monkeypatch, capsys):
  """Else nobody sees what the checkpoint had said to it."""
  game = games.Game('counting', Counting(breaks_at=2), games.Limits())
  (opening,) = episode_lib.open_all(chat, env_pool.EnvPool(), [game], [3])
  episode = episode_lib.Episode(chat, opening)
  for thought in ('first', 'second'):
    ids = chat.respond(f'my {thought} thought', ['go'])
    episode.add_response(ids, [0.0] * len(ids))
    (outcome,) = env_pool.EnvPool().run([episode.env_call()])
    episode.apply(outcome)
  played = types.SimpleNamespace(episodes=[episode])
  collector = types.SimpleNamespace(
    shards=1, collect=lambda *args, **kwargs: played
  )
  parts = types.SimpleNamespace(chat=chat, model=None, collector=collector)
  monkeypatch.setattr(build, 'checkpoint', lambda *args: (7, None))
  monkeypatch.setattr(build, 'policy', lambda *args: None)
  monkeypatch.setattr(play, '_STEP', types.SimpleNamespace(value=None))
  play.watch(schema.defaults(), parts, pathlib.Path('run'), 3)
  out = capsys.readouterr().out
  assert out.count('my first thought') == 1 == out.count('my second thought')
  assert out.index('second') < out.index('The environment failed: RuntimeErr')
  assert 'checkpoint 7' in out and 'context' not in out


# --- The command -------------------------------------------------------------


def test_env_flag_takes_config_changes_and_any_bytes(tmp_path):
  maps = tmp_path / 'lakes.txt'
  maps.write_text('SFHG\nFFFF')
  done = subprocess.run(
    [
      *(sys.executable, '-m', 'actfocus_jax.play', '--env=frozen_lake'),
      f'--config.env.boards={maps}',
      '--config.env.options.success_probability=1',
    ],
    cwd=ROOT,
    env={**os.environ, **processes.environment()},
    input=b'\xff\xfe\nDown\n',
    capture_output=True,
    timeout=120,
    check=False,
  )
  out = done.stdout.decode()
  assert done.returncode == 0, done.stderr
  assert 'Board size: 2 rows x 4 cols' in out
  assert "read: ['\ufffd\ufffd'], 0 run, reward 0, penalty -0.1" in out
  assert "read: ['Down'], 1 run" in out and '\n__OG\nP___\n' in out


def test_ctrl_c_at_prompt_exits_with_130():
  primary, secondary = pty.openpty()
  # A job in the background is started with SIGINT ignored.
  lines = (
    'import runpy, signal',
    'signal.signal(signal.SIGINT, signal.default_int_handler)',
    'runpy.run_module("actfocus_jax.play", run_name="__main__")',
  )
  process = subprocess.Popen(
    [sys.executable, '-c', '\n'.join(lines), '--env=frozen_lake'],
    cwd=ROOT,
    env={**os.environ, **processes.environment()},
    stdin=secondary,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  os.close(secondary)
  out = ''
  while not out.endswith('<think>'):
    out += process.stdout.read(1)
  process.send_signal(signal.SIGINT)
  rest, err = process.communicate(timeout=60)
  os.close(primary)
  assert (process.returncode, rest, err) == (130, '\n', '')


@pytest.mark.parametrize(
  ('arguments', 'words'),
  [
    (['--env=sokoban', '--model_path=x'], '--model_path needs --workdir'),
    (['--config=configs/own.py', '--model_path=x'], '--model_path needs --wor'),
    (['--env=sokoban', '--config.env.name=sudoku'], 'env.name is set by'),
    (['--env=sokoban', '--config.env.options.box=2'], 'env.options has boxes'),
    (
      ['--env=sokoban', '--config.env.options.rows=x'],
      "env.options.rows is 'x'; allowed: a whole",
    ),
    (['--env=sokoban', '--config.env.options.rows=2'], 'allowed: 3 to 32'),
    (['--workdir=x', '--config.seed=1'], '--config.seed=1 is a change to a co'),
  ],
)
def test_bad_flags_refused(arguments, words):
  assert_refused(command('play', *arguments), words)
