"""Templates as increments: plain rendering, errors, prompts, dates."""

import pytest


@pytest.mark.parametrize(
  ('kind', 'template', 'opening', 'between', 'count'),
  [
    (
      *('qwen3', 'qwen3'),
      '<|im_start|>system\nRules<|im_end|>\n<|im_start|>user\none<|im_end|>\n'
      '<|im_start|>assistant\n<think>',
      '<|im_end|>\n<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n'
      '<think>',
      '<|im_start|>system\nRules<|im_end|>\n',
    ),
    (
      *('mistral', 'llama2'),
      '<s>[INST] <<SYS>>\nRules\n<</SYS>>\n\none [/INST] <think>',
      '</s>[INST] two [/INST] <think>',
      '',
    ),
    (
      *('mistral', 'mistral'),
      '<s>[INST]Rules\n\none[/INST]<think>',
      '</s>[INST]two[/INST]<think>',
      '',
    ),
  ],
)
def test_plain_rendering_by_hand(
  kind, template, opening, between, count, make_chat
):
  bridge = make_chat(kind, template, rendering='plain')
  ids, system_count = bridge.opening('Rules', 'one')
  assert bridge.text(ids) == opening
  assert bridge.text(ids[:system_count]) == count
  closed = bridge.continuation('two', last_id=-1)
  assert bridge.text(closed) == between
  assert bridge.continuation('two', last_id=closed[0]) == closed[1:]
  assert bridge.respond('so', ['Up'])[-1] == closed[0]
  with pytest.raises(ValueError, match="model.rendering='plain'"):
    make_chat(kind, template)


def chatml(templates, old='m.content', new='m.content'):
  assert old in templates['chatml']
  return templates['chatml'].replace(old, new)


SECOND = "(m.content if loop.index0 != 2 else m.content.split('</think>')[-1])"


@pytest.mark.parametrize(
  ('old', 'new', 'reason', 'is_plain_refused'),
  [
    ('m.content', SECOND, 'drops earlier thoughts', False),
    ('m.content', "'one'", 'changes the text of a message', True),
    (
      "'<|im_start|>' + m.role",
      "('<|im_start|>' if loop.length < 7 else '<|im_end|>') + m.role",
      'changes earlier turns',
      True,
    ),
    (
      'for m in messages',
      "for m in messages if m.role != 'system'",
      'no place for a system message',
      False,
    ),
    (
      'for m in messages',
      'for m in messages[::-1]',
      'moves or changes the text',
      True,
    ),
    (
      "{{ '<|im_start|>' + m.role",
      "{{ raise_exception('Never.') }}{{ '<|im_start|>' + m.role",
      'raises an error (Never.)',
      True,
    ),
    ("'<|im_end|>\n'", "'\n<|im_end|>\n'", 'white space between', False),
    ("'<|im_end|>\n'", "'</turn>'", "plain text ('</turn>", True),
    (
      "assistant\n' }}",
      "assistant\n<think></think>' }}",
      'ends its generation prompt with',
      False,
    ),
  ],
)
def test_unusable_template_is_refused_with_the_reason(
  old, new, reason, is_plain_refused, make_chat, templates
):
  template = chatml(templates, old, new)
  with pytest.raises(ValueError) as refused:
    make_chat('qwen3', template)
  message = str(refused.value)
  assert reason in message
  assert message.endswith('.') and '\n' not in message
  if is_plain_refused:
    with pytest.raises(ValueError) as refused:
      make_chat('qwen3', template, rendering='plain')
    assert 'model.rendering' not in str(refused.value)
    return
  assert "model.rendering='plain'" in message
  bridge = make_chat('qwen3', template, rendering='plain')
  shown = bridge.text(bridge.opening('Rules', 'one')[0])
  assert shown.count('Rules') == shown.count('one') == 1
  assert shown.count('<think>') == 1 and shown.endswith('<think>')


def test_template_error_at_a_later_turn_is_a_value_error(make_chat, templates):
  """The start-up check cannot know every message."""
  new = "(raise_exception('Not this.') if 'bad' in m.content else m.content)"
  bridge = make_chat('qwen3', chatml(templates, 'm.content', new))
  with pytest.raises(ValueError, match=r'cannot be rendered: Not this\.'):
    bridge.continuation('bad', last_id=-1)


def test_template_that_requires_a_user_message_counts_zero(
  make_chat, templates
):
  """A system message alone cannot be rendered, so its ids are not counted."""
  check = "{{ raise_exception('Who asks?') if messages | length < 2 }}"
  bridge = make_chat('qwen3', check + templates['chatml'])
  usual = make_chat('qwen3', 'chatml')
  ids, count = usual.opening('Rules', 'one')
  assert count > 0 and bridge.opening('Rules', 'one') == (ids, 0)


@pytest.mark.parametrize('end', ['<think>', '\n<think>\n\n'])
@pytest.mark.parametrize('rendering', ['template', 'plain'])
def test_generation_prompt_with_think_opens_it_once(
  end, rendering, make_chat, templates
):
  new = f"assistant\n{end}' }}}}"
  template = chatml(templates, "assistant\n' }}", new)
  bridge = make_chat('qwen3', template, rendering=rendering)
  shown = bridge.text(bridge.opening('Rules', 'one')[0])
  assert shown.endswith(f'<|im_start|>assistant\n{end}')
  later = bridge.text(bridge.continuation('two', last_id=-1))
  assert later.endswith(f'<|im_start|>assistant\n{end}')
  assert shown.count('<think>') == later.count('<think>') == 1


def test_template_with_think_before_responses_opens_it_once(
  make_chat, templates
):
  opened = "(('<think>\n' if m.role == 'assistant' else '') + m.content)"
  template = chatml(templates, 'm.content', opened)
  template = template.replace("assistant\n' }}", "assistant\n<think>\n' }}")
  bridge = make_chat('qwen3', template)
  opening, _ = bridge.opening('Rules', 'one')
  for ids in (opening, bridge.continuation('two', last_id=-1)):
    assert bridge.text(ids).endswith('<|im_start|>assistant\n<think>\n')
    assert bridge.text(ids).count('<think>') == 1


@pytest.mark.parametrize('date', ["strftime_now('%d %b %Y')", 'date_string'])
def test_date_in_a_template_is_fixed(date, make_chat, templates):
  """A run that goes on tomorrow equals one that was never stopped."""
  template = f'Today: {{{{ {date} }}}}. {templates["chatml"]}'
  bridge = make_chat('qwen3', template)
  shown = bridge.text(bridge.opening('Rules', 'one')[0])
  assert shown.startswith('Today: 26 Jul 2024. <|im_start|>system')
