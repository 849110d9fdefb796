"""Play an environment by hand, or watch a checkpoint play it.

python -m actfocus_jax.play --env=sokoban --seed=3 [--config.env.boards=FILE]
python -m actfocus_jax.play --config=configs/NAME.py --seed=3
python -m actfocus_jax.play --workdir=DIR [--step=N] [--seed=123]

The text between the rules is exactly what the model sees, markup included. By
hand, answer with actions (`Up || Left`) or with a whole response
(`I go up.</think><answer>Up</answer>`). An empty line, Ctrl-D or Ctrl-C ends
the episode; token limits do not apply. The default is the first held-out board.
"""

import pathlib
import sys

import jax
from absl import flags

from actfocus_jax import build, errors
from actfocus_jax.cli import flags as flags_lib
from actfocus_jax.cli import paths
from actfocus_jax.config import schema, validate
from actfocus_jax.rollout import env_pool
from actfocus_jax.rollout import episode as episode_lib
from actfocus_jax.rollout import games as games_lib
from actfocus_jax.run import storage
from actfocus_jax.text import chat as chat_lib
from actfocus_jax.text import tokenizer

_ENV = flags.DEFINE_string(
  'env', None, 'frozen_lake, sokoban, ... or package.module:Class.'
)
_SEED = flags.DEFINE_integer('seed', None, 'Seed of the board.', lower_bound=0)
_WORKDIR = flags.DEFINE_string('workdir', None, 'A run whose policy plays.')
_STEP = flags.DEFINE_integer('step', None, 'Checkpoint; default the newest.')
flags.declare_key_flag('config')
flags.declare_key_flag('model_path')

_RULE = '-' * 72


def main(argv: list[str]):
  """Check the input, then play one episode."""
  del argv
  try:
    _play()
  except KeyboardInterrupt:
    print()
    sys.exit(130)


def _play():
  c = _config()
  validate.check(c)
  directory = None
  if c.model.path:
    directory = paths.check_model(c.model, c.warm_start.cache)
  seed = c.eval.first_seed if _SEED.value is None else _SEED.value
  if _WORKDIR.value:
    build.fit_mesh(c)
    with build.parts(c) as parts:
      watch(c, parts, storage.path(_WORKDIR.value), seed)
    return
  with build.refusing_misfits():
    games = build.games(c, by_hand=True)
    chat = build.chat(c, directory) if directory else _plain_chat()
  sys.stdin.reconfigure(errors='replace')  # A terminal may send any bytes.
  by_hand(chat, games, seed)


def by_hand(chat, games, seed: int):
  """Read every response from standard input."""
  game, pool = games_lib.pick(games, seed), env_pool.EnvPool()
  (opening,) = episode_lib.open_all(chat, pool, [game], [seed])
  episode = episode_lib.Episode(chat, opening)
  print(f'{game.name}, seed {seed}\n{_RULE}')
  shown = 0
  while not episode.over:
    print(chat.text(episode.ids[shown:]), end='', flush=True)
    shown = len(episode.ids)
    line = sys.stdin.readline().rstrip('\n')
    if not line:
      print()
      break
    text = line if '</think>' in line else f'</think><answer>{line}</answer>'
    ids = chat.tokenizer.encode(text, add_special_tokens=False)
    ids.append(chat.stop_ids[0])
    shown += len(ids)
    episode.add_response(ids, [0.0] * len(ids))
    (outcome,) = pool.run([episode.env_call()])
    episode.apply(outcome)
    if not episode.failure:
      _print_turn(episode.turns[-1])
  if episode.failure:  # For the author of the environment.
    print(f'\n{episode.failure.details.rstrip()}\n{_RULE}')
  _print_end(episode)


def watch(c, parts, workdir: pathlib.Path, seed: int):
  """Print an episode of a checkpoint, turn by turn."""
  step, params = build.checkpoint(parts.model, workdir, _STEP.value)
  played = parts.collector.collect(
    build.policy(parts.model, params),
    [seed] * parts.collector.shards,
    jax.random.key(c.seed),
    members=1,
    temperature=c.eval.temperature,
  )
  episode = played.episodes[0]
  print(f'{episode.game.name}, seed {seed}, checkpoint {step}\n{_RULE}')
  for turn in episode.turns:
    print(parts.chat.text(episode.ids[turn.prompt : turn.stop]))
    _print_turn(turn)
  if episode.failure:  # The last response has no turn.
    stop = episode.turns[-1].stop if episode.turns else 0
    print(f'{parts.chat.text(episode.ids[stop:])}\n\n{_RULE}')
  _print_end(episode)


def _print_turn(turn):
  """Print the outcome of a turn; the model does not see the penalty."""
  result = turn.result
  answer = 'unreadable' if turn.response.answer is None else 'read'
  print(
    f'\n{_RULE}\n{answer}: {turn.response.answer}, {result.actions_used} run, '
    f'reward {result.reward:g}, penalty {result.penalty:g}'
  )
  print(_RULE, flush=True)


def _print_end(episode):
  if episode.failure:
    print(f'The environment failed: {episode.failure.reason}')
  if episode.truncated:
    context = episode.game.limits.context
    print(f'The context is full: limits.context is {context}.')
  over = 'over' if episode.over else 'ended early'
  solved = 'solved' if episode.success else 'not solved'
  print(
    f'{over} after {len(episode.turns)} turns, {solved}, return '
    f'{episode.episode_return:g}'
  )
  if episode.over and episode.turns:
    print(episode.text)


def _config():
  if _WORKDIR.value:
    if _ENV.value or flags_lib.CONFIG.value is not None:
      raise errors.UsageError('--workdir excludes --env and --config.')
    return flags_lib.run_config(storage.path(_WORKDIR.value))
  if _STEP.value is not None:
    raise errors.UsageError('--step needs --workdir.')
  if flags_lib.MODEL_PATH.value:
    raise errors.UsageError('--model_path needs --workdir.')
  if _ENV.value and flags_lib.CONFIG.value is not None:
    raise errors.UsageError('--env and --config exclude each other.')
  if flags_lib.CONFIG.value is not None:
    return flags_lib.config()
  if not _ENV.value:
    raise errors.UsageError(
      '--env is missing; allowed: '
      f'{", ".join(schema.ENVS)}, or package.module:Class.'
    )
  return flags_lib.overridden(schema.defaults(_ENV.value))


def _plain_chat():
  """Tokenizer bridge in plain bytes, with the markup of Qwen2.5."""
  return chat_lib.Chat(tokenizer.train([]))


if __name__ == '__main__':
  flags_lib.run(main, changes='env')
