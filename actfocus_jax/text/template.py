"""Chat template, rendered in increments: the text around each message.

A conversation is rendered with a placeholder for each response. The text before
the first placeholder opens the conversation; the text between two of them is
the increment of a turn. `Increments` checks on a small conversation that the
joined increments equal the rendered whole, and gives the reason if they do not.
"""

import datetime
import re
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
# Some templates write today's date; a run resumed on another day would differ.
_DAY = datetime.date(2024, 7, 26)
_FORMS = (*(f'-{c}' for c in 'dmHIMSj'), *'aAbBcdDeFHIjmMpSTuUVwWxXyYZ')


class Increments:
  """Texts between the responses of a conversation.

  Attributes:
    think: text that opens every response and is given to the model, not
      sampled: `<think>`, the end of the generation prompt that holds it, or ''
      if the template writes it before every response.
  """

  def __init__(self, tokenizer, *, rendering: str = 'template'):
    """Check the template; see `chat.Chat` for the renderings.

    Raises:
      ValueError: if the template cannot be rendered so; gives the reason.
    """
    if rendering not in RENDERINGS:
      raise ValueError(
        f'model.rendering is {rendering!r}; allowed: {", ".join(RENDERINGS)}.'
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
      before, prompt = self._prompts()
      is_same = before.startswith(prompt.rstrip())
      if not is_same and prompt != before + self.think:
        self._refuse(
          f'ends its generation prompt with {prompt[-40:]!r} but writes '
          f'{before[-40:]!r} before an earlier response'
        )

  def opening(self, system: str, user: str) -> str:
    """Return the text before the first response, `think` included."""
    return self._opening(system, user) + self.think

  def system_part(self, system: str) -> str:
    """Return the system message alone; '' if the user message holds it."""
    if not self._takes_system:
      return ''
    try:
      alone = self._render(self._messages(system))
    except ValueError:  # Some templates require a user message.
      return ''
    return alone if system.strip() in alone else ''

  def between(self, user: str) -> str:
    """Return the text between two responses, `think` included."""
    text = self._between(user) + self.think
    # A sampled response is closed by a token, without a space before it.
    return text.lstrip() if self._is_plain else text

  def _opening(self, system: str, user: str) -> str:
    messages = self._messages(system, user, _MARK, _USERS[1])
    # The last mark is the placeholder, even if a message holds the same words.
    return self._render(messages).rpartition(_MARK)[0]

  def _between(self, user: str) -> str:
    messages = self._messages(_SYSTEM, _USERS[0], _MARK, user, _MARK, _USERS[1])
    return self._render(messages).partition(_MARK)[2].rpartition(_MARK)[0]

  def _messages(self, system: str, *contents: str) -> list[dict[str, str]]:
    """Return a conversation: system message, user, assistant, user, ..."""
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
    except Exception as error:  # A template may raise anything.
      message = f'The chat template cannot be rendered: {error}.'
      raise ValueError(message) from error

  # --- The start-up check: each part returns a reason, or None ---------------

  def _refuse(self, reason: str | None):
    if reason is None:
      return
    raise ValueError(
      f'This chat template {reason}, so a conversation cannot be rendered '
      f'turn by turn{"" if self._is_plain else WAY_OUT}.'
    )

  def _problem(self, responses: Sequence[str]) -> str | None:
    """Return the reason why the increments do not give the whole, or None."""
    first, second = responses
    texts = (_SYSTEM, _USERS[0], first, _USERS[1], second, _USERS[2], _MARK)
    try:
      rendered = self._render(self._messages(*texts, _USERS[3]))
      joined = self._opening(_SYSTEM, _USERS[0]) + first
      joined += self._between(_USERS[1]) + second + self._between(_USERS[2])
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

  def _prompts(self) -> tuple[str, str]:
    """Return the text before an earlier response, and before a new one."""
    messages = self._messages(_SYSTEM, _USERS[0])
    new = self._render(messages, generation=True)
    return self._opening(_SYSTEM, _USERS[0]), new

  def _thinking(self) -> str:
    """Return the text that is still missing before a response."""
    before, prompt = self._prompts()
    if before.rstrip().endswith(THINK):
      return ''
    tail = prompt[len(before) :] if prompt.startswith(before) else ''
    return tail if tail.strip() == THINK else THINK


def _pinned(template: str) -> str:
  """Return the template with a fixed day in place of `strftime_now`.

  transformers passes no functions to a template, so a macro takes the name.
  """
  if 'strftime_now' not in template:
    return template
  forms = ((form, _DAY.strftime(f'%{form}')) for form in _FORMS)
  steps = ''.join(f" | replace('%{form}', '{day}')" for form, day in forms)
  # The line break goes with the block, so the template begins a line.
  macro = f'{{% macro strftime_now(format) %}}{{{{ format{steps} }}}}'
  return f'{macro}{{% endmacro %}}\n{template}'


def _stand_in_order(texts: Sequence[str], rendered: str) -> bool:
  """Return whether all texts occur, each behind the one before it."""
  return bool(re.search('.*?'.join(map(re.escape, texts)), rendered, re.DOTALL))
