"""Vocabulary: load a tokenizer directory, and the exact bytes of every id.

The decoder in tokenizer.json determines which of two kinds a tokenizer is:

- Byte-level (Qwen, Llama 3): every character of a token is one byte, in an
  alphabet of 256 printable characters.
- Byte fallback (Llama 2, Mistral, Gemma): a token is its own text, U+2581
  stands for a space, and `<0x00>` to `<0xFF>` are single bytes.

Any other kind is refused, because its ids do not stand for exact bytes.
"""

import dataclasses
import functools
import json
import pathlib
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

_SPACE = '\u2581'
_BYTE = re.compile(r'<0x([0-9A-Fa-f]{2})>')
# Decoder steps of either kind. `Fuse` only joins; `Strip` and `Metaspace` drop
# one space of a whole text, not of an id.
_BYTE_LEVEL = {'ByteLevel', 'Fuse'}
_FALLBACK = {'ByteFallback', 'Replace', 'Metaspace', 'Fuse', 'Strip'}
# The components that may put a dummy space before a text.
_INPUT = ('normalizer', 'pre_tokenizer')


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """Bytes and names of the ids of a tokenizer.

  Attributes:
    pieces: bytes of each id; b'' for special and unused ids.
    special: names of the special ids, which are not part of a text.
    adds_space: true if encoding puts a dummy space before a text.
  """

  pieces: list[bytes]
  special: dict[int, str]
  adds_space: bool

  def bytes_of(self, index: int) -> bytes:
    """Return the bytes of an id; b'' for ids past the vocabulary."""
    return self.pieces[index] if index < len(self.pieces) else b''

  def text(self, ids: Sequence[int]) -> str:
    """Return ids as readable text: special ids by name, all bytes in place."""
    data = b''.join(
      self.special[index].encode()
      if index in self.special
      else self.bytes_of(index)
      for index in ids
    )
    return data.decode('utf-8', errors='replace')


# --- A tokenizer directory ---------------------------------------------------


def load_tokenizer(directory: str | pathlib.Path):
  """Load a Hugging Face tokenizer directory as its tokenizer.json describes it.

  The class named in tokenizer_config.json is ignored: some classes rebuild the
  tokenizer from its vocabulary alone and drop the rest of tokenizer.json.

  Raises:
    ValueError: if it cannot be read, has no chat template, or its ids do not
      stand for exact bytes.
  """
  import transformers

  problem = f'The tokenizer in {directory} cannot be'
  if not (pathlib.Path(directory) / 'tokenizer.json').is_file():
    raise ValueError(f'{problem} read: there is no tokenizer.json.')
  try:
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(
      str(directory), local_files_only=True
    )
  except Exception as error:  # transformers and tokenizers may raise anything.
    raise ValueError(f'{problem} read: {error!r}.') from error
  if not tokenizer.chat_template:
    raise ValueError(
      f'The tokenizer in {directory} has no chat_template; one is needed to '
      'render the turns.'
    )
  try:
    of(tokenizer)
  except ValueError as error:
    raise ValueError(f'{problem} used: {error}') from error
  return tokenizer


def matches_auto_tokenizer(directory: str | pathlib.Path) -> bool:
  """Return whether AutoTokenizer gives the ids that `load_tokenizer` gives."""
  import transformers

  text = 'Up || Left</answer>\n[INST] 3 x 12,5 \u00e9t\u00e9  <s>a'
  ours = load_tokenizer(directory)
  theirs = transformers.AutoTokenizer.from_pretrained(
    str(directory), local_files_only=True
  )
  return ours.encode(text) == theirs.encode(text)


# --- Bytes of ids ------------------------------------------------------------

_known: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def of(tokenizer) -> Vocabulary:
  """Return the vocabulary of a transformers tokenizer, cached.

  Raises:
    ValueError: if its ids do not stand for exact bytes; names a token.
  """
  # A token that is added, or made special, later changes the vocabulary.
  state = len(tokenizer), tuple(tokenizer.all_special_ids)
  if tokenizer not in _known or _known[tokenizer][0] != state:
    _known[tokenizer] = state, _vocabulary(tokenizer)
  return _known[tokenizer][1]


def _vocabulary(tokenizer) -> Vocabulary:
  description = json.loads(tokenizer.backend_tokenizer.to_str())
  added = tokenizer.added_tokens_decoder
  vocab = tokenizer.get_vocab()
  bytes_of = _byte_reader(
    description, vocab, {t.content for t in added.values()}
  )
  special = {index for index, token in added.items() if token.special}
  special |= set(tokenizer.all_special_ids)
  pieces = [b''] * (max(vocab.values(), default=-1) + 1)
  for token, index in vocab.items():
    if index not in special:
      pieces[index] = bytes_of(token)
  return Vocabulary(
    pieces,
    {index: token for token, index in vocab.items() if index in special},
    any(description[k] != _without_space(description[k]) for k in _INPUT),
  )


def _byte_reader(
  description: dict[str, Any], vocab: dict[str, int], added: set[str]
) -> Callable[[str], bytes]:
  """Return the function from a token to its bytes, or raise ValueError."""
  model = description['model']
  steps = list(_steps(description['decoder']))
  kinds = {step['type'] for step in steps}
  if 'ByteLevel' in kinds and kinds <= _BYTE_LEVEL and _is_bare_bpe(model):
    _check_byte_level(vocab, added, model['vocab'])
    return functools.partial(_byte_level_bytes, added=added)
  if 'ByteFallback' in kinds and kinds <= _FALLBACK and _is_space_mark(steps):
    for token in (f'<0x{byte:02X}>' for byte in range(256)):
      if token not in vocab or not model.get('byte_fallback'):
        raise ValueError(
          f'its token {token!r} is missing or never used, so its byte fallback '
          'cannot write every text.'
        )
    return _fallback_bytes
  token = min(vocab.keys() - added, key=vocab.get, default='')
  raise ValueError(
    f'its token {token!r} stands for no exact bytes, because it is neither '
    'byte-level BPE nor has it byte fallback.'
  )


def _check_byte_level(
  vocab: dict[str, int], added: set[str], learned: dict[str, int]
) -> None:
  """Raise ValueError for a token without bytes, or with two meanings."""
  alphabet = _byte_of_character().keys()
  for token in sorted(vocab, key=vocab.get):
    if token not in added and not set(token) <= alphabet:
      raise ValueError(
        f'its token {token!r} stands for no exact bytes, because it is not '
        'byte-level BPE.'
      )
    is_both = token in added and token in learned and set(token) <= alphabet
    if is_both and not token.isascii():
      raise ValueError(
        f'its added token {token!r} stands for no exact bytes, because it is '
        'also another token in the byte-level alphabet.'
      )


def _steps(component: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
  """Yield the steps of a decoder, those of nested sequences too."""
  if component is None:
    return
  if component['type'] != 'Sequence':
    yield component
    return
  ((_, parts),) = _parts(component)
  for part in parts:
    yield from _steps(part)


def _is_bare_bpe(model: dict[str, Any]) -> bool:
  """Return whether tokens carry no word marks that are not part of the text."""
  marks = ('continuing_subword_prefix', 'end_of_word_suffix')
  return model['type'] == 'BPE' and not any(model.get(m) for m in marks)


def _is_space_mark(steps: list[dict[str, Any]]) -> bool:
  """Return whether U+2581 becomes a space and nothing else is replaced."""
  replaced = [
    (step['pattern'].get('String'), step['content'])
    for step in steps
    if step['type'] == 'Replace'
  ]
  has_metaspace = any(step['type'] == 'Metaspace' for step in steps)
  return set(replaced) <= {(_SPACE, ' ')} and bool(replaced or has_metaspace)


@functools.cache
def _byte_of_character() -> dict[str, int]:
  """Return the byte-level alphabet: printable bytes stand for themselves.

  The 68 others are shifted to U+0100 and up, in order (Radford et al. 2019).
  """
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  table = {chr(byte): byte for byte in printable}
  others = [byte for byte in range(256) if byte not in set(printable)]
  table.update({chr(256 + i): byte for i, byte in enumerate(others)})
  return table


def _byte_level_bytes(token: str, *, added: set[str]) -> bytes:
  # An added token is matched in the text itself, so it is its own content.
  if token in added:
    return token.encode()
  table = _byte_of_character()
  return bytes(table[character] for character in token)


def _fallback_bytes(token: str) -> bytes:
  byte = _BYTE.fullmatch(token)
  if byte:
    return bytes([int(byte[1], 16)])
  return token.replace(_SPACE, ' ').encode()


# --- Text in the middle of a conversation ------------------------------------


def inside_encoder(tokenizer) -> Callable[[str], list[int]]:
  """Return the function from text to ids for text that follows other text.

  SentencePiece puts a dummy space before a text; in the middle of a
  conversation that would be an extra space. The ids have neither that space
  nor special tokens.
  """
  if not of(tokenizer).adds_space:
    return functools.partial(tokenizer.encode, add_special_tokens=False)
  import tokenizers

  description = json.loads(tokenizer.backend_tokenizer.to_str())
  description |= {'truncation': None, 'padding': None}
  description |= {key: _without_space(description[key]) for key in _INPUT}
  backend = tokenizers.Tokenizer.from_str(json.dumps(description))
  return lambda text: backend.encode(text, add_special_tokens=False).ids


def _without_space(component: dict[str, Any] | None) -> dict[str, Any] | None:
  """Return a normalizer or pre-tokenizer that adds no dummy space."""
  if component is None or component['type'] == 'Prepend':
    return None
  if component['type'] == 'Metaspace':
    return component | {'prepend_scheme': 'never'}
  if component['type'] == 'ByteLevel':
    return component | {'add_prefix_space': False}
  if component['type'] != 'Sequence':
    return component
  ((name, parts),) = _parts(component)
  kept = [_without_space(part) for part in parts]
  return component | {name: [part for part in kept if part is not None]}


def _parts(sequence: dict[str, Any]) -> list[tuple[str, list]]:
  return [item for item in sequence.items() if isinstance(item[1], list)]
