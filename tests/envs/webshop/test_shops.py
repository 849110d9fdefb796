"""Which shop is opened, that broken files say so, and searches in threads."""

import pathlib
import subprocess
import sys
import threading

import pytest

from actfocus_jax.envs import webshop
from actfocus_jax.envs.webshop import catalogue, search, shops

ROOT = pathlib.Path(__file__).resolve().parents[3]


def some(kit, count=4):
  records = [kit.record(f'B{i}', name=f'Thing {i}') for i in range(count)]
  notes = {f'B{i}': kit.note('red') for i in range(count)}
  return records, notes


def test_the_first_of_two_products_counts(kit, tmp_path):
  records, notes = some(kit)
  again = kit.record('B1', name='Another thing')
  data = kit.write(tmp_path, [*records, again], notes, ending='_1000.json')
  env = webshop.WebShop(data=data)
  assert env.goal_count == 4
  assert env.product('B1').title == 'Thing 1'
  assert env.product('B9') is None


def test_changed_files_are_read_again(kit, tmp_path):
  records, notes = some(kit)
  kit.write(tmp_path, records, notes, ending='_1000.json')
  assert webshop.WebShop(data=str(tmp_path)).goal_count == 4
  records, notes = some(kit, 6)
  kit.write(tmp_path, records, notes, ending='_1000.json')
  assert webshop.WebShop(data=str(tmp_path)).goal_count == 6


def test_human_goals(kit, tmp_path):
  records, notes = some(kit)
  said = [
    {'instruction': f'i want thing {i}', 'instruction_attributes': ['red']}
    for i in range(3)
  ]
  human = {'B2': said[:2], 'B0': said[2:], 'gone': said, 'B1': [{}]}
  data = kit.write(tmp_path, records, notes, human, ending='_1000.json')
  env = webshop.WebShop(data=data, goals='human')
  texts = [env.goal(env.load(str(n))[0]).text for n in range(env.goal_count)]
  assert [text.partition(',')[0] for text in texts] == [
    f'i want thing {i}' for i in (2, 0, 1)
  ]


@pytest.mark.parametrize(
  'name', ['items_shuffle_1000.json', 'items_ins_v2_1000.json']
)
def test_a_cut_file_is_named(kit, tmp_path, name):
  records, notes = some(kit)
  data = kit.write(tmp_path, records, notes, ending='_1000.json')
  path = tmp_path / name
  path.write_bytes(path.read_bytes()[:-20])
  with pytest.raises(ValueError, match=f'{name} is not the JSON .* too early'):
    webshop.WebShop(data=data)


def test_too_few_goals_are_refused(kit, tmp_path):
  records, _ = some(kit)
  data = kit.write(tmp_path, records, {}, ending='_1000.json')
  with pytest.raises(ValueError, match='gives 0 goals'):
    webshop.WebShop(data=data)


def test_memory_shop_finds_in_the_order_of_the_shop():
  products = [catalogue.Product(f'B{i}', 'same title') for i in (3, 1, 2)]
  shop = shops.MemoryShop(products)
  assert shop.find('title') == ('B3', 'B1', 'B2')


# --- Threads -----------------------------------------------------------------


def test_the_index_is_made_with_the_shop(monkeypatch):
  made, make = [], search.MemoryIndex

  def index(texts):
    made.append(threading.current_thread())
    return make(texts)

  monkeypatch.setattr(search, 'MemoryIndex', index)
  shop = shops.MemoryShop([catalogue.Product('B1', 'A mug')])
  assert made == [threading.current_thread()]
  assert shop.find('mug') == ('B1',) and len(made) == 1


def in_a_new_process(code):
  """What a process prints that has imported nothing before."""
  ended = subprocess.run(
    [sys.executable, '-c', code],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )
  assert ended.returncode == 0, ended.stderr
  return ended.stdout.strip()


def test_threads_search_a_new_shop_at_once():
  found = in_a_new_process("""
from actfocus_jax.rollout import env_pool
from actfocus_jax.envs import webshop
env = webshop.WebShop()
state, _ = env.reset(0)
calls = [lambda: env.step(state, 'search[soft socks]')[1].text] * 8
found = env_pool.EnvPool(8).run(calls)
print({type(one).__name__ for one in found}, len({*found}))
""")
  assert found == "{'str'} 1"


def test_threads_import_the_search_library_at_once():
  found = in_a_new_process("""
import sys
import jax
from actfocus_jax.rollout import env_pool
from actfocus_jax.envs.webshop import search
find = lambda: tuple(search.MemoryIndex(['a mug', 'tea']).best('tea'))
print({*env_pool.EnvPool(8).run([find] * 8)}, sys.modules['jax'] is jax)
""")
  assert found == '{(1,)} True'
