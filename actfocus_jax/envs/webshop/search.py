"""Search: BM25 over stems, in memory by bm25s, on disk by tantivy.

One query:

1. Its text becomes terms (`terms`): words in lower case, without stop words,
   as Porter stems. Products are indexed by the same terms.
2. In memory every product gets its BM25 score. On disk tantivy, whose k1 and b
   are fixed, proposes candidates, and those are scored here.
3. The best are returned, at most 50; equal ones in the order of the shop.
"""

import collections
import functools
import heapq
import importlib.util
import logging
import math
import pathlib
import re
import sys
import threading
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from actfocus_jax.envs.webshop import catalogue

K1, B = 0.9, 0.4
TOP = 50
# See `DiskIndex`. Of 200,000 products these hold all of the best 10 and 49.9 of
# the best 50 (90 queries); 100 hold 44.8, 500 all.
CANDIDATES = 300
_MOST_TERMS = 64
_IMPORTING = threading.Lock()
# Finer differences are rounding, and would depend on the order of the words.
_DECIMALS = 4

_TERM = re.compile(r"\d+(?:[.,]\d+)+|[^\W_]+(?:['’][^\W_]+)*")
# The 33 of Lucene's English analyzer.
_STOP_WORDS = """\
a an and are as at be but by for if in into is it no not of on or such that the
their then there these they this to was will with
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())


def require(*names: str):
  """Raise ValueError if a library that the shop needs is not installed."""
  packages = {'Stemmer': 'PyStemmer'}
  for name in names:
    if importlib.util.find_spec(name) is None:
      package = packages.get(name, name)
      raise ValueError(f'WebShop needs {package}: pip install {package}')


def text_of(product: catalogue.Product) -> str:
  """Return the searchable text: title, description, first bullet, options."""
  options = (f'{name}: {", ".join(values)}' for name, values in product.options)
  parts = (product.title, product.description, *product.bullets[:1], *options)
  return ' '.join(parts).lower()


def terms(text: str) -> list[str]:
  """Return the stems of the words of a text, without stop words."""
  return [stem for stem in map(_stem, _TERM.findall(text.lower())) if stem]


@functools.lru_cache(maxsize=1 << 17)
def _stem(word: str) -> str:
  word = word.replace('’', "'").removesuffix("'s")
  return '' if word in STOP_WORDS else _stemmer().stemWord(word)


@functools.cache
def _stemmer():
  import Stemmer

  return Stemmer.Stemmer('porter')


# --- In memory ---------------------------------------------------------------


class MemoryIndex:
  """Index in memory that scores all texts; for some thousands of them."""

  def __init__(self, texts: Sequence[str]):
    """Index the texts, which are known by their positions."""
    self._ranker = _bm25s().BM25(k1=K1, b=B, method='lucene')
    documents = [terms(text) for text in texts]
    self._is_empty = not any(documents)
    if not self._is_empty:
      self._ranker.index(documents, show_progress=False)

  def best(self, query: str) -> list[int]:
    """Return the positions of texts with a term of the query, best first."""
    words = terms(query)[:_MOST_TERMS]
    if self._is_empty or not words:
      return []
    scores = np.round(self._ranker.get_scores(words), _DECIMALS)
    order = np.argsort(-scores, kind='stable')[:TOP]
    return [int(i) for i in order if scores[i] > 0.0]


def _bm25s():
  """Import bm25s without jax: its import would start jax's devices."""
  with _IMPORTING:  # No thread gets half a library, or jax back too early.
    if 'bm25s' not in sys.modules:
      kept = sys.modules.get('jax')
      sys.modules['jax'] = None  # Importing it fails, as if it were absent.
      try:
        import bm25s  # noqa: F401
      finally:
        del sys.modules['jax']
        if kept is not None:
          sys.modules['jax'] = kept
      # It logs every index by default.
      logging.getLogger('bm25s').setLevel(logging.WARNING)
    return sys.modules['bm25s']


# --- On disk -----------------------------------------------------------------


class DiskWriter:
  """Writer of an index in a directory, a context manager.

  After its end, with an error or without, nothing writes there any more.
  """

  def __init__(self, directory: pathlib.Path):
    """Start an empty index."""
    self._tantivy = _tantivy()
    directory.mkdir()
    schema = (
      self._tantivy.SchemaBuilder()
      .add_unsigned_field('number', fast=True)
      .add_text_field('text', tokenizer_name='whitespace', index_option='freq')
      .build()
    )
    index = self._tantivy.Index(schema, path=str(directory))
    # One thread keeps the texts in order; stems take longer than it does.
    self._writer = index.writer(heap_size=1 << 27, num_threads=1)

  def add(self, number: int, words: Sequence[str]):
    """Add a text by its terms."""
    document = self._tantivy.Document()
    document.add_unsigned('number', number)
    document.add_text('text', ' '.join(words))
    self._writer.add_document(document)

  def __enter__(self):
    return self

  def __exit__(self, kind, *error):
    if kind is None:
      self._writer.commit()
    else:
      self._writer.rollback()
    self._writer.wait_merging_threads()


class DiskIndex:
  """Index on disk that ranks the candidates of tantivy.

  The k1 of tantivy is 1.2 and its b 0.75, which puts long texts lower than K1
  and B do. So it proposes more candidates than needed, and these are scored
  again with the statistics of the whole index.
  """

  def __init__(
    self,
    directory: pathlib.Path,
    words_of: Callable[[Sequence[int]], Mapping[int, list[str]]],
    mean_length: float,
  ):
    """Open an index.

    Args:
      directory: directory that `DiskWriter` filled.
      words_of: numbers of texts -> their terms.
      mean_length: mean count of terms of all texts.
    """
    tantivy = _tantivy()
    index = tantivy.Index.open(str(directory))
    self._query, self._schema = tantivy.Query, index.schema
    self._should = tantivy.Occur.Should
    self._searcher = index.searcher()
    self._words_of, self._mean_length = words_of, mean_length

  def best(self, query: str) -> list[int]:
    """Return the numbers of texts with a term of the query, best first."""
    words = collections.Counter(terms(query)[:_MOST_TERMS])
    if not words:
      return []
    documents = self._words_of(self._candidates(words))
    count = self._searcher.num_docs
    weights = {
      word: n * rarity(self._searcher.doc_freq('text', word), count)
      for word, n in words.items()
    }
    scores = {
      number: round(relevance(weights, words, self._mean_length), _DECIMALS)
      for number, words in documents.items()
    }
    return heapq.nsmallest(TOP, scores, key=lambda n: (-scores[n], n))

  def _candidates(self, words: Mapping[str, int]) -> list[int]:
    clauses = []
    for word, count in words.items():
      term = self._query.term_query(self._schema, 'text', word, 'freq')
      clauses.append((self._should, self._query.boost_query(term, count)))
    query = self._query.boolean_query(clauses)
    hits = self._searcher.search(query, CANDIDATES, count=False).hits
    addresses = [address for _, address in hits]
    return self._searcher.fast_field_values('number', addresses)


def rarity(holders: int, documents: int) -> float:
  """Return the weight of a term that `holders` of the documents hold."""
  return math.log1p((documents - holders + 0.5) / (holders + 0.5))


def relevance(
  weights: Mapping[str, float], words: Sequence[str], mean_length: float
) -> float:
  """Return the BM25 score of one text.

  Args:
    weights: weight of each term of the query, rarity times count.
    words: terms of the text.
    mean_length: mean count of terms of all texts.
  """
  norm = K1 * (1.0 - B + B * len(words) / mean_length)
  counts = ((weight, words.count(word)) for word, weight in weights.items())
  return sum(weight * n / (n + norm) for weight, n in counts)


def _tantivy():
  require('tantivy')
  import tantivy

  return tantivy
