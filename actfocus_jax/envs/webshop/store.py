"""A shop on disk: built once from the full public files, reopened in seconds.

The stages of one build:

1. The notes, one object of 1.18 million members, are streamed into a table
   that is thrown away at the end.
2. The products are streamed. Each is cleaned; it goes into a table, and its
   terms go there and into the search index.
3. Counts of goals and a description are written, and the directory gets its
   name. Until then it has another one, so an interrupted build leaves no shop.
   A killed process leaves a directory that ends in `.part`, which the next
   build deletes.

One process builds at a time, the others wait for its shop.
"""

import contextlib
import dataclasses
import fcntl
import functools
import glob
import json
import os
import pathlib
import shutil
import sqlite3
import sys
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

import numpy as np

from actfocus_jax.envs.webshop import catalogue, goals, search

# Called with the name of a stage and the share of it that is done.
Progress = Callable[[str, float], None]

_FORMAT = 1
_ABOUT, _DATABASE, _SEARCH = 'about.json', 'shop.sqlite', 'search'
_COUNTS, _NOTES = 'goals.npy', 'notes.sqlite'
_TABLES = (
  'CREATE TABLE products '
  '(number INTEGER PRIMARY KEY, asin TEXT UNIQUE, product BLOB, words BLOB)',
  'CREATE TABLE human (number INTEGER PRIMARY KEY, asin TEXT, text BLOB)',
)


# --- Building ----------------------------------------------------------------


def build(files: catalogue.Files, directory: pathlib.Path, progress: Progress):
  """Build a shop, or wait for another process that is building it.

  Args:
    files: the public files.
    directory: directory of the shop; does not exist yet.
    progress: called with the progress.

  Raises:
    ValueError: a file is broken, or the place is taken or not writable.
  """
  search.require('tantivy')
  with _locked(directory, progress):
    if is_built(directory):
      return
    if directory.exists():
      raise ValueError(
        f'index is {str(directory)!r}, which is not an index of this version; '
        'delete it or name a new directory'
      )
    # Delete the remains of builds whose processes were killed.
    name = glob.escape(f'{directory.name}.') + '[a-z0-9_]' * 8 + '.part'
    for part in directory.parent.glob(name):
      shutil.rmtree(part, ignore_errors=True)
    with _making(directory):
      name = tempfile.mkdtemp('.part', f'{directory.name}.', directory.parent)
      os.chmod(name, 0o755)
    part = pathlib.Path(name)
    try:
      _write(files, part, progress)
      os.rename(part, directory)
    except BaseException as error:
      shutil.rmtree(part, ignore_errors=True)
      # A shop that another process put there makes the rename fail.
      if not (isinstance(error, OSError) and is_built(directory)):
        raise


def is_built(directory: pathlib.Path) -> bool:
  """Return whether a directory holds a complete shop."""
  try:
    return _about(directory)['format'] == _FORMAT
  except (OSError, ValueError, KeyError, TypeError):
    return False


def check_source(directory: pathlib.Path, data: pathlib.Path):
  """Raise ValueError if the public files are not those of the build."""
  for name, size in _about(directory)['source'].items():
    path = data / name
    if path.exists() and path.stat().st_size != size:
      raise ValueError(
        f'index is {str(directory)!r}, which was made of another {path}; '
        'delete it or name a new directory'
      )


class Bar:
  """Progress bar on stderr, redrawn at every percent."""

  def __init__(self):
    """Draw nothing yet."""
    self._drawn = None

  def __call__(self, what: str, share: float):
    """Draw the bar if it has grown; on a terminal overwrite the last one."""
    is_terminal = sys.stderr.isatty()
    step = int(100 * share) if is_terminal else int(10 * share) * 10
    if (what, step) == self._drawn:
      return
    self._drawn = (what, step)
    start, end = ('\r', '\n' * (step >= 100)) if is_terminal else ('', '\n')
    line = f'{start}{what} [{"#" * (step // 5):<20}] {step} %'
    print(line, end=end, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _locked(directory: pathlib.Path, progress: Progress) -> Iterator[None]:
  """Make other builds of a directory wait; the lock ends with its process."""
  path = directory.with_name(f'.{directory.name}.lock')
  with _making(directory):
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _lock(path, progress)
  with file:
    try:
      yield
    finally:
      path.unlink(missing_ok=True)


def _lock(path: pathlib.Path, progress: Progress) -> IO[str]:
  while True:
    file = path.open('w')
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      progress('Waiting for another build', 0.0)
      fcntl.flock(file, fcntl.LOCK_EX)
    # The last owner has deleted the file; a lock on it has no effect.
    with contextlib.suppress(FileNotFoundError):
      if os.path.samestat(path.stat(), os.fstat(file.fileno())):
        return file
    file.close()


@contextlib.contextmanager
def _making(directory: pathlib.Path) -> Iterator[None]:
  """Turn an error of the file system into a refusal of the field."""
  try:
    yield
  except OSError as error:
    raise ValueError(
      f'index is {str(directory)!r}, which cannot be made: {error}'
    ) from error


def _write(files: catalogue.Files, part: pathlib.Path, progress: Progress):
  with _opened(part / _NOTES) as notes:
    on_read = _share(files.notes, 'Reading notes', progress)
    pairs = catalogue.read_notes(files.notes, on_read)
    notes.execute('CREATE TABLE notes (asin TEXT PRIMARY KEY, text BLOB)')
    notes.executemany(
      'INSERT OR REPLACE INTO notes VALUES (?, ?)',
      ((asin, _pack(note)) for asin, note in pairs),
    )
    notes_of = functools.partial(_notes_of, notes)
    on_read = _share(files.products, 'Indexing products', progress)
    products = catalogue.read_products(files, notes_of, on_read)
    instructions = {}
    if files.human is not None:
      instructions = dict(catalogue.read_instructions(files.human))
    counts, mean_length = _write_products(part, products, instructions)
  (part / _NOTES).unlink()
  np.save(part / _COUNTS, np.array(counts, np.int64))
  sources = (files.products, files.notes)
  about = {
    'format': _FORMAT,
    'products': len(counts),
    'mean_length': mean_length,
    'source': {path.name: path.stat().st_size for path in sources},
  }
  (part / _ABOUT).write_text(json.dumps(about))


def _share(path: pathlib.Path, what: str, progress: Progress):
  size = max(1, path.stat().st_size)
  return lambda done: progress(what, done / size)


def _write_products(
  part: pathlib.Path, products, instructions
) -> tuple[list[int], float]:
  """Fill table and index; return goal counts and the mean count of terms."""
  counts, length = [], 0
  with (
    _opened(part / _DATABASE) as database,
    search.DiskWriter(part / _SEARCH) as index,
  ):
    for statement in _TABLES:
      database.execute(statement)
    for product in products:
      words = search.terms(search.text_of(product))
      if not _insert(database, len(counts), product, words):
        continue
      index.add(len(counts), words)
      for instruction in instructions.get(product.asin, ()):
        if goals.human(product, instruction) is not None:
          row = (product.asin, _pack(instruction))
          database.execute('INSERT INTO human (asin, text) VALUES (?, ?)', row)
      counts.append(goals.synthetic_count(product))
      length += len(words)
    database.commit()
  return counts, length / max(1, len(counts))


def _insert(database, number: int, product, words: list[str]) -> bool:
  """Add a product; return False if its ASIN is there already."""
  fields = dataclasses.fields(product)
  values = [getattr(product, field.name) for field in fields]
  texts = (_pack(values), _pack(' '.join(words)))
  row = (number, product.asin, *texts)
  statement = 'INSERT OR IGNORE INTO products VALUES (?, ?, ?, ?)'
  return database.execute(statement, row).rowcount > 0


def _notes_of(database, asin: str) -> dict[str, Any]:
  row = database.execute(
    'SELECT text FROM notes WHERE asin = ?', (asin,)
  ).fetchone()
  return _unpack(row[0]) if row else {}


# --- Reading -----------------------------------------------------------------


class DiskShop:
  """A shop that `build` made, with the methods of `shops.MemoryShop`."""

  def __init__(self, directory: pathlib.Path, *, human: bool):
    """Open a shop in a directory that `build` made.

    Raises:
      ValueError: it holds no human instructions, but `human` is true.
    """
    self._own = _Connection(directory / _DATABASE)
    self._is_human = human
    self._numbering = goals.Numbering(np.load(directory / _COUNTS))
    self.goal_count = self._numbering.count
    if human:
      self.goal_count = self._one('SELECT COUNT(*) FROM human')[0]
      if not self.goal_count:
        raise ValueError(
          f'index is {str(directory)!r}, which was built without '
          "items_human_ins.json, but goals is 'human'"
        )
    self._index = search.DiskIndex(
      directory / _SEARCH, self._words_of, _about(directory)['mean_length']
    )
    self.find = functools.lru_cache(maxsize=1 << 14)(self._find)
    self.product = functools.lru_cache(maxsize=1 << 14)(self._product)

  def goal(self, number: int) -> goals.Goal:
    """Return the goal with a number below `goal_count`."""
    if self._is_human:
      asin, text = self._one(
        'SELECT asin, text FROM human WHERE number = ?', number + 1
      )
      return goals.human(self.product(asin), _unpack(text))
    place, own = self._numbering.place(number)
    row = self._one('SELECT asin FROM products WHERE number = ?', place)
    return goals.synthetic(self.product(row[0]), own)

  def _product(self, asin: str) -> catalogue.Product | None:
    row = self._one('SELECT product FROM products WHERE asin = ?', asin)
    return catalogue.Product(*map(_frozen, _unpack(row[0]))) if row else None

  def _find(self, query: str) -> tuple[str, ...]:
    numbers = self._index.best(query)
    asins = dict(self._many('number, asin', numbers))
    return tuple(asins[number] for number in numbers)

  def _words_of(self, numbers: Sequence[int]) -> dict[int, list[str]]:
    rows = self._many('number, words', numbers)
    return {number: _unpack(words).split(' ') for number, words in rows}

  def _one(self, statement: str, *values: Any) -> tuple | None:
    return self._own.database.execute(statement, values).fetchone()

  def _many(self, columns: str, numbers: Sequence[int]) -> list[tuple]:
    marks = ','.join('?' * len(numbers))
    statement = f'SELECT {columns} FROM products WHERE number IN ({marks})'
    return self._own.database.execute(statement, numbers).fetchall()


class _Connection(threading.local):
  """A connection per thread: two that share one would get wrong rows.

  Python calls `__init__` in every thread, for a `database` of its own.
  """

  def __init__(self, path: pathlib.Path):
    uri = f'{path.as_uri()}?mode=ro&immutable=1'
    self.database = sqlite3.connect(uri, uri=True)


# --- Bytes -------------------------------------------------------------------


def _about(directory: pathlib.Path) -> dict[str, Any]:
  return json.loads((directory / _ABOUT).read_text())


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[sqlite3.Connection]:
  database = sqlite3.connect(path)
  # A build that breaks off is thrown away, so nothing must be rolled back.
  database.execute('PRAGMA journal_mode = OFF')
  database.execute('PRAGMA synchronous = OFF')
  with contextlib.closing(database):
    yield database


def _pack(value: Any) -> bytes:
  return zlib.compress(json.dumps(value).encode(), 1)


def _unpack(data: bytes) -> Any:
  return json.loads(zlib.decompress(data))


def _frozen(value: Any) -> Any:
  """Return lists, as JSON has them, as tuples."""
  is_list = isinstance(value, list)
  return tuple(map(_frozen, value)) if is_list else value
