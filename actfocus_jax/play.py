"""Play an environment by hand, or watch a checkpoint play it.

python -m actfocus_jax.play --env=sokoban --seed=3 [--config.env.boards=FILE]
python -m actfocus_jax.play --config=configs/NAME.py --seed=3
python -m actfocus_jax.play --workdir=DIR [--step=N] [--seed=123]

Everything that is printed between the lines is what the model sees, markup
included. By hand, answer with actions (`Up || Left`), or with a whole response
(`I go up.</think><answer>Up</answer>`); an empty line, Ctrl-D or Ctrl-C ends,
but no limit of tokens does. Without `--seed` it is the first held-out board.
"""

import pathlib
import sys

from absl import flags

from actfocus_jax import casting, errors
from actfocus_jax.cli import flags as flags_lib
from actfocus_jax.cli import paths
from actfocus_jax.config import schema, validate
from actfocus_jax.run import storage

_ENV = flags.DEFINE_string(
  'env', None, 'frozen_lake, sokoban, ... or package.module:Class.'
)
_SEED = flags.DEFINE_integer('seed', None, 'Of the board.', lower_bound=0)
_WORKDIR = flags.DEFINE_string('workdir', None, 'A run whose policy plays.')
_STEP = flags.DEFINE_integer('step', None, 'Checkpoint; default the newest.')
flags.declare_key_flag('config')
flags.declare_key_flag('model_path')

_RULE = '-' * 72


def main(argv: list[str]):
  """Checks the input, then plays one episode."""
  del argv
  try:
    _play()
  except KeyboardInterrupt:
    print()
    sys.exit(130)


def _play():
  c = _config()
  validate.check(c)
  directory = paths.check_model(c) if c.model.path else None

  # Imported late: it takes seconds, and the checks above should not.
  from actfocus_jax import build

  seed = c.eval.first_seed if _SEED.value is None else _SEED.value
  if _WORKDIR.value:
    build.fit_mesh(c)
    with build.parts(c) as parts:
      watch(c, parts, storage.path(_WORKDIR.value), seed)
    return
  with build.refusing_misfits():
    games = casting.games(c, by_hand=True)
    chat = build.chat(c, directory) if directory else _plain_chat()
  sys.stdin.reconfigure(errors='replace')  # A terminal may send any bytes.
  by_hand(chat, games, seed)


def by_hand(chat, games, seed: int):
  """Asks for every response on standard input."""
  from actfocus_jax.rollout import env_pool
  from actfocus_jax.rollout import episode as episode_lib
  from actfocus_jax.rollout import games as games_lib

  game, place = games_lib.pick(games, seed), env_pool.EnvPool()
  (opening,) = episode_lib.open_all(chat, place, [game], [seed])
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
    (outcome,) = place.run([episode.env_call()])
    episode.apply(outcome)
    if not episode.failure:
      _tell(episode.turns[-1])
  if episode.failure:  # For who wrote it.
    print(f'\n{episode.failure.details.rstrip()}\n{_RULE}')
  _tell_end(episode)


def watch(c, parts, workdir: pathlib.Path, seed: int):
  """Prints an episode of a checkpoint, turn by turn."""
  import jax

  from actfocus_jax import build

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
    _tell(turn)
  if episode.failure:  # The response that it did not survive has no turn.
    stop = episode.turns[-1].stop if episode.turns else 0
    print(f'{parts.chat.text(episode.ids[stop:])}\n\n{_RULE}')
  _tell_end(episode)


def _tell(turn):
  """What became of a turn; the penalty is what the model is not shown."""
  result = turn.result
  answer = 'unreadable' if turn.response.answer is None else 'read'
  print(
    f'\n{_RULE}\n{answer}: {turn.response.answer}, {result.actions_used} run, '
    f'reward {result.reward:g}, penalty {result.penalty:g}'
  )
  print(_RULE, flush=True)


def _tell_end(episode):
  if episode.failure:
    print(f'The environment failed: {episode.failure.reason}')
  if episode.truncated:
    context = episode.game.limits.context
    print(f'The context is full: limits.context is {context}.')
  over = 'over' if episode.over else 'left'
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
    return paths.run_config(
      storage.path(_WORKDIR.value), flags_lib.MODEL_PATH.value
    )
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
  """A tokenizer bridge in plain bytes, with the markup of Qwen2.5."""
  from actfocus_jax.text import chat as chat_lib
  from actfocus_jax.text import tokenizer

  return chat_lib.Chat(tokenizer.train([]))


if __name__ == '__main__':
  flags_lib.run(main, changes='env')
