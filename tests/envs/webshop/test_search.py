"""Search: terms, and scores against loops."""

import math
import random

import pytest

from actfocus_jax.envs.webshop import search


@pytest.mark.parametrize(
  'text, expected',
  [
    ('Running shoes for the easily bored', 'run shoe easili bore'),
    ("Men's and women’s socks, x-large", 'men women sock x larg'),
    ('1,200.5 mAh 4K non_stick', '1,200.5 mah 4k non stick'),
    ('Été Ñandú Straße', 'été ñandú straße'),
    ("It's its", 'it'),
    ('the of and', ''),
    (' .,;[]{} \ud800\0 ', ''),
  ],
)
def test_terms_are_stems_without_stop_words(text, expected):
  assert search.terms(text) == expected.split()


# --- Scores ------------------------------------------------------------------

WORDS = ['lamp', 'shirt', 'wool', 'red', 'dim', 'soft', 'cheap', 'mug', 'tea']


def texts(seed, count):
  rng = random.Random(seed)
  return [
    ' '.join(rng.choices(WORDS, k=rng.randrange(12))) for _ in range(count)
  ]


def by_loops(documents, query):
  """(score, place) of all texts that have a word of the query."""
  split = [search.terms(document) for document in documents]
  mean = sum(map(len, split)) / len(split)
  found = []
  for place, words in enumerate(split):
    score = 0.0
    for word in search.terms(query):
      holders = sum(word in other for other in split)
      count = words.count(word)
      if count:
        rarity = math.log(1 + (len(split) - holders + 0.5) / (holders + 0.5))
        length = 1 - 0.4 + 0.4 * len(words) / mean
        score += rarity * count / (count + 0.9 * length)
    if score:
      found.append((-round(score, 4), place))
  return sorted(found)


QUERIES = ['red', 'soft wool shirt', 'tea tea lamp', 'the red unknown', 'dims']


@pytest.fixture(scope='module')
def some():
  return texts(0, 90)


@pytest.fixture(scope='module')
def on_disk(some, tmp_path_factory):
  pytest.importorskip('tantivy')
  return disk_index(tmp_path_factory.mktemp('search') / 'index', some)


def disk_index(directory, documents):
  split = [search.terms(document) for document in documents]
  with search.DiskWriter(directory) as writer:
    for number, words in enumerate(split):
      writer.add(number, words)
  mean = sum(map(len, split)) / len(split)
  return search.DiskIndex(
    directory, lambda numbers: {n: split[n] for n in numbers}, mean
  )


def agrees(found, expected):
  """The same scores in the same order, equal ones at any rounding error."""
  scores = {place: score for score, place in expected}
  assert len(found) == len(set(found)) == min(len(expected), search.TOP)
  best = [scores[place] for place in found]
  for score, (wanted, _) in zip(best, expected, strict=False):
    assert abs(score - wanted) <= 2e-4


@pytest.mark.parametrize('query', QUERIES)
def test_scores_agree_with_loops(some, on_disk, query):
  expected = by_loops(some, query)
  assert len(expected) > 5
  agrees(search.MemoryIndex(some).best(query), expected)
  agrees(on_disk.best(query), expected)


@pytest.mark.parametrize('query', ['', 'the of', 'unknown', '!?'])
def test_query_without_known_terms_finds_nothing(some, on_disk, query):
  assert search.MemoryIndex(some).best(query) == []
  assert on_disk.best(query) == []
  assert search.MemoryIndex(['', 'of']).best('lamp') == []


def test_equal_scores_keep_the_order_of_the_shop(tmp_path):
  pytest.importorskip('tantivy')
  documents = ['mug'] * 3 + ['red mug'] * 70 + ['mug red'] * 10
  found = search.MemoryIndex(documents).best('red mug')
  assert found == [*range(3, 53)]
  assert disk_index(tmp_path / 'index', documents).best('mug red') == found


def test_disk_finds_what_memory_finds_among_long_texts(tmp_path):
  pytest.importorskip('tantivy')
  rng = random.Random(4)
  words = [f'w{i}' for i in range(30)]
  documents = [
    ' '.join(rng.choices(words, k=int(rng.lognormvariate(3, 1)) + 1))
    for _ in range(1500)
  ]
  disk = disk_index(tmp_path / 'index', documents)
  memory = search.MemoryIndex(documents)
  queries = [' '.join(rng.sample(words, 3)) for _ in range(20)]
  pairs = [(disk.best(query), memory.best(query)) for query in queries]
  shared = sum(len(set(a) & set(b)) for a, b in pairs)
  assert shared / (search.TOP * 20) > 0.99
