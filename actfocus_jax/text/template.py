"""A chat template as increments: what is written around each message.

The life of one template:

1. It is rendered with a placeholder where responses will stand. What comes
   before the first one opens a conversation; what comes between two of them
   is the increment of a turn.
2. `Increments.__init__` checks on a small conversation that the increments
   joined are what the template writes, and finds the reason where they are
   not.
3. After that one increment is rendered per turn, with the turn's own message.
"""

import datetime
from collections.abc import Sequence

THINK = '<think>'
RENDERINGS = ('template', 'plain')
_MARK = 'assistant-text-goes-here'
# The conversation of the start-up check. The words must not be markup.
_SYSTEM = 'rules-of-the-game'
_USERS = ('first-state', 'second-state', 'third-state', 'fourth-state')
_PLAIN = ('first-answer', 'second-answer')
_THOUGHTS = ('first-thought', 'second-thought')
_RESPONSES = (
  f'{_THOUGHTS[0]}\n</think>\n\n<answer>Up</answer>',
  f'{_THOUGHTS[1]} </think> <answer>Left || Up</answer>',
)
WAY_OUT = (
  "; model.rendering='plain' takes the markup that it writes around plain text "
  'and leaves every response as it was sampled'
)
# Some templates write today's date: a run that goes on tomorrow would differ.
_DAY = datetime.date(2024, 7, 26)
_FORMS = (*(f'-{c}' for c in 'dmHIMSj'), *'aAbBcdDeFHIjmMpSTuUVwWxXyYZ')


class Increments:
  """The texts between the responses of a conversation.

  Attributes:
    think: What opens every response: `<think>`, the end of the generation
      prompt that holds it, or '' where the template itself writes it before
      every response. Given to the model, never sampled.
  """

  def __init__(self, tokenizer, *, rendering: str = 'template'):
    """Checks the template; `chat.Chat` says what the renderings are.

    Args:
      tokenizer: With a chat template.
      rendering: 'template' or 'plain'.

    Raises:
      ValueError: When it cannot be rendered so; says why.
    """
    if rendering not in RENDERINGS:
      raise ValueError(
        f'rendering is {rendering!r}; allowed: {", ".join(RENDERINGS)}.'
      )
    self._tokenizer = tokenizer
    self._template = _pinned(tokenizer.get_chat_template())
    self._is_plain = rendering == 'plain'
    self._takes_system = True
    problem = self._problem(_PLAIN)
    if problem is not None:
      self._takes_system = False
      self._refuse(self._problem(_PLAIN))
      if not self._is_plain:
        self._refuse(f'has no place for a system message: it {problem}')
    self.think = self._thinking()
    if not self._is_plain:
      self._refuse(self._problem([self.think + r for r in _RESPONSES]))
      self._refuse(self._prompt_problem())

  def opening(self, system: str, user: str) -> str:
    """All that comes before the first response's own text."""
    return self._opening(system, user) + self.think

  def system_part(self, system: str) -> str:
    """The system message alone; '' where the user's message holds it."""
    if not self._takes_system:
      return ''
    try:
      alone = self._render(self._messages(system))
    except ValueError:  # Some templates want a user message too.
      return ''
    return alone if system.strip() in alone else ''

  def between(self, user: str) -> str:
    """All that comes between a response and the next one's own text."""
    text = self._between(user) + self.think
    # A sampled response is closed by a token, without a space before it.
    return text.lstrip() if self._is_plain else text

  def _opening(self, system: str, user: str) -> str:
    messages = self._messages(system, user, _MARK, _USERS[1])
    # The last mark is ours, should a message hold the same words.
    return self._render(messages).rpartition(_MARK)[0]

  def _between(self, user: str) -> str:
    messages = self._messages(_SYSTEM, _USERS[0], _MARK, user, _MARK, _USERS[1])
    return self._render(messages).partition(_MARK)[2].rpartition(_MARK)[0]

  def _messages(self, system: str, *contents: str) -> list[dict[str, str]]:
    """A conversation: user, assistant, user, ... behind the system message."""
    roles = ['user', 'assistant'] * len(contents)
    if self._takes_system:
      contents, roles = (system, *contents), ['system', *roles]
    else:
      contents = (f'{system}\n\n{contents[0]}', *contents[1:])
    return [
      {'role': role, 'content': content}
      for role, content in zip(roles, contents, strict=False)
    ]

  def _render(self, messages, *, generation: bool = False) -> str:
    try:
      return self._tokenizer.apply_chat_template(
        messages,
        tokenize=False,
        add_generation_prompt=generation,
        chat_template=self._template,
        date_string=_DAY.strftime('%d %b %Y'),
      )
    except Exception as error:  # A template is a program: any may come.
      raise ValueError(
        f'The chat template cannot be rendered: {error}.'
      ) from error

  # --- The start-up check: every part finds a reason, or None ----------------

  def _refuse(self, reason: str | None):
    if reason is None:
      return
    raise ValueError(
      f'This chat template {reason}, so a conversation cannot be rendered '
      f'turn by turn{"" if self._is_plain else WAY_OUT}.'
    )

  def _problem(self, responses: Sequence[str]) -> str | None:
    """Why increments around the responses are not the whole conversation."""
    one, two = responses
    texts = (_SYSTEM, _USERS[0], one, _USERS[1], two, _USERS[2], _MARK)
    try:
      rendered = self._render(self._messages(*texts, _USERS[3]))
      joined = self._opening(_SYSTEM, _USERS[0]) + one
      joined += self._between(_USERS[1]) + two + self._between(_USERS[2])
    except ValueError as error:
      return f'raises an error ({error.__cause__})'
    whole = rendered.rpartition(_MARK)[0]
    if whole == joined and _stand_in_order(texts, rendered):
      return None
    if any(thought in joined and thought not in whole for thought in _THOUGHTS):
      return 'drops earlier thoughts'
    if not _stand_in_order(texts, rendered):
      return 'leaves out, moves or changes the text of a message'
    return 'changes earlier turns when a new one is added'

  def _prompt_problem(self) -> str | None:
    """Why what opens a response is no generation prompt."""
    before, prompt = self._opening(_SYSTEM, _USERS[0]), self._prompt()
    if before.startswith(prompt.rstrip()) or prompt == before + self.think:
      return None
    return (
      f'ends its generation prompt with {prompt[-40:]!r} but writes '
      f'{before[-40:]!r} before an earlier response'
    )

  def _prompt(self) -> str:
    messages = self._messages(_SYSTEM, _USERS[0])
    return self._render(messages, generation=True)

  def _thinking(self) -> str:
    """What is still to be written before a response's own text."""
    before, prompt = self._opening(_SYSTEM, _USERS[0]), self._prompt()
    if before.rstrip().endswith(THINK):
      return ''
    tail = prompt[len(before) :] if prompt.startswith(before) else ''
    return tail if tail.strip() == THINK else THINK


def _pinned(template: str) -> str:
  """The template with the day that `strftime_now` gives held fixed.

  Functions cannot be handed to a template, so a macro takes the name.
  """
  if 'strftime_now' not in template:
    return template
  forms = ((form, _DAY.strftime(f'%{form}')) for form in _FORMS)
  steps = ''.join(f" | replace('%{form}', '{day}')" for form, day in forms)
  # The line break goes with the block, so the template begins a line.
  macro = f'{{% macro strftime_now(format) %}}{{{{ format{steps} }}}}'
  return f'{macro}{{% endmacro %}}\n{template}'


def _stand_in_order(texts: Sequence[str], rendered: str) -> bool:
  """Whether every text is there, each behind the one before it."""
  end = 0
  for text in texts:
    start = rendered.find(text, end)
    if start < 0:
      return False
    end = start + len(text)
  return True
