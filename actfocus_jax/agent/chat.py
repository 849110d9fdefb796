"""The bridge between text and tokens: rendering, bytes of ids, answer spans.

The life of one turn, as text and as ids:

1. The environment's state becomes a user message (`turn_message`).
2. The message is rendered by the tokenizer's own chat template as an
   increment: only what is new since the last sampled token (`Chat.opening`,
   `Chat.continuation`). It ends with the forced text `<think>`.
3. The policy samples ids until a stop id. They are kept as sampled.
4. `Chat.read` turns the ids into bytes, finds the answer in the bytes, and
   marks the ids that hold a byte of it (`action_mask`). Nothing is ever
   encoded again.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Sequence

import numpy as np

THINK = '<think>'
_ANSWER = re.compile(r'</think>\s*<answer>(.*?)</answer>', re.DOTALL)
_TAGS = re.compile(r'</?(?:think|answer)>')
_PLACEHOLDER = 'assistant-text-goes-here'


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


# --- Bytes of ids ------------------------------------------------------------


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


def token_bytes(tokenizer, ids: Sequence[int]) -> list[bytes]:
  """The exact bytes of each id; b'' for special ones and for unused ids.

  Args:
    tokenizer: A byte-level BPE tokenizer of transformers.
    ids: Token ids. Ids past the vocabulary (models pad theirs) are unused.

  Returns:
    One bytes object per id. Joined, they are the text; a character may be
    spread over several of them.
  """
  added = tokenizer.added_tokens_decoder
  table = _byte_of_character()
  pieces = []
  for index, token in zip(
    ids, tokenizer.convert_ids_to_tokens(list(ids)), strict=True
  ):
    if index in added:
      special = added[index].special
      pieces.append(b'' if special else added[index].content.encode())
    elif token is None:
      pieces.append(b'')
    else:
      pieces.append(bytes(table[character] for character in token))
  return pieces


def load_tokenizer(directory: str | pathlib.Path):
  """Loads a Hugging Face tokenizer directory through transformers.

  Args:
    directory: Holds tokenizer.json and tokenizer_config.json.

  Returns:
    The transformers tokenizer.

  Raises:
    ValueError: When it cannot be read, is not byte-level BPE, or has no chat
      template.
  """
  import transformers

  try:
    tokenizer = transformers.AutoTokenizer.from_pretrained(
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
  alphabet = _byte_of_character()
  added = tokenizer.added_tokens_decoder
  for token, index in tokenizer.get_vocab().items():
    if index not in added and not set(token) <= alphabet.keys():
      raise ValueError(
        f'The tokenizer in {directory} is not byte-level BPE: its token '
        f'{token!r} stands for no exact bytes.'
      )
  return tokenizer


# --- Rendering ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Response:
  """What a sampled response says.

  Attributes:
    text: Decoded, for people and for the environment.
    answer: The actions, or None when malformed.
    action: Per token, whether it is part of the executed answer.
  """

  text: str
  answer: list[str] | None
  action: list[bool]


class Chat:
  """Renders a conversation as increments of ids, by the tokenizer's template.

  The increments joined are the template applied to the whole conversation;
  `__init__` checks that on a small one.

  Attributes:
    tokenizer: The transformers tokenizer.
    stop_ids: Ids that end a response.
    pad_id: Id for padding; never read as text.
  """

  def __init__(self, tokenizer, *, stop_ids: Sequence[int] = ()):
    """Takes the stop ids from the tokenizer, and `stop_ids` beside them.

    Args:
      tokenizer: From `load_tokenizer`.
      stop_ids: More ids that end a response (a model's generation_config).

    Raises:
      ValueError: When the template cannot be rendered as increments, or the
        tokenizer names no end-of-turn token.
    """
    if tokenizer.eos_token_id is None:
      raise ValueError('The tokenizer names no eos_token to end a response.')
    self.tokenizer = tokenizer
    self.stop_ids = tuple(sorted({tokenizer.eos_token_id, *stop_ids}))
    pad = tokenizer.pad_token_id
    self.pad_id = tokenizer.eos_token_id if pad is None else pad
    self._bytes: dict[int, bytes] = {}
    between = self._render(_messages('', '', _PLACEHOLDER, _PLACEHOLDER))
    self._between = between.split(_PLACEHOLDER)[-2:]
    self._check_increments()

  def opening(self, system: str, user: str) -> tuple[list[int], int]:
    """Ids of the system message, the first user message and `<think>`.

    Returns:
      The ids, and how many of them the system message takes.
    """
    text = self._render(_messages(system, user)) + THINK
    head = self._render(_messages(system), generation=False)
    if not text.startswith(head):
      return self._ids(text), 0
    head_ids = self._ids(head)
    return head_ids + self._ids(text[len(head) :]), len(head_ids)

  def continuation(self, user: str, *, last_id: int) -> list[int]:
    """Ids between a response and the next one.

    Args:
      user: The new user message.
      last_id: The last sampled id. A response that was cut before its stop
        id gets the closing id here, as a forced token.

    Returns:
      Ids that end with the forced `<think>`.
    """
    before, after = self._between
    ids = self._ids(f'{before}{user}{after}{THINK}')
    return ids[1:] if last_id == ids[0] else ids

  def read(self, ids: Sequence[int]) -> Response:
    """Reads sampled ids: text, actions, and which ids are action tokens."""
    for unseen in set(ids) - self._bytes.keys():
      (self._bytes[unseen],) = token_bytes(self.tokenizer, [unseen])
    pieces = [self._bytes[index] for index in ids]
    data = b''.join(pieces)
    text = data.decode('utf-8', errors='replace')
    return Response(text, parse_answer(_decode(data)), action_mask(pieces))

  def respond(self, thought: str, actions: Sequence[str]) -> list[int]:
    """Ids of a demonstrated response, the stop id included."""
    answer = ' || '.join(actions)
    text = f'{thought}</think><answer>{answer}</answer>'
    return self._ids(text) + [self.tokenizer.eos_token_id]

  def text(self, ids: Sequence[int]) -> str:
    """Ids as people read them, special tokens shown."""
    return self.tokenizer.decode(list(ids), skip_special_tokens=False)

  def _ids(self, text: str) -> list[int]:
    return self.tokenizer.encode(text, add_special_tokens=False)

  def _render(self, messages, *, generation: bool = True) -> str:
    return self.tokenizer.apply_chat_template(
      messages, tokenize=False, add_generation_prompt=generation
    )

  def _check_increments(self):
    thought = f'{THINK}so</think><answer>go</answer>'
    whole = self._render(_messages('rules', 'one', thought, 'two'))
    opening = self._render(_messages('rules', 'one'))
    if whole != f'{opening}{thought}{self._between[0]}two{self._between[1]}':
      raise ValueError(
        'This chat template changes earlier turns when a new one is added '
        '(some drop earlier thoughts), so a conversation cannot be rendered '
        'turn by turn.'
      )


def _messages(*contents: str) -> list[dict[str, str]]:
  roles = ('system', 'user', 'assistant', 'user')
  return [
    {'role': role, 'content': content}
    for role, content in zip(roles, contents, strict=False)
  ]
