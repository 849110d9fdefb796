"""A shop on disk: the same shop, built once, never half made."""

import functools
import json
import os
import pathlib
import random
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent import futures

import pytest

from actfocus_jax.envs import webshop
from actfocus_jax.envs.webshop import catalogue, shops, store

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


class Told:
  """A progress that remembers what it was told."""

  def __init__(self):
    self.heard = []

  def __call__(self, what, share):
    self.heard.append((what, share))


@pytest.fixture(scope='module')
def built(places):
  """The small set, the full one, and what was told while it was built."""
  told = Told()
  full = webshop.WebShop(data=places[1], progress=told)
  return webshop.WebShop(data=places[0]), full, told.heard


def opened(env):
  return env._shop


def test_a_full_set_becomes_a_shop_on_disk(places, built):
  small, full, _ = built
  assert isinstance(opened(small), shops.MemoryShop)
  assert isinstance(opened(full), store.DiskShop)
  inside = sorted(os.listdir(os.path.join(places[1], 'webshop_index')))
  assert inside == ['about.json', 'goals.npy', 'search', 'shop.sqlite']


def test_products_and_goals_are_the_same(built):
  small, full, _ = built
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


def test_the_same_is_found(built):
  small, full, _ = built
  rng = random.Random(1)
  for _ in range(30):
    query = ' '.join(rng.sample(WORDS, 3))
    assert opened(full).find(query) == opened(small).find(query)


def test_episodes_are_the_same(built):
  small, full, _ = built
  for seed in range(5):
    rng = random.Random(seed)
    state, _ = small.reset(seed)
    action = 'search[soft hat]'
    for _ in range(30):
      following, step = small.step(state, action)
      assert (following, step) == full.step(state, action)
      links = [*small.page(following).links]
      action = f'click[{rng.choice(links)}]' if links else 'search[red]'
      state = following


def test_human_goals_are_the_same(places, built):
  small, full = (webshop.WebShop(data=d, goals='human') for d in places)
  assert full.goal_count == small.goal_count > 20
  for number in range(small.goal_count):
    assert opened(full).goal(number) == opened(small).goal(number)


def test_progress_is_told(built):
  heard = built[2]
  assert [what for what, _ in heard] == sorted(
    (what for what, _ in heard),
    key=['Reading notes', 'Indexing products'].index,
  )
  for name in ('Reading notes', 'Indexing products'):
    shares = [share for what, share in heard if what == name]
    assert shares == sorted(shares) and shares[-1] == 1.0


def test_a_shop_is_reopened_without_its_files(kit, tmp_path):
  files = public_files(kit, count=30)
  data = kit.write(tmp_path / 'data', *files)
  index = str(tmp_path / 'deep' / 'index')
  first = webshop.WebShop(data=data, index=index, progress=Told())
  shops._on_disk.cache_clear()
  for name in ('items_shuffle.json', 'items_ins_v2.json'):
    (tmp_path / 'data' / name).unlink()
  again = webshop.WebShop(data=data, index=index, progress=never)
  assert opened(again) is not opened(first)
  assert again.reset(5) == first.reset(5)


def never(what, share):
  raise AssertionError('built once more')


def test_a_built_shop_is_not_built_again(places, built):
  shops._on_disk.cache_clear()
  assert webshop.WebShop(data=places[1], progress=never).goal_count


def test_a_build_over_a_shop_does_nothing(places, built):
  files = catalogue.find(places[1], human=False)
  store.build(files, files.products.parent / 'webshop_index', never)


def test_other_files_are_noticed(kit, tmp_path):
  data = kit.write(tmp_path, *public_files(kit, count=20))
  webshop.WebShop(data=data, progress=Told())
  kit.write(tmp_path, *public_files(kit, seed=1, count=25))
  shops._on_disk.cache_clear()
  with pytest.raises(ValueError, match='made of another .*items_shuffle.json'):
    webshop.WebShop(data=data)


def test_no_human_instructions_inside(kit, tmp_path):
  records, notes, _ = public_files(kit, count=20)
  data = kit.write(tmp_path, records, notes)
  webshop.WebShop(data=data, progress=Told())
  kit.write(tmp_path, records, notes, {})
  with pytest.raises(ValueError, match='built without items_human_ins.json'):
    webshop.WebShop(data=data, goals='human')


# --- Threads -----------------------------------------------------------------


class Watched(sqlite3.Connection):
  """A connection that takes its time, and tells if two use it at once."""

  is_busy = False

  def execute(self, *arguments):
    assert not self.is_busy, 'two threads at one connection'
    self.is_busy = True
    time.sleep(1e-4)
    cursor = super().execute(*arguments)
    self.is_busy = False
    return cursor


def test_threads_get_what_they_ask_for(places, built, monkeypatch):
  connect = functools.partial(sqlite3.connect, factory=Watched)
  monkeypatch.setattr(store.sqlite3, 'connect', connect)
  place = pathlib.Path(places[1], 'webshop_index').resolve()
  shop = store.DiskShop(place, human=False)
  asins = [f'B{place:05d}' for place in range(COUNT)]
  begin = threading.Barrier(8)

  def look(seed):
    begin.wait()
    mixed = random.Random(seed).sample(asins, COUNT)
    return [asin for asin in mixed if shop.product(asin).asin != asin]

  with futures.ThreadPoolExecutor(8) as pool:
    assert [*pool.map(look, range(8))] == [[]] * 8
  assert shop.find('soft hat') == opened(built[0]).find('soft hat')


# --- Builds that fail --------------------------------------------------------


@pytest.mark.parametrize('what', ['Reading notes', 'Indexing products'])
@pytest.mark.parametrize('error', [KeyboardInterrupt, MemoryError])
def test_an_interrupted_build_leaves_nothing(kit, tmp_path, what, error):
  data = kit.write(tmp_path, *public_files(kit, count=20))
  before = sorted(os.listdir(tmp_path))

  def interrupt(doing, share):
    if doing == what:
      raise error

  with pytest.raises(error):
    webshop.WebShop(data=data, progress=interrupt)
  assert sorted(os.listdir(tmp_path)) == before
  assert webshop.WebShop(data=data, progress=Told()).goal_count


@pytest.mark.parametrize('name', ['items_shuffle.json', 'items_ins_v2.json'])
def test_a_cut_file_is_named_and_leaves_nothing(kit, tmp_path, name):
  data = kit.write(tmp_path, *public_files(kit, count=20))
  path = tmp_path / name
  path.write_bytes(path.read_bytes()[:-9])
  before = sorted(os.listdir(tmp_path))
  with pytest.raises(ValueError, match=f'{name} is not the JSON .* too early'):
    webshop.WebShop(data=data, progress=Told())
  assert sorted(os.listdir(tmp_path)) == before


def test_nothing_is_overwritten(kit, tmp_path):
  data = kit.write(tmp_path, *public_files(kit, count=20))
  place = tmp_path / 'mine'
  place.mkdir()
  (place / 'about.json').write_text(json.dumps({'format': 0}))
  with pytest.raises(ValueError, match='is no index of this version'):
    webshop.WebShop(data=data, index=str(place))
  assert os.listdir(place) == ['about.json']


def test_a_place_that_cannot_be_made_is_refused(kit, tmp_path):
  data = kit.write(tmp_path / 'data', *public_files(kit, count=20))
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match='cannot be made'):
    webshop.WebShop(data=data, index=str(tmp_path / 'file' / 'index'))


def test_a_shop_that_comes_there_meanwhile_is_kept(kit, tmp_path):
  data = kit.write(tmp_path, *public_files(kit, count=20))
  index, other = tmp_path / 'index', tmp_path / 'other'
  webshop.WebShop(data=data, index=str(other), progress=Told())

  def meanwhile(what, share):
    if what == 'Indexing products' and other.exists():
      other.rename(index)

  before = (other / 'about.json').stat()
  mine = webshop.WebShop(data=data, index=str(index), progress=meanwhile)
  assert mine.goal_count
  assert os.path.samestat((index / 'about.json').stat(), before)
  assert sorted(os.listdir(tmp_path)) == [
    'index',
    'items_human_ins.json',
    'items_ins_v2.json',
    'items_shuffle.json',
  ]


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


def test_a_second_build_waits_for_the_first(another):
  data, gate, process = another
  heard = []

  def told(what, share):
    heard.append(what)
    (gate / 'go').touch()

  assert webshop.WebShop(data=str(data), progress=told).goal_count
  assert heard == ['Waiting for another build']
  assert process.wait() == 0
  assert sorted(os.listdir(data)) == [
    'items_human_ins.json',
    'items_ins_v2.json',
    'items_shuffle.json',
    'webshop_index',
  ]


def test_what_a_killed_build_left_is_deleted(another):
  data, _, process = another
  process.kill()
  process.wait()
  assert [path.suffix for path in data.glob('webshop*')] == ['.part']
  mine = data / 'webshop_index.my.part'
  mine.mkdir()
  told = Told()
  assert webshop.WebShop(data=str(data), progress=told).goal_count
  assert told.heard[0][0] == 'Reading notes'
  assert {*os.listdir(data)} == {
    'items_human_ins.json',
    'items_ins_v2.json',
    'items_shuffle.json',
    'webshop_index',
    mine.name,
  }


def test_who_waited_for_a_lock_locks_others_out(tmp_path):
  waiting = threading.Event()
  lock = tmp_path / '.index.lock'

  def wait():
    with store._locked(tmp_path / 'index', lambda *_: waiting.set()):
      return lock.exists()

  with futures.ThreadPoolExecutor(1) as pool:
    with store._locked(tmp_path / 'index', never):
      second = pool.submit(wait)
      assert waiting.wait(10)
    assert second.result()
  assert not lock.exists()


# --- What a build needs and shows --------------------------------------------


def test_tantivy_is_named_where_it_is_missing(kit, tmp_path, monkeypatch):
  data = kit.write(tmp_path, *public_files(kit, count=20))
  find_spec = store.search.importlib.util.find_spec
  monkeypatch.setattr(
    store.search.importlib.util,
    'find_spec',
    lambda name: None if name == 'tantivy' else find_spec(name),
  )
  with pytest.raises(ValueError, match='needs tantivy: pip install tantivy'):
    webshop.WebShop(data=data)


@pytest.mark.parametrize('is_terminal', [True, False])
def test_the_bar(capsys, monkeypatch, is_terminal):
  monkeypatch.setattr(store.sys.stderr, 'isatty', lambda: is_terminal)
  bar = store.Bar()
  for thousandth in range(1001):
    bar('Indexing', thousandth / 1000)
  drawn = capsys.readouterr().err
  assert drawn.count('Indexing') == (101 if is_terminal else 11)
  assert drawn.endswith(f'Indexing [{"#" * 20}] 100 %\n')
  assert drawn.count('\n') == (1 if is_terminal else 11)
  assert drawn.count('\r') == (101 if is_terminal else 0)
