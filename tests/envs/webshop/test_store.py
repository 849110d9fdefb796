"""A shop on disk: the same shop, built once, never half made."""

import json
import os
import pathlib
import random
import subprocess
import sys
import time

import pytest

from actfocus_jax.envs import webshop
from actfocus_jax.envs.webshop import shops, store

pytest.importorskip('tantivy')
WORDS = ['lamp', 'shirt', 'wool', 'red', 'soft', 'cheap', 'mug', 'tea', 'hat']
COUNT = 300
ROOT = pathlib.Path(__file__).resolve().parents[3]


def public_files(kit, seed=0, count=COUNT):
  """Records, notes and instructions as the full files have them."""
  rng = random.Random(seed)

  def words(most):
    return ' '.join(rng.choices(WORDS, k=rng.randrange(1, most)))

  records, notes, human = [], {}, {}
  for place in range(count):
    asin = f'B{place:05d}'
    options = {
      name: kit.values(*rng.sample(WORDS, rng.randrange(1, 4)))
      for name in rng.sample(['Color', 'Size', 'Style'], rng.randrange(3))
    }
    records.append(
      kit.record(
        asin,
        name=words(6),
        full_description=words(30),
        pricing=rng.choice(['', '$5.00', '$10.00 to $99.00']),
        customization_options=options or '',
      )
    )
    if rng.random() < 0.9:
      wanted = rng.sample(WORDS, 2)
      notes[asin] = kit.note(*wanted, instruction=f'Find me {words(4)}')
    if rng.random() < 0.2:
      human[asin] = [
        {'instruction': words(9), 'instruction_attributes': ['soft']}
      ] * 2
  records.insert(7, dict(records[3], name='Came second'))
  records.insert(9, kit.record('nan'))
  return records, notes, human


@pytest.fixture(scope='module')
def places(kit, tmp_path_factory):
  """The same files as the small and as the full set."""
  files = public_files(kit)
  small, full = (tmp_path_factory.mktemp(n) for n in ('small', 'full'))
  kit.write(small, *files, ending='_1000.json')
  kit.write(full, *files)
  return str(small), str(full)


def silent(what, share):
  """A progress that shows nothing."""


@pytest.fixture(scope='module')
def built(places):
  """The small set and the full one."""
  full = webshop.WebShop(data=places[1], progress=silent)
  return webshop.WebShop(data=places[0]), full


def opened(env):
  return env._shop


def test_disk_and_memory_hold_the_same_products_and_goals(places, built):
  small, full = built
  assert isinstance(opened(small), shops.MemoryShop)
  assert isinstance(opened(full), store.DiskShop)
  assert full.goal_count == small.goal_count > COUNT
  for number in range(small.goal_count):
    assert opened(full).goal(number) == opened(small).goal(number)
  for place in range(COUNT):
    asin = f'B{place:05d}'
    assert full.product(asin) == small.product(asin)
    assert hash(full.product(asin))
  assert full.product('B99999') is None
  for seed in (0, 123, 10_000, 10**9):
    assert full.reset(seed) == small.reset(seed)
  rng = random.Random(1)
  for _ in range(30):
    query = ' '.join(rng.sample(WORDS, 3))
    assert opened(full).find(query) == opened(small).find(query)
  small, full = (webshop.WebShop(data=d, goals='human') for d in places)
  assert full.goal_count == small.goal_count > 20
  for number in range(small.goal_count):
    assert opened(full).goal(number) == opened(small).goal(number)


def test_built_shop_is_reopened_without_its_files(kit, tmp_path):
  files = public_files(kit, count=30)
  data = kit.write(tmp_path / 'data', *files)
  index = str(tmp_path / 'deep' / 'index')
  first = webshop.WebShop(data=data, index=index, progress=silent)
  shops._on_disk.cache_clear()
  for name in ('items_shuffle.json', 'items_ins_v2.json'):
    (tmp_path / 'data' / name).unlink()
  again = webshop.WebShop(data=data, index=index, progress=never)
  assert opened(again) is not opened(first)
  assert again.reset(5) == first.reset(5)


def never(what, share):
  raise AssertionError('built once more')


def test_shop_of_other_files_is_refused(kit, tmp_path):
  data = kit.write(tmp_path, *public_files(kit, count=20))
  webshop.WebShop(data=data, progress=silent)
  kit.write(tmp_path, *public_files(kit, seed=1, count=25))
  shops._on_disk.cache_clear()
  with pytest.raises(ValueError, match='made of another .*items_shuffle.json'):
    webshop.WebShop(data=data)


# --- Builds that fail --------------------------------------------------------


def test_interrupted_build_leaves_nothing(kit, tmp_path):
  data = kit.write(tmp_path, *public_files(kit, count=20))
  before = sorted(os.listdir(tmp_path))

  def interrupt(doing, share):
    if doing == 'Indexing products':
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    webshop.WebShop(data=data, progress=interrupt)
  assert sorted(os.listdir(tmp_path)) == before
  assert webshop.WebShop(data=data, progress=silent).goal_count


def test_build_overwrites_nothing(kit, tmp_path):
  data = kit.write(tmp_path, *public_files(kit, count=20))
  place = tmp_path / 'mine'
  place.mkdir()
  (place / 'about.json').write_text(json.dumps({'format': 0}))
  with pytest.raises(ValueError, match='is not an index of this version'):
    webshop.WebShop(data=data, index=str(place))
  assert os.listdir(place) == ['about.json']


# --- Several builds ----------------------------------------------------------

BUILDS = """
import pathlib, sys, time
from actfocus_jax.envs import webshop
data, gate = map(pathlib.Path, sys.argv[1:])
def stop(what, share):
  if what == 'Indexing products':
    (gate / 'stopped').touch()
    while not (gate / 'go').exists():
      time.sleep(0.01)
webshop.WebShop(data=str(data), progress=stop)
"""


@pytest.fixture
def another(kit, tmp_path):
  """Data, and another process that stopped while it builds them."""
  data, gate = tmp_path / 'data', tmp_path / 'gate'
  kit.write(data, *public_files(kit, count=20))
  gate.mkdir()
  command = [sys.executable, '-c', BUILDS, str(data), str(gate)]
  with subprocess.Popen(command, cwd=ROOT) as process:
    try:
      while not (gate / 'stopped').exists():
        assert process.poll() is None
        time.sleep(0.01)
      yield data, gate, process
    finally:
      process.kill()


def test_second_build_waits_for_the_first(another):
  data, gate, process = another
  stages = []

  def release(what, share):
    stages.append(what)
    (gate / 'go').touch()

  assert webshop.WebShop(data=str(data), progress=release).goal_count
  assert stages == ['Waiting for another build']
  assert process.wait() == 0
  assert len(os.listdir(data)) == 4


def test_remains_of_a_killed_build_are_deleted(another):
  data, _, process = another
  process.kill()
  process.wait()
  assert [path.suffix for path in data.glob('webshop*')] == ['.part']
  mine = data / 'webshop_index.my.part'
  mine.mkdir()
  assert webshop.WebShop(data=str(data), progress=silent).goal_count
  assert {path.name for path in data.glob('webshop*')} == {
    'webshop_index',
    mine.name,
  }
