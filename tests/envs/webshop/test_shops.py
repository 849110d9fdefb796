"""Shops in memory: their products, goals, and searches in threads."""

import pathlib
import subprocess
import sys

from actfocus_jax.envs import webshop

ROOT = pathlib.Path(__file__).resolve().parents[3]


def some(kit, count=4):
  records = [kit.record(f'B{i}', name=f'Thing {i}') for i in range(count)]
  notes = {f'B{i}': kit.note('red') for i in range(count)}
  return records, notes


def test_changed_files_are_read_again(kit, tmp_path):
  records, notes = some(kit)
  kit.write(tmp_path, records, notes, ending='_1000.json')
  assert webshop.WebShop(data=str(tmp_path)).goal_count == 4
  records, notes = some(kit, 6)
  kit.write(tmp_path, records, notes, ending='_1000.json')
  assert webshop.WebShop(data=str(tmp_path)).goal_count == 6


def test_human_goals_are_in_the_order_of_the_shop(kit, tmp_path):
  records, notes = some(kit)
  words = [
    {'instruction': f'i want thing {i}', 'instruction_attributes': ['red']}
    for i in range(3)
  ]
  human = {'B2': words[:2], 'B0': words[2:], 'gone': words, 'B1': [{}]}
  data = kit.write(tmp_path, records, notes, human, ending='_1000.json')
  env = webshop.WebShop(data=data, goals='human')
  texts = [env.goal(env.load(str(n))[0]).text for n in range(env.goal_count)]
  assert [text.partition(',')[0] for text in texts] == [
    f'i want thing {i}' for i in (2, 0, 1)
  ]


def test_threads_search_a_new_shop_at_once():
  """In a new process, so that all threads import the search library too."""
  code = """
import sys
import jax
from actfocus_jax.rollout import env_pool
from actfocus_jax.envs import webshop
env = webshop.WebShop()
state, _ = env.reset(0)
calls = [lambda: env.step(state, 'search[soft socks]')[1].text] * 8
texts = env_pool.EnvPool(8).run(calls)
print({type(text) for text in texts} == {str}, len({*texts}))
print(sys.modules['jax'] is jax)
"""
  ended = subprocess.run(
    [sys.executable, '-c', code],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )
  assert ended.stdout == 'True 1\nTrue\n', ended.stderr
