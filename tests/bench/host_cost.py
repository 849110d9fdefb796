"""What the host does for an episode, without a device: a part at a time.

Plays a config with made-up responses of a fixed length, so that no model is
needed. `keep book` is what every call to decode costs, for each slot.

  PYTHONPATH=. python tests/bench/host_cost.py --tokenizer=QWEN \
    --config=configs/sokoban.py:size=3b
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from actfocus_jax import casting, command
from actfocus_jax.agent import chat as chat_lib
from actfocus_jax.agent import episode as episode_lib
from actfocus_jax.agent import lanes as lanes_lib
from actfocus_jax.envs import base

TOKENS = 400  # Of a response.
Times = dict[str, float]


def main():
  """Prints the median and the range of each part."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--tokenizer', required=True)
  parser.add_argument('--config', default='configs/sokoban.py:size=3b')
  parser.add_argument('--episodes', type=int, default=64)
  parser.add_argument('--repeats', type=int, default=7)
  args = parser.parse_args()
  path, _, arguments = args.config.partition(':')
  c = command.read_config(path, arguments)
  chat = chat_lib.Chat(chat_lib.load_tokenizer(args.tokenizer))
  (game,) = casting.games(c)
  runs = [
    play(chat, game, range(first, first + args.episodes))
    for first in range(0, args.repeats * args.episodes, args.episodes)
  ]
  print(f'{args.config}, {args.repeats} x {args.episodes} episodes; ms:')
  for name in runs[0]:
    own = sorted(run[name] * 1e3 for run in runs)
    middle = statistics.median(own)
    print(f'{name:<22} {middle:8.4f} ({own[0]:.4f} to {own[-1]:.4f})')


def play(chat, game, seeds: range) -> Times:
  """Plays an episode from each seed; seconds of a part, of one of them."""
  times: Times = {}
  begin = time.perf_counter()
  openings = [
    episode_lib.opening(chat, game, base.reset(game.env, seed))
    for seed in seeds
  ]
  times['opening'] = (time.perf_counter() - begin) / len(seeds)
  episodes = [episode_lib.Episode(chat, opening) for opening in openings]
  thought = 'so the box must go left then ' * TOKENS
  said = chat.respond(thought, game.env.actions[:1])
  said = said[: TOKENS - 12] + chat.respond('', game.env.actions[:1])[-12:]
  turns = 0
  parts = {'read a turn': 0.0, 'play a turn': 0.0, 'render a turn': 0.0}
  while playing := [one for one in episodes if not one.over]:
    turns += len(playing)
    room = [said[-one.token_budget :] for one in playing]
    calls = timed(
      parts,
      'read a turn',
      lambda playing=playing, room=room: [
        one.listen(ids, [-1.0] * len(ids))
        for one, ids in zip(playing, room, strict=True)
      ],
    )
    done = timed(
      parts, 'play a turn', lambda calls=calls: [call() for call in calls]
    )
    timed(
      parts,
      'render a turn',
      lambda playing=playing, done=done: [
        one.conclude(outcome)
        for one, outcome in zip(playing, done, strict=True)
      ],
    )
  times |= {name: seconds / turns for name, seconds in parts.items()}
  begin = time.perf_counter()
  length = max(len(one.ids) for one in episodes)
  episode_lib.to_trajectory(
    episodes, [0] * len(episodes), length=length, pad=chat.pad_id
  )
  times['lay out an episode'] = (time.perf_counter() - begin) / len(seeds)
  times['keep book of a slot'] = book()
  times['turns, number'] = turns / len(seeds) / 1e3
  return times


def book(slots: int = 4096, steps: int = 8) -> float:
  """Seconds a slot of one call to decode, everything live."""
  lanes = lanes_lib.Lanes(slots, TOKENS)
  for slot in range(slots):
    lanes.start(slot, slot, 512, TOKENS)
  ones_NB = np.ones((steps, slots), np.int32)
  begin, calls = time.perf_counter(), TOKENS // steps
  for _ in range(calls):
    lanes.take(ones_NB, ones_NB * 0.5, ones_NB > 0, (7, 9))
  return (time.perf_counter() - begin) / calls / slots


def timed(times: Times, name: str, call: Callable[[], Any]) -> Any:
  """Calls, and adds how long it took."""
  begin = time.perf_counter()
  out = call()
  times[name] += time.perf_counter() - begin
  return out


if __name__ == '__main__':
  main()
