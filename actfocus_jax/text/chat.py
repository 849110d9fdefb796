"""The bridge between text and tokens: messages, answer spans, increments.

The life of one turn, as text and as ids:

1. The environment's state becomes a user message (`turn_message`).
2. The message is rendered by the tokenizer's own chat template as an
   increment: only what is new since the last sampled token (`Chat.opening`,
   `Chat.continuation`; template.py). It ends with the forced text `<think>`.
3. The policy samples ids until a stop id. They are kept as sampled.
4. `Chat.read` turns the ids into bytes (vocabulary.py), finds the answer in
   the bytes, and marks the ids that hold a byte of it (`action_mask`). Nothing
   is ever encoded again.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from actfocus_jax.text import template, vocabulary

# Part of the bridge, which callers know by this module's name.
THINK = template.THINK
load_tokenizer = vocabulary.load_tokenizer
token_bytes = vocabulary.token_bytes

_ANSWER = re.compile(r'</think>\s*<answer>(.*?)</answer>', re.DOTALL)
_TAGS = re.compile(r'</?(?:think|answer)>')


# --- Text of the messages ----------------------------------------------------


def system_message(instructions: str, *, budget: int, max_actions: int) -> str:
  """The one system message of an episode.

  Args:
    instructions: What the environment says of itself, symbols and actions.
    budget: Actions in the whole episode.
    max_actions: Actions per turn.

  Returns:
    The text.
  """
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
  """The user message of one turn.

  Args:
    state: The environment's text.
    turn: Number of the turn, from 1.
    reward: Reward of the last turn without penalties; None on turn 1.
    actions_left: What remains of the episode's budget.
    response_tokens: The length limit that the model is told.

  Returns:
    The text.
  """
  head = '' if reward is None else f'Reward: {reward:g}\n'
  return (
    f'{head}Turn {turn}:\nState:\n{state}\nActions left: {actions_left}\n'
    'Answer as <think> [thoughts] </think> <answer> [actions] </answer> '
    f'in at most {response_tokens} tokens.'
  )


# --- Spans of a response -----------------------------------------------------


def _answer_span(text: str) -> tuple[int, int] | None:
  """Character range strictly between the tags of the executed answer."""
  match = _ANSWER.search(text)
  return None if match is None else match.span(1)


def parse_answer(text: str) -> list[str] | None:
  """The actions of a response that starts inside its thought.

  The thought ends at the first `</think>` that is followed by optional white
  space and `<answer>`; the answer ends at the next `</answer>`. The answer is
  split on `||`; pieces are freed of stray tags and trimmed, empty ones are
  dropped.

  Args:
    text: The decoded response, without the forced `<think>`.

  Returns:
    The actions, [] for an answer of white space only, None when malformed.
  """
  span = _answer_span(text)
  if span is None:
    return None
  pieces = (_TAGS.sub('', p).strip() for p in text[slice(*span)].split('||'))
  return [piece for piece in pieces if piece]


def action_mask(pieces: Sequence[bytes]) -> list[bool]:
  """Marks the tokens of a response that hold a byte of its executed answer.

  Source: arXiv 2605.14558, section on token weights; the action span is the
  content strictly between `<answer>` and `</answer>`.

  Args:
    pieces: The bytes of each sampled token, b'' for special ones.

  Returns:
    One bool per token. All False for a malformed answer and for one of white
    space only.
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
  """Bytes to text such that every invalid byte stays one character."""
  return data.decode('utf-8', errors='surrogateescape')


def _encode(text: str) -> bytes:
  return text.encode('utf-8', errors='surrogateescape')


# --- Rendering ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Response:
  """What a sampled response says.

  Attributes:
    text: Decoded, for people and for the environment.
    answer: The actions, or None when malformed. Bytes that are no UTF-8 are
      U+FFFD here and in `text`; the spans are those of the bytes.
    action: Per token, whether it is part of the executed answer.
  """

  text: str
  answer: list[str] | None
  action: list[bool]


class Chat:
  """Renders a conversation as increments of ids, by the tokenizer's template.

  There are two renderings, and every response stays as sampled in both:

  - 'template': the increments joined are the template applied to the whole
    conversation, thoughts and all. Checked on a small one; a template that
    drops earlier thoughts, say, is refused with the reason. White space at
    the end of a response stays, also where the template would trim it.
  - 'plain': the increments are what the template writes around messages of
    plain text. Earlier thoughts stay, whatever the template does with them;
    where it takes no system message that text stands before the first user
    message, with a blank line between; white space that it writes before the
    token that closes a turn is left out.

  Attributes:
    tokenizer: The transformers tokenizer.
    stop_ids: Ids that end a response.
    pad_id: Id for padding; never read as text.
  """

  def __init__(
    self,
    tokenizer,
    *,
    stop_ids: Sequence[int] = (),
    rendering: str = 'template',
  ):
    """Takes the stop ids from tokenizer and template, and `stop_ids` too.

    Args:
      tokenizer: From `load_tokenizer`.
      stop_ids: More ids that end a response (a model's generation_config).
      rendering: 'template' or 'plain'.

    Raises:
      ValueError: When the template cannot be rendered as increments, the
        tokenizer loses text or names no end of sequence.
    """
    if tokenizer.eos_token_id is None:
      raise ValueError('The tokenizer names no eos_token to end a response.')
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
    """Ids of the system message, the first user message and `<think>`.

    Returns:
      The ids, and how many of them the system message takes: 0 where they
      are not its alone.
    """
    system, user = self._harmless(system), self._harmless(user)
    ids = self._ids(self._texts.opening(system, user))
    head = self._ids(self._texts.system_part(system))
    return ids, len(head) if ids[: len(head)] == head else 0

  def continuation(self, user: str, *, last_id: int) -> list[int]:
    """Ids between a response and the next one.

    Args:
      user: The new user message.
      last_id: The last sampled id. A response that was cut, or that ended
        with another stop id, gets the closing id here, as a forced token.

    Returns:
      Ids that end with the forced `<think>`.
    """
    ids = self._ids(self._texts.between(self._harmless(user)))
    return ids[1:] if last_id == self._close_id else ids

  def read(self, ids: Sequence[int]) -> Response:
    """Reads sampled ids: text, actions, and which ids are action tokens."""
    pieces = [self._vocabulary.bytes_of(index) for index in ids]
    data = b''.join(pieces)
    answer = parse_answer(_decode(data))
    if answer is not None:
      answer = [_readable(_encode(action)) for action in answer]
    return Response(_readable(data), answer, action_mask(pieces))

  def respond(self, thought: str, actions: Sequence[str]) -> list[int]:
    """Ids of a demonstrated response, the closing id included."""
    answer = ' || '.join(actions)
    text = f'{thought}</think><answer>{answer}</answer>'
    return [*self._encode_inside(text), self._close_id]

  def text(self, ids: Sequence[int]) -> str:
    """Ids as people read them, special tokens shown."""
    return self._vocabulary.text(ids)

  def _harmless(self, text: str) -> str:
    """A message in which the name of a special token is only text.

    What a web page says must not end a turn: a space goes behind the first
    character of the name, so `<|im_end|>` becomes `< |im_end|>`.
    """
    for name in self._vocabulary.special.values():
      if len(name) > 1:
        text = text.replace(name, f'{name[:1]} {name[1:]}')
    return text

  def _ids(self, text: str) -> list[int]:
    # The template has written the bos token, where there is one.
    return self.tokenizer.encode(text, add_special_tokens=False)

  # --- The start-up checks ---------------------------------------------------

  def _check_responses(self):
    """A response must be readable: its tags are text, and no text is lost."""
    text = 'a  b\n√ </think><answer>Up || Left</answer>'
    ids = self._encode_inside(text)
    data = b''.join(map(self._vocabulary.bytes_of, ids))
    if data != text.encode():
      raise ValueError(
        f'This tokenizer reads back {text!r} as {_readable(data)!r}, so '
        'thoughts and answers cannot be told apart.'
      )

  def _closing_id(self) -> int:
    """The special token that the template writes after a response."""
    text = self._texts.between('two')
    first = self._ids(text)[0]
    if first in self._vocabulary.special:
      return first
    # The plain rendering has none of this space left.
    if text[:1].isspace() and self._ids(text.lstrip())[0] in (
      self._vocabulary.special
    ):
      raise ValueError(
        'This chat template writes white space between a response and the '
        'token that closes its turn, which a sampled response does not have, '
        f'so the turns cannot be joined{template.WAY_OUT}.'
      )
    raise ValueError(
      f'This chat template closes a turn with plain text ({text[:20]!r}), not '
      'with a special token, so nothing says where a response ends.'
    )

  def _check_encoding(self):
    """Increments of ids must be those of the whole text, encoded at once."""
    between = self._texts.between('two')
    before = self._texts.opening('rules', 'one') + 'so</think>'
    whole, ids = self._ids(before + between), self._ids(between)
    if whole[-len(ids) :] != ids:
      raise ValueError(
        'This tokenizer encodes the beginning of a turn in another way when '
        'an earlier turn stands before it, so a conversation cannot be '
        'encoded turn by turn.'
      )


def _readable(data: bytes) -> str:
  """Bytes as text that can be written to any file."""
  return data.decode('utf-8', errors='replace')
