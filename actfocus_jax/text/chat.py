"""Bridge between text and tokens: messages, answer spans, increments.

The state of the environment becomes a user message (`turn_message`). `Chat`
renders only what is new since the last sampled token, with the tokenizer's own
chat template, and ends it with the forced text `<think>`. The policy then
samples ids until a stop id. `Chat.read` turns these ids into bytes
(vocabulary.py), finds the answer in the bytes and marks the ids that hold a
byte of it (`action_mask`). Sampled ids are never encoded again.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from actfocus_jax.text import template, vocabulary

# Public names of this module.
load_tokenizer = vocabulary.load_tokenizer

_ANSWER = re.compile(r'</think>\s*<answer>(.*?)</answer>', re.DOTALL)
_TAGS = re.compile(r'</?(?:think|answer)>')


def system_message(instructions: str, *, budget: int, max_actions: int) -> str:
  """Return the system message: the rules, and the limits of an episode."""
  several = ', separated by ||' if max_actions > 1 else ''
  return (
    f'{instructions.strip()}\nYou have {budget} actions, '
    f'at most {max_actions} in a turn{several}.'
  )


def turn_message(
  state: str,
  *,
  turn: int,
  reward: float | None,
  actions_left: int,
  response_tokens: int,
) -> str:
  """Return the user message of turn `turn`, counted from 1.

  `reward` is that of the last turn without penalties; None on turn 1.
  """
  head = '' if reward is None else f'Reward: {reward:g}\n'
  return (
    f'{head}Turn {turn}:\nState:\n{state}\nActions left: {actions_left}\n'
    'Answer as <think> [thoughts] </think> <answer> [actions] </answer> '
    f'in at most {response_tokens} tokens.'
  )


def _answer_span(text: str) -> tuple[int, int] | None:
  """Return the character range strictly between the tags of the answer."""
  match = _ANSWER.search(text)
  return None if match is None else match.span(1)


def parse_answer(text: str) -> list[str] | None:
  """Return the actions of a response that starts inside its thought.

  The thought ends at the first `</think>` that is followed by optional white
  space and `<answer>`; the answer ends at the next `</answer>`. The answer is
  split on `||`; stray tags are removed from the pieces, which are stripped, and
  empty ones are dropped. A blank answer gives [], a malformed response None.
  """
  span = _answer_span(text)
  if span is None:
    return None
  pieces = (_TAGS.sub('', p).strip() for p in text[slice(*span)].split('||'))
  return [piece for piece in pieces if piece]


def token_bytes(tokenizer, ids: Sequence[int]) -> list[bytes]:
  """Return the exact bytes of each id; b'' for special and for unused ids.

  A character may be spread over several ids; joined, the bytes are the text.
  """
  bytes_of = vocabulary.of(tokenizer).bytes_of
  return [bytes_of(index) for index in ids]


def action_mask(pieces: Sequence[bytes]) -> list[bool]:
  """Mark the tokens of a response that hold a byte of its executed answer.

  Source: arXiv 2605.14558, section on token weights; the action span is the
  content strictly between `<answer>` and `</answer>`. The mask is False
  everywhere for a malformed or blank answer. A special token is b''.
  """
  text = _decode(b''.join(pieces))
  span = _answer_span(text)
  if span is None or not text[slice(*span)].strip():
    return [False] * len(pieces)
  start, stop = (len(_encode(text[:index])) for index in span)
  ends = np.cumsum([len(piece) for piece in pieces], dtype=int)
  begins = ends - [len(piece) for piece in pieces]
  inside = np.minimum(ends, stop) > np.maximum(begins, start)
  return [bool(flag) for flag in inside]


def _decode(data: bytes) -> str:
  """Decode bytes so that every invalid byte stays one character."""
  return data.decode('utf-8', errors='surrogateescape')


def _encode(text: str) -> bytes:
  return text.encode('utf-8', errors='surrogateescape')


@dataclasses.dataclass(frozen=True)
class Response:
  """A parsed response.

  Attributes:
    text: decoded text, for people and the environment. Bytes that are not UTF-8
      are U+FFFD here and in `answer`; the spans are those of the bytes.
    answer: the actions, or None for a malformed response.
    action: per token, whether it is part of the executed answer.
  """

  text: str
  answer: list[str] | None
  action: list[bool]


class Chat:
  """Renders a conversation as increments of ids, by the tokenizer's template.

  Every response stays as sampled in both renderings:

  - 'template': the increments joined are the template applied to the whole
    conversation, thoughts included. A template that rewrites earlier turns,
    for example drops earlier thoughts, is refused with the reason. White space
    at the end of a response stays even if the template would trim it.
  - 'plain': the increments are what the template writes around messages of
    plain text. Earlier thoughts stay. If the template takes no system message,
    that text precedes the first user message, with a blank line between. White
    space before the token that closes a turn is left out.

  Attributes:
    tokenizer: the transformers tokenizer.
    stop_ids: ids that end a response: those of tokenizer, template and model.
    pad_id: id for padding; never read as text.
  """

  def __init__(
    self,
    tokenizer,
    *,
    stop_ids: Sequence[int] = (),
    rendering: str = 'template',
  ):
    """Check the tokenizer and its template.

    `stop_ids` come from a model's generation_config and end a response too.

    Raises:
      ValueError: if the template cannot be rendered as increments, the
        tokenizer loses text, or it has no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
      raise ValueError('The tokenizer has no eos_token to end a response.')
    self.tokenizer = tokenizer
    self._vocabulary = vocabulary.of(tokenizer)
    self._encode_inside = vocabulary.inside_encoder(tokenizer)
    self._texts = template.Increments(tokenizer, rendering=rendering)
    self._check_responses()
    self._close_id = self._closing_id()
    self._check_encoding()
    self.stop_ids = tuple(
      sorted({tokenizer.eos_token_id, self._close_id, *stop_ids})
    )
    pad = tokenizer.pad_token_id
    self.pad_id = tokenizer.eos_token_id if pad is None else pad

  def opening(self, system: str, user: str) -> tuple[list[int], int]:
    """Return the ids of system message, first user message and `<think>`.

    Also the number of ids of the system message: 0 if one belongs to both.
    """
    system, user = self._harmless(system), self._harmless(user)
    ids = self._ids(self._texts.opening(system, user))
    head = self._ids(self._texts.system_part(system))
    return ids, len(head) if ids[: len(head)] == head else 0

  def continuation(self, user: str, *, last_id: int) -> list[int]:
    """Return the ids between a response and the next one, `<think>` included.

    A response that was cut, or that ended with another stop id than the closing
    one, gets the closing id here, as a forced token.
    """
    ids = self._ids(self._texts.between(self._harmless(user)))
    return ids[1:] if last_id == self._close_id else ids

  def read(self, ids: Sequence[int]) -> Response:
    """Parse sampled ids into text, actions and the mask of action tokens."""
    pieces = token_bytes(self.tokenizer, ids)
    data = b''.join(pieces)
    answer = parse_answer(_decode(data))
    if answer is not None:
      answer = [_readable(_encode(action)) for action in answer]
    return Response(_readable(data), answer, action_mask(pieces))

  def respond(self, thought: str, actions: Sequence[str]) -> list[int]:
    """Return the ids of a demonstrated response, closing id included."""
    answer = ' || '.join(actions)
    text = f'{thought}</think><answer>{answer}</answer>'
    return [*self._encode_inside(text), self._close_id]

  def text(self, ids: Sequence[int]) -> str:
    """Return ids as readable text, special tokens shown."""
    return self._vocabulary.text(ids)

  def _harmless(self, text: str) -> str:
    """Return a message in which names of special tokens are plain text.

    A web page must not end a turn: a space behind the first character turns
    `<|im_end|>` into `< |im_end|>`.
    """
    for name in self._vocabulary.special.values():
      if len(name) > 1:
        text = text.replace(name, f'{name[:1]} {name[1:]}')
    return text

  def _ids(self, text: str) -> list[int]:
    # The template itself writes the bos token, if there is one.
    return self.tokenizer.encode(text, add_special_tokens=False)

  # --- The start-up checks ---------------------------------------------------

  def _check_responses(self):
    """Refuse a tokenizer that loses text or reads tags as special tokens."""
    text = 'a  b\n√ </think><answer>Up || Left</answer>'
    ids = self._encode_inside(text)
    data = b''.join(map(self._vocabulary.bytes_of, ids))
    if data != text.encode():
      raise ValueError(
        f'This tokenizer reads back {text!r} as {_readable(data)!r}, so '
        'thoughts and answers cannot be separated.'
      )

  def _closing_id(self) -> int:
    """Return the special token that the template writes after a response."""
    text = self._texts.between('two')
    special = self._vocabulary.special
    first = self._ids(text)[0]
    if first in special:
      return first
    # The plain rendering has no such space.
    if text[:1].isspace() and self._ids(text.lstrip())[0] in special:
      raise ValueError(
        'This chat template writes white space between a response and the '
        'token that closes its turn, but a sampled response has none, so the '
        f'turns cannot be joined{template.WAY_OUT}.'
      )
    raise ValueError(
      f'This chat template closes a turn with plain text ({text[:20]!r}), not '
      'with a special token, so nothing marks the end of a response.'
    )

  def _check_encoding(self):
    """Refuse a tokenizer whose increments differ from the whole, encoded."""
    between = self._texts.between('two')
    before = self._texts.opening('rules', 'one') + 'so</think>'
    whole, ids = self._ids(before + between), self._ids(between)
    if whole[-len(ids) :] != ids:
      raise ValueError(
        'This tokenizer encodes the beginning of a turn differently when an '
        'earlier turn stands before it, so a conversation cannot be encoded '
        'turn by turn.'
      )


def _readable(data: bytes) -> str:
  """Decode bytes as text that any file can hold."""
  return data.decode('utf-8', errors='replace')
