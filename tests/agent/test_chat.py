"""Rendering: increments of ids equal the template of the whole conversation."""

import copy

import pytest

from actfocus_jax.agent import chat as chat_lib
from actfocus_jax.agent import tokenizer as tokenizer_lib

SYSTEM = 'Rules √: <answer> is a tag.\n'
USERS = ('State:\n#_√O', 'Reward: -0.1\n{{ }} é', ' third ')
RESPONSES = (
  'I go on.</think><answer>Up</answer>',
  'so\n\n</think> <answer>Left || Up</answer>',
)


def whole(bridge, count):
  """The template applied to `count` user messages, and the forced tag."""
  messages = [{'role': 'system', 'content': SYSTEM}]
  for user, response in zip(USERS[:count], (*RESPONSES, None), strict=False):
    messages.append({'role': 'user', 'content': user})
    messages.append({'role': 'assistant', 'content': f'<think>{response}'})
  return (
    bridge.tokenizer.apply_chat_template(
      messages[:-1], tokenize=False, add_generation_prompt=True
    )
    + '<think>'
  )


@pytest.mark.parametrize('is_cut', [False, True])
@pytest.mark.parametrize('name', ['chat', 'qwen'])
def test_increments_joined_are_the_whole(name, is_cut, request):
  """With a response that stops by itself, and one cut before its stop id."""
  bridge = request.getfixturevalue(name)
  ids, _ = bridge.opening(SYSTEM, USERS[0])
  assert bridge.text(ids) == whole(bridge, 1)
  for turn, response in enumerate(RESPONSES):
    sampled = bridge.tokenizer.encode(response, add_special_tokens=False)
    if not is_cut:
      sampled.append(bridge.tokenizer.eos_token_id)
    before = [*ids, *sampled]
    ids = before + bridge.continuation(USERS[turn + 1], last_id=before[-1])
    assert ids[: len(before)] == before
    assert bridge.text(ids) == whole(bridge, turn + 2)


@pytest.mark.parametrize('name', ['chat', 'qwen'])
def test_opening_tells_the_system_message_apart(name, request):
  bridge = request.getfixturevalue(name)
  ids, count = bridge.opening(SYSTEM, USERS[0])
  head, tail = bridge.text(ids[:count]), bridge.text(ids[count:])
  assert head == f'<|im_start|>system\n{SYSTEM}<|im_end|>\n'
  assert tail.startswith('<|im_start|>user\n') and tail.endswith('<think>')


def test_a_cut_response_is_closed_by_one_forced_id(chat):
  stop = chat.tokenizer.eos_token_id
  (plain,) = chat.tokenizer.encode('.', add_special_tokens=False)
  closed = chat.continuation('next', last_id=plain)
  assert closed[0] == stop
  assert closed[1:] == chat.continuation('next', last_id=stop)


def test_stop_and_padding_ids(chat, tokenizer):
  end, pad = tokenizer.convert_tokens_to_ids(['<|im_end|>', '<|endoftext|>'])
  assert (chat.stop_ids, chat.pad_id) == ((end,), pad)
  assert chat_lib.Chat(tokenizer, stop_ids=[pad, end]).stop_ids == (pad, end)


def test_respond_reads_back(chat):
  ids = chat.respond('I am at (1, 2).', ['Up', 'Left'])
  assert ids[-1] in chat.stop_ids
  response = chat.read(ids)
  assert response.answer == ['Up', 'Left']
  assert response.text == 'I am at (1, 2).</think><answer>Up || Left</answer>'
  marked = [i for i, flag in zip(ids, response.action, strict=True) if flag]
  assert chat.text(marked) == 'Up || Left'


def test_a_template_that_drops_thoughts_is_refused(tokenizer):
  other = copy.deepcopy(tokenizer)
  other.chat_template = tokenizer_lib.CHAT_TEMPLATE.replace(
    'message.content',
    "(message.content.split('</think>')[-1] if not loop.last"
    ' else message.content)',
  )
  with pytest.raises(ValueError, match='changes earlier turns'):
    chat_lib.Chat(other)


def test_a_tokenizer_without_stop_id_is_refused(tokenizer):
  other = copy.deepcopy(tokenizer)
  other.eos_token = None
  with pytest.raises(ValueError, match='eos_token'):
    chat_lib.Chat(other)


def test_messages_by_hand():
  assert chat_lib.system_message(' Walk.\n', budget=5, max_actions=2) == (
    'Walk.\nYou have 5 actions, at most 2 in a turn, separated by ||.'
  )
  assert '||' not in chat_lib.system_message('x', budget=5, max_actions=1)
  message = dict(turn=2, actions_left=3, response_tokens=9)
  text = chat_lib.turn_message('P_', reward=-0.2, **message)
  assert text.startswith('Reward: -0.2\nTurn 2:\nState:\nP_\nActions left: 3\n')
  assert text.endswith('at most 9 tokens.')
  first = chat_lib.turn_message('P_', reward=None, **message)
  assert first == text.removeprefix('Reward: -0.2\n')
