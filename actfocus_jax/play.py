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

from actfocus_jax import casting, command, places
from actfocus_jax.run import checks, env_settings, settings, storage

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
  checks.check(c)
  directory = places.check_model(c) if c.model.path else None

  # Imported late: it takes seconds, and the checks above should not.
  from actfocus_jax import assemble

  seed = c.eval.first_seed if _SEED.value is None else _SEED.value
  if _WORKDIR.value:
    assemble.fit_mesh(c)
    with assemble.parts(c) as parts:
      watch(c, parts, storage.path(_WORKDIR.value), seed)
    return
  with assemble.refusing_misfits():
    games = casting.games(c, by_hand=True)
    chat = assemble.chat(c, directory) if directory else _plain_chat()
  sys.stdin.reconfigure(errors='replace')  # A terminal may send any bytes.
  by_hand(chat, games, seed)


def by_hand(chat, games, seed: int):
  """Asks for every response on standard input."""
  from actfocus_jax.agent import episode as episode_lib
  from actfocus_jax.agent import games as games_lib
  from actfocus_jax.agent import host

  game, place = games_lib.pick(games, seed), host.Host()
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
    episode.hear(ids, [0.0] * len(ids))
    (outcome,) = place.run([episode.turn()])
    episode.conclude(outcome)
    if not episode.failure:
      _tell(episode.turns[-1])
  if episode.failure:  # For who wrote it.
    print(f'\n{episode.failure.details.rstrip()}\n{_RULE}')
  _tell_end(episode)


def watch(c, parts, workdir: pathlib.Path, seed: int):
  """Prints an episode of a checkpoint, turn by turn."""
  import jax

  from actfocus_jax import assemble

  step, params = assemble.checkpoint(parts.model, workdir, _STEP.value)
  played = parts.collector.collect(
    assemble.policy(parts.model, params),
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
    if _ENV.value or command.CONFIG.value is not None:
      raise settings.Refused('--workdir excludes --env and --config.')
    return places.run_config(
      storage.path(_WORKDIR.value), command.MODEL_PATH.value
    )
  if _STEP.value is not None:
    raise settings.Refused('--step needs --workdir.')
  if command.MODEL_PATH.value:
    raise settings.Refused('--model_path needs --workdir.')
  if _ENV.value and command.CONFIG.value is not None:
    raise settings.Refused('--env and --config exclude each other.')
  if command.CONFIG.value is not None:
    return command.config()
  if not _ENV.value:
    raise settings.Refused(
      '--env is missing; allowed: '
      f'{", ".join(env_settings.OPTIONS)}, or package.module:Class.'
    )
  return command.overridden(settings.defaults(_ENV.value))


def _plain_chat():
  """A tokenizer bridge in plain bytes, with the markup of Qwen2.5."""
  from actfocus_jax.agent import chat as chat_lib
  from actfocus_jax.agent import tokenizer

  return chat_lib.Chat(tokenizer.train([]))


if __name__ == '__main__':
  command.run(main, changes='env')
