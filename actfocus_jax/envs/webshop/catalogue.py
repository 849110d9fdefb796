"""Products: the public WebShop files, read and cleaned.

The stages of one product:

1. Its record is an element of the JSON list in `items_shuffle*.json`. The file
   is streamed (`stream`), so that memory does not grow with its 5 GB.
2. Its notes, attributes and a synthetic instruction, are the member of its ASIN
   in the JSON object of `items_ins_v2*.json`.
3. `product_of` cleans both into a `Product`, or drops a record without a
   usable ASIN.
"""

import codecs
import dataclasses
import hashlib
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

# The name of an option, and its values in the order of the shop.
Options = tuple[tuple[str, tuple[str, ...]], ...]

_LONGEST_ASIN = 10
_PRICE_UNKNOWN = 100.0
_PRICE = re.compile(r'\$\s*(\d[\d,]*(?:\.\d+)?|\.\d+)')
_BLANK = re.compile(r'[ \t\r\n]*')
_DELIMITER = re.compile(r'[ \t\r\n]*[],:}]')
_CHUNK = 1 << 20
_LARGEST_ELEMENT = 1 << 25


@dataclasses.dataclass(frozen=True)
class Product:
  """A product of the shop.

  Attributes:
    options: selectable options in lower case.
    price: the price that a cap is compared with; one in the range if the shop
      gives a range.
    price_text: the price as the shop shows it.
    query: the search that the product was collected with, in lower case.
    categories: categories from the widest to the narrowest.
    attributes: attributes that goals may name; the page does not list them.
    instruction: the beginning of a synthetic goal's text, or empty.
    wanted: the attributes that this instruction names.
  """

  asin: str
  title: str
  description: str = ''
  bullets: tuple[str, ...] = ()
  options: Options = ()
  price: float = _PRICE_UNKNOWN
  price_text: str = '$100.00'
  query: str = ''
  categories: tuple[str, ...] = ()
  attributes: tuple[str, ...] = ()
  rating: str = ''
  instruction: str = ''
  wanted: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Files:
  """The public files of a directory: `items_shuffle*.json` and so on.

  `human` is None if there is none; `is_full` is True for the files of all
  1.18 million products.
  """

  products: pathlib.Path
  notes: pathlib.Path
  human: pathlib.Path | None
  is_full: bool


def find(directory: str, *, human: bool, full: bool = False) -> Files:
  """Find the public files; the 1,000-product set goes before the full one.

  With `full` the full files are taken even if the small ones are there.

  Raises:
    ValueError: no directory, or a file is missing.
  """
  folder = pathlib.Path(directory).expanduser()
  if not folder.is_dir():
    raise ValueError(
      f'data is {directory!r}, which is not a directory; name the one with the '
      "public WebShop files, or '' for the built-in shop"
    )
  small, large = '_1000.json', '.json'
  endings = [large] if full else [small, large]
  ending = next(
    (e for e in endings if (folder / f'items_shuffle{e}').is_file()), None
  )
  if ending is None:
    names = ' and no '.join(f'items_shuffle{e}' for e in endings)
    raise ValueError(f'data is {directory!r}, which holds no {names}')
  notes = folder / f'items_ins_v2{ending}'
  instructions = next(iter(sorted(folder.glob('items_human_ins*.json'))), None)
  missing = [] if notes.is_file() else [notes.name]
  if human and instructions is None:
    missing.append('items_human_ins.json')
  if missing:
    raise ValueError(f'data is {directory!r}, which holds no {missing[0]}')
  return Files(
    folder / f'items_shuffle{ending}', notes, instructions, ending == large
  )


def hashed(*parts: object) -> int:
  """Return a hash of some texts, 64 bits, the same on every platform."""
  text = '\0'.join(map(str, parts))
  data = text.encode('utf-8', errors='surrogatepass')
  return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), 'big')


# --- Cleaning ----------------------------------------------------------------


def product_of(
  record: Mapping[str, Any], notes: Mapping[str, Any]
) -> Product | None:
  """Clean one product; None if its ASIN is missing or too long.

  Args:
    record: an element of `items_shuffle*.json`.
    notes: the notes of its ASIN in `items_ins_v2*.json`, or an empty mapping.
  """
  asin = _clean(record.get('asin'))
  if not 0 < len(asin) <= _LONGEST_ASIN or asin == 'nan':
    return None
  price, price_text = read_price(record.get('pricing'), asin)
  categories = _clean(record.get('product_category')).split('›')
  return Product(
    asin=asin,
    title=_clean(record.get('name')),
    description=_clean(record.get('full_description')),
    bullets=texts_of(record.get('small_description')),
    options=_options(record.get('customization_options')),
    price=price,
    price_text=price_text,
    query=_clean(record.get('query')).lower(),
    categories=tuple(filter(None, map(str.strip, categories))),
    attributes=texts_of(notes.get('attributes')),
    rating=_clean(record.get('average_rating')),
    instruction=_clean(notes.get('instruction')),
    wanted=texts_of(notes.get('instruction_attributes')),
  )


def read_price(pricing: Any, asin: str) -> tuple[float, str]:
  """Return a price, and how the shop shows it.

  Args:
    pricing: e.g. `$9.99`, `$1,299.00` or `$19.99 to $27.99`; a number; or
      nothing, which means 100.
    asin: id of the product; it fixes the price within a range.
  """
  is_number = isinstance(pricing, (int, float))
  texts = [str(pricing)] if is_number else _PRICE.findall(str(pricing or ''))
  prices = (float(text.replace(',', '')) for text in texts)
  found = [price for price in prices if 0 < price < math.inf]
  if not found:
    return _PRICE_UNKNOWN, f'${_PRICE_UNKNOWN:.2f}'
  if len(found) == 1:
    return found[0], f'${found[0]:.2f}'
  low, high = sorted(found[:2])
  share = hashed('price', asin) / 2**64
  return low + (high - low) * share, f'${low:.2f} to ${high:.2f}'


def _clean(text: Any) -> str:
  """Return one line with single blanks, valid in UTF-8; '' for None."""
  line = '' if text is None else ' '.join(str(text).split())
  return line if line.isascii() else line.encode('utf-8', 'replace').decode()


def texts_of(texts: Any) -> tuple[str, ...]:
  """Return the cleaned texts, of one or a list, that are not empty."""
  return tuple(text for text in map(_clean, _list(texts)) if text)


def _list(value: Any) -> Sequence[Any]:
  return value if isinstance(value, (list, tuple)) else [value]


def _options(given: Any) -> Options:
  """Return options in lower case; `/` is ` | `, as in the public shop."""
  options = {}
  for name, values in given.items() if isinstance(given, dict) else ():
    texts = (
      v.get('value') if isinstance(v, dict) else v for v in _list(values)
    )
    kept = [t for t in map(_option_value, texts) if t]
    if kept:
      options[_clean(name).lower()] = tuple(kept)
  return tuple(options.items())


def _option_value(value: Any) -> str:
  if isinstance(value, (dict, list)):  # nothing that could be shown or clicked
    return ''
  # An answer is split on two bars, so none may stand side by side in a name.
  text = _clean(value).replace('/', ' | ').replace('||', '| |')
  return ' '.join(text.lower().split())


# --- Streaming ---------------------------------------------------------------


def read_products(
  files: Files,
  notes_of: Callable[[str], Mapping[str, Any]],
  on_read: Callable[[int], None] = lambda done: None,
) -> Iterator[Product]:
  """Yield the products in the order of the file, cleaned.

  Of several products with one ASIN all come; the first of them counts.
  `notes_of` gives the notes on an ASIN, `on_read` gets the bytes read so far.

  Raises:
    ValueError: the file is broken, or holds something else.
  """
  for record in stream(files.products, '[', on_read):
    if not isinstance(record, dict) or 'asin' not in record:
      raise ValueError(
        f'{files.products} is not a list of products: an element has no "asin"'
      )
    product = product_of(record, notes_of(_clean(record['asin'])))
    if product is not None:
      yield product


def read_notes(
  path: pathlib.Path, on_read: Callable[[int], None] = lambda done: None
) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yield pairs of an ASIN and its attributes and synthetic instructions.

  Raises:
    ValueError: the file is broken, or holds something else.
  """
  for asin, notes in stream(path, '{', on_read):
    if not isinstance(notes, dict):
      raise ValueError(f'{path} holds no notes: {asin!r} is not a JSON object')
    yield _clean(asin), notes


def read_instructions(
  path: pathlib.Path,
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
  """Yield pairs of an ASIN and its human instructions.

  Raises:
    ValueError: the file is broken, or holds something else.
  """
  for asin, many in stream(path, '{'):
    is_list = isinstance(many, list)
    if not is_list or not all(isinstance(one, dict) for one in many):
      raise ValueError(
        f'{path} holds no instructions: {asin!r} is not a list of JSON objects'
      )
    yield _clean(asin), many


def stream(
  path: pathlib.Path,
  opening: str,
  on_read: Callable[[int], None] = lambda done: None,
) -> Iterator[Any]:
  """Read a JSON file one element at a time, with memory for one element.

  Args:
    path: a file.
    opening: `[` for a JSON list, `{` for a JSON object.
    on_read: called with the bytes read so far, now and then.

  Yields:
    The elements of a list; the pairs (key, value) of an object.

  Raises:
    ValueError: the file is not such JSON, or is truncated.
  """
  closing = {'[': ']', '{': '}'}[opening]
  with open(path, 'rb') as file:
    window = _Window(path, file, on_read)
    window.take(opening)
    if window.peek() == closing:
      return
    while True:
      element = window.value()
      if opening == '{':
        window.take(':')
        element = element, window.value()
      yield element
      if window.take(f',{closing}') == closing:
        return


class _Window:
  """The part of a file that is being parsed."""

  def __init__(self, path, file, on_read):
    self._path, self._file, self._on_read = path, file, on_read
    self._decode = codecs.getincrementaldecoder('utf-8')().decode
    self._parse = json.JSONDecoder().raw_decode
    self._text, self._at, self._done, self._ended = '', 0, 0, False

  def peek(self) -> str:
    """Return the next character after white space; empty at the end."""
    while True:
      self._at = _BLANK.match(self._text, self._at).end()
      if self._at < len(self._text):
        return self._text[self._at]
      if self._ended:
        return ''
      self._read()

  def take(self, allowed: str) -> str:
    """Consume the next character, one of those allowed."""
    character = self.peek()
    if not character or character not in allowed:
      raise self._broken()
    self._at += 1
    return character

  def value(self) -> Any:
    """Consume the next value."""
    self.peek()
    while True:
      try:
        value, end = self._parse(self._text, self._at)
      except json.JSONDecodeError:
        pass
      else:
        # `-1.` at the window's edge reads as -1, but more of it may follow.
        if _DELIMITER.match(self._text, end):
          self._at = end
          return value
      if self._ended or len(self._text) - self._at > _LARGEST_ELEMENT:
        raise self._broken()
      self._read()

  def _read(self):
    data = self._file.read(_CHUNK)
    self._ended = not data
    self._done += len(data)
    try:
      more = self._decode(data, final=self._ended)
    except UnicodeDecodeError as error:
      raise self._broken() from error
    self._text, self._at = self._text[self._at :] + more, 0
    self._on_read(self._done)

  def _broken(self) -> ValueError:
    end = ', it ends too early' if self._ended else ''
    return ValueError(
      f'{self._path} is not the JSON that belongs there{end} (read as far as '
      f'byte {self._done}); download it again'
    )
