"""Answers and action tokens, against a scan written from the rules alone."""

import collections
import json
import re

import numpy as np
import pytest

from actfocus_jax.envs import frozen_lake
from actfocus_jax.rollout import episode as episode_lib
from actfocus_jax.rollout import games
from actfocus_jax.text import chat as chat_lib

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
    (
      '</think>\u200b<answer>Up</answer>',
      None,
    ),  # no white space, though unseen
    ('a</think>b</think><answer>Up</answer>', ['Up']),
    ('<answer>Up</answer>', None),
    ('</think>so<answer>Up</answer>', None),
    ('</think><answer>Up', None),
    ('</THINK><answer>Up</answer>', None),
    ('</think><Answer>Up</answer>', None),
    ('</think><answer>Up</answer></think><answer>Down</answer>', ['Up']),
    ('</think><answer><answer>Up</answer></answer>', ['Up']),
    ('</think><answer>U<think>p</answer>', ['Up']),
    ('</think><answer> \u3000</answer>', []),
    ('</think><answer></answer>', []),
    ('</think><answer>||</answer>', []),
    ('', None),
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
    (['</think><answer>', 'Up', '</answe'], '---'),
    (['</think><answer>Up</answer>'], 'x'),
    (['</think><answer>', '||', '</answer>'], '-x-'),
    (['Up', '</think>', '<answer>Up', '</answer>', 'Up'], '--x--'),
    ([], ''),
  ],
)
def test_action_mask_by_hand(pieces, mask):
  found = chat_lib.action_mask([piece.encode() for piece in pieces])
  assert ''.join('-x'[flag] for flag in found) == mask


def test_action_mask_covers_a_character_over_three_tokens():
  pieces = [b'</think><answer>', b'\xe2', b'\x88', b'\x9a', b'</answer>']
  assert chat_lib.action_mask(pieces) == [False, True, True, True, False]


def random_text(rng):
  return random_bytes(rng).decode('utf-8', 'ignore')


@pytest.mark.parametrize('name', ['chat', 'qwen'])
def test_read_of_ids_matches_the_byte_scan(name, request):
  """Encoded text, and ids drawn at random, which no encoder would give."""
  bridge = request.getfixturevalue(name)
  rng = np.random.default_rng(1)
  answers = 0
  for _ in range(400):
    text = random_text(rng)
    ids = bridge.tokenizer.encode(text, add_special_tokens=False)
    strays = rng.integers(0, len(bridge.tokenizer), rng.integers(0, 3))
    pieces = chat_lib.token_bytes(bridge.tokenizer, ids)
    assert b''.join(pieces) == text.encode()
    ids = [*ids, *strays.tolist()]
    pieces = chat_lib.token_bytes(bridge.tokenizer, ids)
    response = bridge.read(ids)
    assert response.answer == oracle_answer(b''.join(pieces))
    assert response.action == oracle_mask(pieces)
    assert response.text == b''.join(pieces).decode('utf-8', 'replace')
    answers += bool(response.answer)
  assert answers > 30


@pytest.mark.parametrize('name', ['chat', 'qwen'])
def test_special_and_unused_ids_have_no_bytes(name, request):
  bridge = request.getfixturevalue(name)
  size = len(bridge.tokenizer)
  special = bridge.tokenizer.convert_tokens_to_ids(
    ['<|im_start|>', '<|im_end|>', '<|endoftext|>']
  )
  plain = bridge.tokenizer.encode('a', add_special_tokens=False)
  ids = [*special, *plain, size + 5]  # Models pad their vocabulary.
  pieces = chat_lib.token_bytes(bridge.tokenizer, ids)
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


# --- The real tokenizer, through an episode ----------------------------------

WORDS = ('so', ' I go', 'Up', ' Left', ' || ', '\n', 'Ice', 'at (1, 2).', ' ')
# Per kind of a part: texts, and how the text becomes ids.
PARTS = {
  'answer': (
    '</think><answer>Up</answer>',
    '</think>\n<answer> Up||Left </answer>',
    ' </think> <answer>Go √</answer>',
  ),
  'glued': (
    'Ice</think>so',
    'so</think><answer>Up</answer>Ice',
    'I<answer>I',
    '</answer>Up',
  ),
  'tag': ('<think>', '</think>', '<answer>', '</answer>'),
  'split': ('</think>', '<answer>', '</answer>', '</think><answer>Up</answer>'),
  'spread': ('√', '😀', '한', '</think><answer>√😀</answer>'),
  'unclosed': ('</think><answer>Up', '</think><answer>Up</answe', '<answer'),
  'nested': (
    '</think><answer><answer>Up</answer></answer>',
    '</think><answer>a<think>b</think><answer>c</answer>',
  ),
  'repeated': (
    '</think></think><answer>Up</answer><answer>Up</answer>',
    '</think><answer>Up</answer></think><answer>Left</answer>',
  ),
  'upper': (
    '</THINK><answer>Up</answer>',
    '</think><ANSWER>Up</ANSWER>',
    '<Answer>',
    '</Think>',
    '</ANSWER>',
  ),
  'blank': ('</think><answer>\u3000\n </answer>', '</think><answer></answer>'),
  'word': WORDS,
  'special': ('',),
  'broken': ('',),
}


def id_of_byte(bridge):
  ids = range(len(bridge.tokenizer))
  pieces = chat_lib.token_bytes(bridge.tokenizer, ids)
  return {p[0]: i for i, p in zip(ids, pieces, strict=True) if len(p) == 1}


def random_part(rng, kind, bridge, one_byte):
  """Ids of one part and the bytes they were made from."""
  text = PARTS[kind][rng.integers(len(PARTS[kind]))]
  if kind == 'special':
    names = ['<|im_start|>', '<|endoftext|>']
    return [bridge.tokenizer.convert_tokens_to_ids(rng.choice(names))], b''
  if kind == 'broken':
    data = bytes([rng.choice([0xFF, 0xE2, 0x9A, 0xC2, 0xF0])])
    return [one_byte[data[0]]], data
  if kind == 'spread':
    return [one_byte[byte] for byte in text.encode()], text.encode()
  cuts = [0, len(text)]
  if kind == 'split':
    cuts += rng.integers(0, len(text), len(text) // 2).tolist()
  cuts = sorted(cuts)
  ids = []
  for a, b in zip(cuts, cuts[1:], strict=False):
    ids += bridge.tokenizer.encode(text[a:b], add_special_tokens=False)
  return ids, text.encode()


def random_response(rng, bridge, one_byte):
  kinds = rng.choice(list(PARTS), rng.integers(1, 6)).tolist()
  parts = [random_part(rng, kind, bridge, one_byte) for kind in kinds]
  ids = [index for part in parts for index in part[0]]
  if rng.random() < 0.7:
    ids.append(bridge.tokenizer.eos_token_id)
  return ids, b''.join(part[1] for part in parts)


def owners(pieces, data, tag):
  """How many tokens hold the bytes of the first such tag."""
  start = data.find(tag)
  if start < 0:
    return 0
  owner = [i for i, piece in enumerate(pieces) for _ in piece]
  return len(set(owner[start : start + len(tag)]))


def is_broken(data):
  try:
    data.decode()
  except UnicodeDecodeError:
    return True
  return False


def what_occurs(pieces, data, mask):
  """The kinds of adversity that a response really holds."""
  inside = [p for p, flag in zip(pieces, mask, strict=True) if flag]
  nested = rb'<answer>(?:(?!</answer>).)*<answer>'
  return {
    'malformed': oracle_span(data) is None,
    'answer': bool(oracle_actions(data)),
    'empty': oracle_actions(data) == [],
    'tag glued to a word': any(re.search(rb'\w</?|>\w', p) for p in pieces),
    'tag over many tokens': max(owners(pieces, data, t) for t in TAGS) > 3,
    'character over tokens': not is_broken(data)
    and any(map(is_broken, pieces)),
    'action character over tokens': any(map(is_broken, inside)),
    'unclosed': data.count(b'<answer>') > data.count(b'</answer>'),
    'nested': bool(re.search(nested, data, re.DOTALL)),
    'repeated': len(re.findall(rb'</think>\s*<answer>', data)) > 1,
    'upper-case': bool(re.search(rb'(?i)</?(think|answer)>', data))
    and len(re.findall(rb'(?i)</?(?:think|answer)>', data))
    > sum(map(data.count, TAGS)),
    'special inside': b'' in pieces[:-1],
    'bad utf-8': is_broken(data),
    'token shared with a tag': b'>' in b''.join(inside),
    'cut': bool(pieces) and pieces[-1] != b'',
  }


@pytest.mark.slow
def test_episodes_keep_ids_and_mark_spans_of_qwen(qwen):
  """Spans as the rules say, byte by byte, and not one sampled id changed."""
  rng = np.random.default_rng(3)
  lake = frozen_lake.FrozenLake()
  state, text = lake.load('SFFFFFFFFFFFG\nFFFFFFFFFFFFF')
  limits = games.Limits(turns=4, action_budget=99, context=10**6)
  game, ids = games.Game('lake', lake, limits), qwen.opening('a', 'b')[0]
  opening = episode_lib.Opening(game, state, text, tuple(ids), 0)
  one_byte = id_of_byte(qwen)
  seen = collections.Counter()
  for _ in range(2500):
    episode = episode_lib.Episode(qwen, opening)
    expected = list(episode.ids)
    while not episode.over:
      ids, data = random_response(rng, qwen, one_byte)
      pieces = chat_lib.token_bytes(qwen.tokenizer, ids)
      assert b''.join(pieces) == data
      mask = oracle_mask(pieces)
      prompt = episode.respond(ids, [0.0] * len(ids))
      expected += [*ids, *(prompt or [])]
      response = episode.turns[-1].response
      assert response.action == mask, pieces
      assert response.answer == oracle_answer(data), pieces
      seen.update(k for k, v in what_occurs(pieces, data, mask).items() if v)
      seen['responses'] += 1
    assert episode.ids == expected
    for turn in episode.turns:
      assert len(turn.response.action) == turn.stop - turn.start
  assert seen['responses'] == 10_000
  assert len(seen) == 16 and min(seen.values()) > 300, seen
  assert 3000 < seen['answer'] < 8000, seen
