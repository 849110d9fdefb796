"""The vocabulary: a tokenizer directory, and the exact bytes of every id.

Two kinds of vocabularies say exactly which bytes an id stands for. Which one
a tokenizer has is read from its own description of how it decodes:

1. Byte-level (Qwen, Llama 3): every character of a token is one byte, in an
   alphabet of 256 printable characters.
2. Byte fallback (Llama 2, Mistral, Gemma): a token is its own text, U+2581
   stands for a space, and `<0x00>` to `<0xFF>` are single bytes.

Every other kind is refused: its ids cannot be told apart in the text.
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
_BYTES = [f'<0x{byte:02X}>' for byte in range(256)]
# Steps of a decoder that the tables below account for. `Fuse` only joins;
# `Strip` and `Metaspace` drop one space, of a whole text and not of an id.
_BYTE_LEVEL = {'ByteLevel', 'Fuse'}
_FALLBACK = {'ByteFallback', 'Replace', 'Metaspace', 'Fuse', 'Strip'}
# What may put a dummy space before a text.
_INPUT = ('normalizer', 'pre_tokenizer')


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """What the ids of a tokenizer stand for.

  Attributes:
    pieces: The bytes of each id; b'' for special and for unused ones.
    special: The names of the special ids; they are no part of a text.
    adds_space: Whether encoding puts a dummy space before a text.
  """

  pieces: list[bytes]
  special: dict[int, str]
  adds_space: bool

  def bytes_of(self, index: int) -> bytes:
    """The bytes of one id. Ids past the vocabulary (models pad theirs): b''."""
    return self.pieces[index] if index < len(self.pieces) else b''

  def text(self, ids: Sequence[int]) -> str:
    """Ids as people read them: special ones by name, all bytes in place."""
    data = b''.join(
      self.special[index].encode()
      if index in self.special
      else self.bytes_of(index)
      for index in ids
    )
    return data.decode('utf-8', errors='replace')


# --- A tokenizer directory ---------------------------------------------------


def load_tokenizer(directory: str | pathlib.Path):
  """Loads a Hugging Face tokenizer directory as its files describe it.

  The class that tokenizer_config.json names is not asked: some of them build
  the tokenizer anew from its vocabulary and leave out what else tokenizer.json
  says.

  Args:
    directory: Holds tokenizer.json and tokenizer_config.json; the chat
      template stands there or in chat_template.jinja.

  Returns:
    The transformers tokenizer.

  Raises:
    ValueError: When it cannot be read, is of a kind whose ids stand for no
      exact bytes, or has no chat template.
  """
  import transformers

  if not (pathlib.Path(directory) / 'tokenizer.json').is_file():
    raise ValueError(
      f'The tokenizer in {directory} cannot be read: there is no '
      'tokenizer.json.'
    )
  try:
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(
      str(directory), local_files_only=True
    )
  except Exception as error:  # transformers and tokenizers raise what comes.
    raise ValueError(
      f'The tokenizer in {directory} cannot be read: {error!r}.'
    ) from error
  if not tokenizer.chat_template:
    raise ValueError(
      f'The tokenizer in {directory} has no chat_template; one is needed to '
      'render the turns.'
    )
  try:
    of(tokenizer)
  except ValueError as error:
    raise ValueError(
      f'The tokenizer in {directory} cannot be used: {error}'
    ) from error
  return tokenizer


def reads_alike(directory: str | pathlib.Path) -> bool:
  """Whether AutoTokenizer gives the ids that `load_tokenizer` gives."""
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
  """The vocabulary of a tokenizer, made once.

  Args:
    tokenizer: A transformers tokenizer with a `tokenizers` backend.

  Returns:
    Its vocabulary.

  Raises:
    ValueError: When its ids stand for no exact bytes; names a token.
  """
  # A token that is added, or made special, later changes the table.
  state = len(tokenizer), tuple(tokenizer.all_special_ids)
  if tokenizer not in _known or _known[tokenizer][0] != state:
    _known[tokenizer] = state, _vocabulary(tokenizer)
  return _known[tokenizer][1]


def token_bytes(tokenizer, ids: Sequence[int]) -> list[bytes]:
  """The exact bytes of each id; b'' for special ones and for unused ids.

  Args:
    tokenizer: From `load_tokenizer`.
    ids: Token ids. Ids past the vocabulary (models pad theirs) are unused.

  Returns:
    One bytes object per id. Joined, they are the text; a character may be
    spread over several of them.
  """
  vocabulary = of(tokenizer)
  return [vocabulary.bytes_of(index) for index in ids]


def _vocabulary(tokenizer) -> Vocabulary:
  described = json.loads(tokenizer.backend_tokenizer.to_str())
  added = tokenizer.added_tokens_decoder
  vocab = tokenizer.get_vocab()
  bytes_of = _reader(
    described, vocab, {token.content for token in added.values()}
  )
  special = {index for index, token in added.items() if token.special}
  special |= set(tokenizer.all_special_ids)
  pieces = [b''] * (max(vocab.values(), default=-1) + 1)
  names = {}
  for token, index in vocab.items():
    if index in special:
      names[index] = token
    else:
      pieces[index] = bytes_of(token)
  adds_space = any(described[k] != _without_space(described[k]) for k in _INPUT)
  return Vocabulary(pieces, names, adds_space)


def _reader(
  described: dict[str, Any], vocab: dict[str, int], added: set[str]
) -> Callable[[str], bytes]:
  """What turns a token into its bytes, or a ValueError that names one."""
  model = described['model']
  steps = list(_steps(described['decoder']))
  kinds = {step['type'] for step in steps}
  if 'ByteLevel' in kinds and kinds <= _BYTE_LEVEL and _is_bare_bpe(model):
    _check_level(vocab, added, model['vocab'])
    return functools.partial(_level_bytes, added=added)
  if 'ByteFallback' in kinds and kinds <= _FALLBACK and _spaces(steps):
    for token in _BYTES:
      if token not in vocab or not model.get('byte_fallback'):
        raise ValueError(
          f'its token {token!r} is missing or never used, so its byte fallback '
          'cannot write every text.'
        )
    return _fallback_bytes
  token = min(vocab.keys() - added, key=vocab.get, default='')
  raise ValueError(
    f'its token {token!r} stands for no exact bytes, for it is neither '
    'byte-level BPE nor has it byte fallback.'
  )


def _check_level(
  vocab: dict[str, int], added: set[str], own: dict[str, int]
) -> None:
  """Refuses byte-level tokens without bytes, and added ones with two kinds."""
  alphabet = _byte_of_character().keys()
  bad = [t for t in vocab if t not in added and not set(t) <= alphabet]
  if bad:
    raise ValueError(
      f'its token {min(bad, key=vocab.get)!r} stands for no exact bytes, for '
      'it is not byte-level BPE.'
    )
  for token in added & vocab.keys() & own.keys():
    if set(token) <= alphabet and not token.isascii():
      raise ValueError(
        f'its added token {token!r} stands for no exact bytes: it is also '
        'another token in the byte-level alphabet.'
      )


def _steps(component: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
  """The steps of a normalizer, pre-tokenizer or decoder, nested ones too."""
  if component is None:
    return
  if component['type'] != 'Sequence':
    yield component
    return
  ((_, parts),) = _parts(component)
  for part in parts:
    yield from _steps(part)


def _is_bare_bpe(model: dict[str, Any]) -> bool:
  """Whether tokens carry no marks of words that are no part of the text."""
  marks = ('continuing_subword_prefix', 'end_of_word_suffix')
  return model['type'] == 'BPE' and not any(model.get(m) for m in marks)


def _spaces(steps: list[dict[str, Any]]) -> bool:
  """Whether U+2581 is decoded to a space, and nothing else is replaced."""
  replaced = [
    (step['pattern'].get('String'), step['content'])
    for step in steps
    if step['type'] == 'Replace'
  ]
  has_metaspace = any(step['type'] == 'Metaspace' for step in steps)
  return set(replaced) <= {(_SPACE, ' ')} and bool(replaced or has_metaspace)


@functools.cache
def _byte_of_character() -> dict[str, int]:
  """The byte-level alphabet: printable bytes stand for themselves.

  The 68 others are shifted to U+0100 and up, in order (Radford et al. 2019).
  """
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  table = {chr(byte): byte for byte in printable}
  others = [byte for byte in range(256) if byte not in set(printable)]
  table.update({chr(256 + i): byte for i, byte in enumerate(others)})
  return table


def _level_bytes(token: str, *, added: set[str]) -> bytes:
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


# --- Text that goes on -------------------------------------------------------


def inside_encoder(tokenizer) -> Callable[[str], list[int]]:
  """What encodes a text that goes on after another one.

  SentencePiece puts a dummy space before a text; in the middle of a
  conversation that would be a space that nobody wrote.

  Args:
    tokenizer: From `load_tokenizer`.

  Returns:
    A function from text to ids, without special tokens and dummy space.
  """
  if not of(tokenizer).adds_space:
    return functools.partial(tokenizer.encode, add_special_tokens=False)
  import tokenizers

  described = json.loads(tokenizer.backend_tokenizer.to_str())
  described |= {'truncation': None, 'padding': None}
  described |= {key: _without_space(described[key]) for key in _INPUT}
  backend = tokenizers.Tokenizer.from_str(json.dumps(described))
  return lambda text: backend.encode(text, add_special_tokens=False).ids


def _without_space(component: dict[str, Any] | None) -> dict[str, Any] | None:
  """The same normalizer or pre-tokenizer, without a dummy space."""
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
