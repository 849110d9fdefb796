"""Answers and action tokens, against a scan written from the rules alone."""

import json

import numpy as np
import pytest

from actfocus_jax.text import chat as chat_lib
from actfocus_jax.text import vocabulary

TAGS = (b'<think>', b'</think>', b'<answer>', b'</answer>')
# What adversarial responses are made of: whole, glued, broken and upper-case
# tags, white space of Unicode, characters of two to four bytes, bad UTF-8.
FRAGMENTS = (
  *TAGS,
  *TAGS,
  *(b'</think><answer>', b'</think> <answer>', b'</think>\n\n<answer>') * 2,
  *(b'</answer>', b'Up', b'Down', b' || ', b'||', b' ', b'\n') * 2,
  '</think>\u3000\u00a0<answer>'.encode(),
  *('\u00a0', '\u2003', '\u2028', '\x85', '\u200b'),
  *(b'</Think>', b'<ANSWER>', b'</ANSWER>', b'<answer', b'answer>', b'</'),
  *('√', 'é', '😀', 'Uр', '<answer>√', '√</answer>'),
  *(b'\xff', b'\xe2\x88', b'\x9a', b'\xf0\x9f', b'\xed\xa0\x80', b'\xc2'),
)


def token_bytes(tokenizer, ids):
  return list(map(vocabulary.of(tokenizer).bytes_of, ids))


def random_bytes(rng):
  picks = rng.integers(0, len(FRAGMENTS), rng.integers(1, 14))
  parts = (FRAGMENTS[i] for i in picks)
  return b''.join(p.encode() if isinstance(p, str) else p for p in parts)


def random_pieces(rng, data):
  """Cuts anywhere, now and then twice: that leaves an empty piece."""
  cuts = np.sort(rng.integers(0, len(data) + 1, rng.integers(0, 25)))
  edges = [0, *cuts.tolist(), len(data)]
  return [data[a:b] for a, b in zip(edges, edges[1:], strict=False)]


def skip_blanks(data, i):
  """Index after the (Unicode) white space that starts at byte i."""
  while True:
    for width in (1, 2, 3):
      try:
        character = data[i : i + width].decode()
      except UnicodeDecodeError:
        continue
      if len(character) == 1 and character.isspace():
        i += width
        break
    else:
      return i


def oracle_span(data):
  """Bytes strictly between the tags of the executed answer, or None."""
  for i in range(len(data)):
    if data.startswith(b'</think>', i):
      start = skip_blanks(data, i + len(b'</think>'))
      if data.startswith(b'<answer>', start):
        start += len(b'<answer>')
        stop = data.find(b'</answer>', start)
        return None if stop < 0 else (start, stop)
  return None


def without_tags(text):
  kept, i = '', 0
  while i < len(text):
    tag = next((t.decode() for t in TAGS if text.startswith(t.decode(), i)), '')
    kept, i = kept + ('' if tag else text[i]), i + max(len(tag), 1)
  return kept


def oracle_actions(data):
  span = oracle_span(data)
  if span is None:
    return None
  pieces = data[slice(*span)].split(b'||')
  texts = [piece.decode('utf-8', 'surrogateescape') for piece in pieces]
  actions = [without_tags(text).strip() for text in texts]
  return [action for action in actions if action]


def oracle_answer(data):
  """The actions as an environment gets them: text that can be written."""
  actions = oracle_actions(data)
  if actions is None:
    return None
  in_bytes = (action.encode('utf-8', 'surrogateescape') for action in actions)
  return [action.decode('utf-8', 'replace') for action in in_bytes]


def oracle_mask(pieces):
  data = b''.join(pieces)
  owner = [i for i, piece in enumerate(pieces) for _ in piece]
  mask = [False] * len(pieces)
  span = oracle_span(data)
  if span and data[slice(*span)].decode('utf-8', 'surrogateescape').strip():
    for i in owner[slice(*span)]:
      mask[i] = True
  return mask


def test_random_responses_match_the_byte_scan():
  rng = np.random.default_rng(0)
  seen = {'malformed': 0, 'empty': 0, 'shared': 0, 'bad utf-8': 0, 'answer': 0}
  for _ in range(2000):
    data = random_bytes(rng)
    pieces = random_pieces(rng, data)
    text = data.decode('utf-8', 'surrogateescape')
    actions, mask = oracle_actions(data), oracle_mask(pieces)
    assert chat_lib.parse_answer(text) == actions, data
    assert chat_lib.action_mask(pieces) == mask, pieces
    seen['malformed'] += actions is None
    seen['empty'] += actions == []
    seen['answer'] += bool(actions)
    seen['bad utf-8'] += any('\udc80' <= c <= '\udcff' for c in text)
    marked = b''.join(p for p, m in zip(pieces, mask, strict=True) if m)
    seen['shared'] += b'answer>' in marked
  assert min(seen.values()) > 60, seen


@pytest.mark.parametrize(
  ('text', 'actions'),
  [
    ('so</think><answer>Up</answer>', ['Up']),
    ('so</think> <answer> Up ||Down|| </answer>', ['Up', 'Down']),
    ('</think>\u00a0\n<answer>Up</answer>', ['Up']),
    ('</think>\u200b<answer>Up</answer>', None),  # No white space.
    ('a</think>b</think><answer>Up</answer>', ['Up']),
    ('</think>so<answer>Up</answer>', None),
    ('</think><answer>Up', None),
    ('</THINK><answer>Up</answer>', None),
    ('</think><answer>Up</answer></think><answer>Down</answer>', ['Up']),
    ('</think><answer><answer>Up</answer></answer>', ['Up']),
    ('</think><answer>U<think>p</answer>', ['Up']),
    ('</think><answer> \u3000</answer>', []),
    ('</think><answer>||</answer>', []),
  ],
)
def test_parse_answer_by_hand(text, actions):
  assert chat_lib.parse_answer(text) == actions


@pytest.mark.parametrize(
  ('pieces', 'mask'),
  [
    (['so', '</think>', '<answer>', 'Up', '</answer>', ''], '---x--'),
    (['</think', '><', 'answer', '>I', 'ce', ' </', 'answer>'], '---xxx-'),
    (['</think><answer>', ' ', 'Up', '', ' ', '</answer>'], '-xx-x-'),
    (['</think><answer>', ' ', '\n', '</answer>'], '----'),
    (['</think><answer>Up</answer>'], 'x'),
    (['</think><answer>', '||', '</answer>'], '-x-'),
    (['Up', '</think>', '<answer>Up', '</answer>', 'Up'], '--x--'),
    ([], ''),
  ],
)
def test_action_mask_by_hand(pieces, mask):
  found = chat_lib.action_mask([piece.encode() for piece in pieces])
  assert ''.join('-x'[flag] for flag in found) == mask


def ids_of(bridge, piece, one_byte):
  try:
    text = piece.decode()
  except UnicodeDecodeError:
    return [one_byte[byte] for byte in piece]
  return bridge.tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize('name', ['chat', 'qwen'])
def test_read_of_ids_matches_the_byte_scan(name, request):
  """Tags and characters over several ids, special ids among them."""
  bridge = request.getfixturevalue(name)
  rng, one_byte = np.random.default_rng(1), id_of_byte(bridge)
  seen = {'answer': 0, 'special inside': 0, 'split action': 0, 'bad utf-8': 0}
  for _ in range(1500):
    data = random_bytes(rng)
    parts = [
      ids_of(bridge, piece, one_byte) for piece in random_pieces(rng, data)
    ]
    if rng.random() < 0.2:
      parts.insert(rng.integers(len(parts) + 1), [bridge.stop_ids[0]])
    ids = [index for part in parts for index in part]
    pieces = token_bytes(bridge.tokenizer, ids)
    assert b''.join(pieces) == data
    response = bridge.read(ids)
    assert response.answer == oracle_answer(data)
    assert response.action == oracle_mask(pieces)
    assert response.text == data.decode('utf-8', 'replace')
    marked = [p for p, m in zip(pieces, response.action, strict=True) if m]
    seen['answer'] += bool(response.answer)
    seen['special inside'] += b'' in pieces[:-1]
    seen['split action'] += any(piece[0] >= 0x80 for piece in marked)
    seen['bad utf-8'] += '\ufffd' in response.text
  assert min(seen.values()) > 60, seen


@pytest.mark.parametrize('name', ['chat', 'qwen'])
def test_special_and_unused_ids_have_no_bytes(name, request):
  bridge = request.getfixturevalue(name)
  size = len(bridge.tokenizer)
  special = bridge.tokenizer.convert_tokens_to_ids(
    ['<|im_start|>', '<|im_end|>', '<|endoftext|>']
  )
  plain = bridge.tokenizer.encode('a', add_special_tokens=False)
  ids = [*special, *plain, size + 5]  # Models pad their vocabulary.
  pieces = token_bytes(bridge.tokenizer, ids)
  assert pieces == [b'', b'', b'', b'a', b'']


def test_answer_of_broken_bytes_can_be_encoded(chat):
  """The answer is text; which ids it is made of is known by their bytes."""
  head = chat.tokenizer.encode('</think><answer>', add_special_tokens=False)
  tail = chat.tokenizer.encode('||Up</answer>', add_special_tokens=False)
  one_byte = id_of_byte(chat)
  broken = [one_byte[0xE2], one_byte[0x88], one_byte[0xFF]]
  response = chat.read([*head, *broken, *tail])
  assert response.answer == ['\ufffd\ufffd', 'Up']
  for text in (response.text, *response.answer):
    assert text.encode().decode() == text
    assert json.loads(json.dumps(text).encode()) == text
  start = len(head)
  assert response.action[: start + 3] == [False] * start + [True] * 3


def id_of_byte(bridge):
  ids = range(len(bridge.tokenizer))
  pieces = token_bytes(bridge.tokenizer, ids)
  return {p[0]: i for i, p in zip(ids, pieces, strict=True) if len(p) == 1}
