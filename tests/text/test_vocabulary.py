"""Exact bytes of ids, against what the tokenizers library decodes itself."""

import copy

import numpy as np
import pytest
import tokenizers

from actfocus_jax.text import chat as chat_lib
from actfocus_jax.text import vocabulary

LEVEL, FALLBACK = ('qwen3', 'llama3'), ('llama2', 'mistral')
TEXTS = (
  *('State:\n__√P', ' You are', '  two  spaces ', 'Up || Left', '\n\n\t'),
  *('é', '😀', '\u3000', '한국', '<think>so</think>', '<answer>', '10', ' '),
  *('<0x41>', 'ĠĊ', '\x00\x7f', "I'm", '▁'),
)


def token_bytes(tokenizer, ids):
  return list(map(vocabulary.of(tokenizer).bytes_of, ids))


@pytest.fixture(scope='module')
def load(tokenizer_dir):
  """Loaded once per kind."""
  made = {}

  def run(kind):
    if kind not in made:
      made[kind] = chat_lib.load_tokenizer(tokenizer_dir(kind))
    return made[kind]

  return run


def random_ids(rng, tokenizer):
  """Ids of texts and ids drawn at random, which no encoder would give."""
  ids = []
  added = tokenizer.added_tokens_decoder
  special = [index for index, token in added.items() if token.special]
  for _ in range(rng.integers(1, 7)):
    text = TEXTS[rng.integers(len(TEXTS))]
    strays = rng.integers(0, len(tokenizer), rng.integers(0, 3)).tolist()
    encoded = tokenizer.encode(text, add_special_tokens=False)
    ids += encoded if rng.random() < 0.7 else strays
    ids += [rng.choice(special).item()] if rng.random() < 0.1 else []
  return ids


@pytest.mark.parametrize('kind', LEVEL + FALLBACK)
def test_bytes_of_random_ids_equal_the_librarys_decoding(kind, load):
  """The library's decoder gives only the text of all ids together."""
  tokenizer = load(kind)
  backend = tokenizer.backend_tokenizer
  rng = np.random.default_rng(0)
  # It strips one space from the front of a whole text; this protects it.
  (front,) = backend.encode('U', add_special_tokens=False).ids[-1:]
  seen = {'specials': 0, 'spread': 0, 'space first': 0, 'compared': 0}
  for _ in range(1500):
    ids = random_ids(rng, tokenizer)
    pieces = token_bytes(tokenizer, ids)
    assert len(pieces) == len(ids)
    data = b''.join(pieces)
    if kind in FALLBACK:
      # The library has its own rule for bytes that are not UTF-8.
      try:
        data.decode()
      except UnicodeDecodeError:
        continue
    text = backend.decode([front, *ids], skip_special_tokens=True)
    assert text == 'U' + data.decode(errors='replace'), ids
    seen['compared'] += 1
    seen['specials'] += b'' in pieces
    seen['spread'] += any(p and p[0] >= 0x80 and len(p) == 1 for p in pieces)
    seen['space first'] += data[:1] == b' '
  assert seen['compared'] > 750 and min(seen.values()) > 75, seen


@pytest.mark.parametrize(
  ('kind', 'token', 'data'),
  [
    ('llama3', 'Ġthink', b' think'),
    ('llama3', 'Ċ', b'\n'),
    ('llama3', 'é', b'\xe9'),
    ('llama3', '<|eot_id|>', b''),
    ('qwen3', '<think>', b'<think>'),
    ('llama2', '▁You', b' You'),
    ('mistral', '<0xE2>', b'\xe2'),
    ('mistral', '</s>', b''),
    ('llama2', 'ü', 'ü'.encode()),
  ],
)
def test_token_bytes_by_hand(kind, token, data, load):
  index = load(kind).get_vocab()[token]
  assert token_bytes(load(kind), [index]) == [data]


@pytest.mark.parametrize('kind', LEVEL + FALLBACK)
def test_every_byte_has_an_id(kind, load):
  tokenizer = load(kind)
  ids = range(len(tokenizer) + 3)
  pieces = token_bytes(tokenizer, ids)
  assert {p for p in pieces if len(p) == 1} == {bytes([b]) for b in range(256)}
  assert pieces[-3:] == [b''] * 3
  unseen = {i for i in ids[:-3] if not pieces[i]}
  added = tokenizer.added_tokens_decoder.items()
  assert unseen == {i for i, token in added if token.special}


@pytest.mark.parametrize('kind', LEVEL + FALLBACK)
def test_inside_encoder_drops_only_the_dummy_space(kind, load):
  encode = vocabulary.inside_encoder(load(kind))
  usual = load(kind).encode('Up 1', add_special_tokens=False)
  text = b''.join(token_bytes(load(kind), usual)).decode()
  adds = kind in ('llama2', 'mistral')
  assert text == (' Up 1' if adds else 'Up 1')
  assert vocabulary.of(load(kind)).adds_space == adds
  assert (encode('Up 1') == usual) != adds
  # U+2581 is a space to SentencePiece, so this is the same text to it.
  assert encode(text) == usual
  rng = np.random.default_rng(2)
  for _ in range(100):
    picks = rng.integers(len(TEXTS), size=5)
    text = ''.join(TEXTS[i] for i in picks).replace('▁', '')
    pieces = token_bytes(load(kind), encode(text))
    assert b''.join(pieces) == text.encode()


def test_inside_encoder_drops_a_byte_level_prefix_space(tokenizer_dir):
  def put_space(described):
    (to_bytes,) = described['pre_tokenizer']['pretokenizers'][1:]
    to_bytes['add_prefix_space'] = True

  directory = tokenizer_dir('llama3', edit=put_space)
  other = chat_lib.load_tokenizer(directory)
  usual = other.encode('Up1', add_special_tokens=False)
  assert token_bytes(other, usual)[0][:1] == b' '
  inside = vocabulary.inside_encoder(other)('Up1')
  assert b''.join(token_bytes(other, inside)) == b'Up1'


def test_token_added_later_has_bytes(load):
  other = copy.deepcopy(load('llama3'))
  size = len(other)
  assert token_bytes(other, [size]) == [b'']
  other.add_tokens(['later √'])
  assert token_bytes(other, [size]) == ['later √'.encode()]
  (index,) = other.encode('A', add_special_tokens=False)
  assert token_bytes(other, [index]) == [b'A']
  other.pad_token = 'A'
  assert token_bytes(other, [index]) == [b'']
  assert token_bytes(load('llama3'), [index, size]) == [b'A', b'']


# --- Directories -------------------------------------------------------------


def without_last_byte(described):
  vocab = described['model']['vocab']
  vocab['other'] = vocab.pop('<0xFF>')


def with_another_mark(described):
  described['decoder']['decoders'][0]['pattern'] = {'String': '_'}


def with_a_plain_token(described):
  described['model']['vocab']['a b'] = 900


def with_two_meanings(described):
  token = dict(described['added_tokens'][0], content='é', special=False)
  token['id'] = described['model']['vocab']['é']
  described['added_tokens'].append(token)


@pytest.mark.parametrize(
  ('kind', 'edit', 'words'),
  [
    ('llama2', without_last_byte, "its token '<0xFF>' is missing"),
    ('llama2', with_another_mark, 'nor has it byte fallback'),
    ('llama3', with_a_plain_token, "its token 'a b' stands for no exact bytes"),
    ('llama3', with_two_meanings, "its added token 'é' stands for no exact"),
  ],
)
def test_tokenizer_without_exact_bytes_is_refused(
  kind, edit, words, tokenizer_dir
):
  directory = tokenizer_dir(kind, edit=edit)
  with pytest.raises(ValueError) as refused:
    chat_lib.load_tokenizer(directory)
  message = str(refused.value)
  assert message.startswith(f'The tokenizer in {directory} cannot be used: ')
  assert words in message and "token '" in message
  assert message.count('. ') == 0 and message.endswith('.')


@pytest.mark.parametrize('kind', ['qwen3', 'mistral'])
def test_load_ignores_the_named_class(kind, tokenizer_dir):
  """Some classes rebuild the tokenizer and would encode differently."""
  directory = tokenizer_dir(kind, tokenizer_class='LlamaTokenizerFast')
  loaded = chat_lib.load_tokenizer(directory)
  file = tokenizers.Tokenizer.from_file(str(directory / 'tokenizer.json'))
  for text in TEXTS:
    text = f'Up {text}123456 I'
    ids = file.encode(text, add_special_tokens=False).ids
    assert loaded.encode(text, add_special_tokens=False) == ids


def test_load_reads_a_template_file(tokenizer_dir, templates):
  directory = tokenizer_dir('qwen3', '')
  with pytest.raises(ValueError, match='no chat_template'):
    chat_lib.load_tokenizer(directory)
  (directory / 'chat_template.jinja').write_text(templates['chatml'])
  loaded = chat_lib.load_tokenizer(str(directory))
  assert loaded.chat_template == templates['chatml']


def test_unreadable_directory_is_refused(tokenizer_dir):
  directory = tokenizer_dir('llama3')
  (directory / 'tokenizer.json').write_text('{"version": "1.')
  with pytest.raises(ValueError, match=f'{directory} cannot be read'):
    chat_lib.load_tokenizer(directory)
  (directory / 'tokenizer.json').unlink()
  with pytest.raises(ValueError, match='read: there is no tokenizer.json'):
    chat_lib.load_tokenizer(directory)


def test_matches_auto_tokenizer_sees_other_ids(tokenizer_dir):
  """For a Qwen directory it builds Qwen's tokenizer, whatever is described."""
  same = tokenizer_dir('qwen3')
  (same / 'config.json').write_text('{"model_type": "qwen3"}')
  assert vocabulary.matches_auto_tokenizer(same)
  other = tokenizer_dir('llama2')
  (other / 'config.json').write_text('{"model_type": "qwen2"}')
  assert not vocabulary.matches_auto_tokenizer(other)
