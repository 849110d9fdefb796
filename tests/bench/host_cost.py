"""What the host does for an episode, without a device: a part at a time.

Plays a config with made-up responses of a fixed length, so that no model is
needed. `sync` is what a turn costs those who do not play it, with what is
sent; `keep book` is what every call to decode costs, for each slot.

  PYTHONPATH=. python tests/bench/host_cost.py --tokenizer=QWEN \
    --config=configs/sokoban.py:size=3b
"""

import argparse
import pickle
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from actfocus_jax import casting
from actfocus_jax.cli import flags
from actfocus_jax.envs import base
from actfocus_jax.rollout import episode as episode_lib
from actfocus_jax.rollout import host_slots as host_slots_lib
from actfocus_jax.text import chat as chat_lib

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
  c = flags.read_config(path, arguments)
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
  openings = timed(
    times,
    'opening',
    seeds,
    lambda seed: episode_lib.opening(chat, game, base.reset(game.env, seed)),
  )
  pairs = [
    (episode_lib.Episode(chat, one), episode_lib.Episode(chat, one))
    for one in openings
  ]
  said, turns = response(chat, game), 0
  while live := [pair for pair in pairs if not pair[0].over]:
    turns += len(live)
    play_turn(times, live, said)
  for part in ('hear', 'read', 'play', 'render', 'follow'):
    times[f'{part} a turn'] = times.pop(part) / turns
  times['opening'] /= len(seeds)
  episodes = [episode for episode, _ in pairs]
  length = max(len(one.ids) for one in episodes)
  begin = time.perf_counter()
  episode_lib.to_trajectory(
    episodes, [0] * len(episodes), length=length, pad=chat.pad_id
  )
  times['lay out an episode'] = (time.perf_counter() - begin) / len(seeds)
  times['keep book of a slot'] = book()
  times['turns, number'] = turns / len(seeds) / 1e3
  return times


def response(chat, game) -> list[int]:
  """Ids of a long thought and a valid action."""
  thought = 'so the box must go left then ' * TOKENS
  action = chat.respond('', game.env.actions[:1])
  return chat.respond(thought, game.env.actions[:1])[:TOKENS] + action


def play_turn(times: Times, pairs, said: list[int]):
  """A turn of every episode, and of the copy that only follows it."""
  for pair in pairs:
    ids = said[-pair[0].token_budget :]
    timed(times, 'hear', pair, lambda one, ids=ids: one.add_response(ids, ids))
  playing = [episode for episode, _ in pairs]
  calls = timed(times, 'read', playing, lambda one: one.turn())
  outcomes = timed(times, 'play', calls, lambda call: call())
  concluded = timed(
    times,
    'render',
    list(zip(playing, outcomes, strict=True)),
    lambda pair: pair[0].apply(pair[1]),
  )
  begin = time.perf_counter()
  told = pickle.loads(pickle.dumps(concluded))
  for (_, follower), words in zip(pairs, told, strict=True):
    follower.sync(words)
  times['follow'] = times.get('follow', 0.0) + time.perf_counter() - begin
  assert [one.ids for one, _ in pairs] == [one.ids for _, one in pairs]


def book(slots: int = 4096, steps: int = 8) -> float:
  """Seconds a slot of one call to decode, everything live."""
  lanes = host_slots_lib.HostSlots(slots, TOKENS)
  for slot in range(slots):
    lanes.start(slot, slot, 512, TOKENS)
  ones_NB = np.ones((steps, slots), np.int32)
  begin, calls = time.perf_counter(), TOKENS // steps
  for _ in range(calls):
    lanes.take(ones_NB, ones_NB * 0.5, ones_NB > 0, (7, 9))
  return (time.perf_counter() - begin) / calls / slots


def timed(times: Times, name: str, things, call: Callable[[Any], Any]) -> list:
  """Calls for each thing, and adds how long that took."""
  begin = time.perf_counter()
  out = [call(thing) for thing in things]
  times[name] = times.get(name, 0.0) + time.perf_counter() - begin
  return out


if __name__ == '__main__':
  main()
