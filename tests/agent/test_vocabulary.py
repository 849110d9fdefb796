"""Exact bytes of ids, against what the tokenizers library decodes itself."""

import copy

import numpy as np
import pytest
import tokenizers

from actfocus_jax.text import chat as chat_lib
from actfocus_jax.text import vocabulary

LEVEL, FALLBACK = ('qwen3', 'llama3'), ('legacy', 'metaspace', 'gemma')
TEXTS = (
  *('State:\n__√P', ' You are', '  two  spaces ', 'Up || Left', '\n\n\t'),
  *('é', '😀', '\u3000', '한국', '<think>so</think>', '<answer>', '10', ' '),
  *('<0x41>', 'ĠĊ', '\x00\x7f', "I'm", '▁'),
)


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
def test_three_thousand_random_sequences_of_ids(kind, load):
  """The library's decoder knows no ids: what it says is text of them all."""
  tokenizer = load(kind)
  backend = tokenizer.backend_tokenizer
  rng = np.random.default_rng(0)
  # It takes one space from the front of a whole text; this keeps it away.
  (front,) = backend.encode('U', add_special_tokens=False).ids[-1:]
  seen = {'specials': 0, 'spread': 0, 'space first': 0, 'compared': 0}
  for _ in range(3000):
    ids = random_ids(rng, tokenizer)
    pieces = chat_lib.token_bytes(tokenizer, ids)
    assert len(pieces) == len(ids)
    data = b''.join(pieces)
    if kind in FALLBACK:
      # What is no UTF-8 the library replaces by a rule of its own.
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
  assert seen['compared'] > 1500 and min(seen.values()) > 150, seen


@pytest.mark.parametrize('name', ['tokenizer', 'qwen'])
def test_tokenizers_from_elsewhere(name, request):
  """The project's own, and Qwen2.5's where it is."""
  tokenizer = request.getfixturevalue(name)
  tokenizer = getattr(tokenizer, 'tokenizer', tokenizer)
  backend = tokenizer.backend_tokenizer
  rng = np.random.default_rng(1)
  for _ in range(1000):
    ids = rng.integers(0, len(tokenizer), 20).tolist()
    ids += tokenizer.encode(TEXTS[rng.integers(len(TEXTS))])
    data = b''.join(chat_lib.token_bytes(tokenizer, ids))
    assert backend.decode(ids) == data.decode(errors='replace')


@pytest.mark.parametrize(
  ('kind', 'token', 'data'),
  [
    ('llama3', 'Ġthink', b' think'),
    ('llama3', 'Ċ', b'\n'),
    ('llama3', 'Ń', b'\xad'),
    ('llama3', 'é', b'\xe9'),
    ('llama3', '<|eot_id|>', b''),
    ('llama3', '<|begin_of_text|>', b''),
    ('qwen3', '<think>', b'<think>'),
    ('qwen3', '</think>', b'</think>'),
    ('legacy', '▁', b' '),
    ('legacy', '▁You', b' You'),
    ('metaspace', '<0x0A>', b'\n'),
    ('metaspace', '<0xE2>', b'\xe2'),
    ('metaspace', '</s>', b''),
    ('gemma', '<unk>', b''),
    ('gemma', '<end_of_turn>', b''),
    ('gemma', 'ü', 'ü'.encode()),
  ],
)
def test_golden_bytes(kind, token, data, load):
  index = load(kind).get_vocab()[token]
  assert chat_lib.token_bytes(load(kind), [index]) == [data]


@pytest.mark.parametrize('kind', LEVEL + FALLBACK)
def test_every_byte_has_an_id_and_padding_has_none(kind, load):
  tokenizer = load(kind)
  ids = range(len(tokenizer) + 3)
  pieces = chat_lib.token_bytes(tokenizer, ids)
  assert {p for p in pieces if len(p) == 1} == {bytes([b]) for b in range(256)}
  assert pieces[-3:] == [b''] * 3
  unseen = [
    tokenizer.convert_ids_to_tokens(i) for i in ids[:-3] if not pieces[i]
  ]
  added = tokenizer.added_tokens_decoder.values()
  assert sorted(unseen) == sorted(t.content for t in added if t.special)


@pytest.mark.parametrize('kind', LEVEL + FALLBACK)
def test_encoded_text_is_its_bytes(kind, load):
  """Without the dummy space that SentencePiece puts before a text."""
  encode = vocabulary.inside_encoder(load(kind))
  rng = np.random.default_rng(2)
  for _ in range(300):
    picks = rng.integers(len(TEXTS), size=5)
    text = ''.join(TEXTS[i] for i in picks).replace('▁', '')
    pieces = chat_lib.token_bytes(load(kind), encode(text))
    assert b''.join(pieces) == text.encode()


@pytest.mark.parametrize('kind', LEVEL + FALLBACK)
def test_the_dummy_space_is_the_only_difference(kind, load):
  encode = vocabulary.inside_encoder(load(kind))
  usual = load(kind).encode('Up 1', add_special_tokens=False)
  text = b''.join(chat_lib.token_bytes(load(kind), usual)).decode()
  adds = kind in ('legacy', 'metaspace')
  assert text == (' Up 1' if adds else 'Up 1')
  assert vocabulary.of(load(kind)).adds_space == adds
  assert (encode('Up 1') == usual) != adds
  # U+2581 is a space to SentencePiece, so this is the same text to it.
  assert encode(text) == usual


def with_a_space_in_front(described):
  (to_bytes,) = described['pre_tokenizer']['pretokenizers'][1:]
  to_bytes['add_prefix_space'] = True


def test_a_byte_level_tokenizer_that_adds_a_space(tokenizer_dir):
  directory = tokenizer_dir('llama3', edit=with_a_space_in_front)
  other = chat_lib.load_tokenizer(directory)
  usual = other.encode('Up1', add_special_tokens=False)
  assert chat_lib.token_bytes(other, usual)[0][:1] == b' '
  inside = vocabulary.inside_encoder(other)('Up1')
  assert b''.join(chat_lib.token_bytes(other, inside)) == b'Up1'


def test_an_added_token_with_marks_is_spaces(load):
  other = copy.deepcopy(load('gemma'))
  other.add_tokens([tokenizers.AddedToken('▁▁▁', normalized=False)])
  (index,) = other.convert_tokens_to_ids(['▁▁▁'])
  assert chat_lib.token_bytes(other, [index]) == [b'   ']


def test_text_shows_special_tokens_and_keeps_spaces(load):
  ids = load('legacy').convert_tokens_to_ids(['<s>', '▁You', '<0xE2>', '</s>'])
  assert vocabulary.of(load('legacy')).text(ids) == '<s> You\ufffd</s>'
  assert vocabulary.of(load('legacy')).text([*ids[1:2], 10**6]) == ' You'


# --- The table ---------------------------------------------------------------


def test_the_table_is_made_once(load, monkeypatch):
  table = vocabulary.of(load('llama3'))
  monkeypatch.setattr(vocabulary, '_vocabulary', None)  # Cannot be called.
  assert vocabulary.of(load('llama3')) is table
  assert chat_lib.token_bytes(load('llama3'), [65]) == [table.pieces[65]]


def test_a_later_token_is_in_the_table(load):
  other = copy.deepcopy(load('llama3'))
  size = len(other)
  assert chat_lib.token_bytes(other, [size]) == [b'']
  other.add_tokens(['later √'])
  assert chat_lib.token_bytes(other, [size]) == ['later √'.encode()]
  (index,) = other.encode('A', add_special_tokens=False)
  assert chat_lib.token_bytes(other, [index]) == [b'A']
  other.pad_token = 'A'
  assert chat_lib.token_bytes(other, [index]) == [b'']
  assert chat_lib.token_bytes(load('llama3'), [index, size]) == [b'A', b'']


# --- Directories -------------------------------------------------------------


def without_last_byte(described):
  vocab = described['model']['vocab']
  vocab['other'] = vocab.pop('<0xFF>')


def without_fallback(described):
  described['model']['byte_fallback'] = False


def with_another_mark(described):
  described['decoder']['decoders'][0]['pattern'] = {'String': '_'}


def with_another_step(described):
  step = {'type': 'BPEDecoder', 'suffix': '</w>'}
  described['decoder']['decoders'].append(step)


def with_a_word_end(described):
  described['model']['end_of_word_suffix'] = '</w>'


def of_whole_words(described):
  vocab = described['model']['vocab']
  described['model'] = {'type': 'WordLevel', 'vocab': vocab, 'unk_token': 'a'}


def with_a_plain_token(described):
  described['model']['vocab']['a b'] = 900


def with_two_meanings(described):
  token = dict(described['added_tokens'][0], content='é', special=False)
  token['id'] = described['model']['vocab']['é']
  described['added_tokens'].append(token)


def without_decoder(described):
  described['decoder'] = None


@pytest.mark.parametrize(
  ('kind', 'edit', 'words'),
  [
    ('wordpiece', None, 'neither byte-level BPE nor has it byte fallback'),
    ('unigram', None, 'neither byte-level BPE nor has it byte fallback'),
    ('legacy', without_last_byte, "its token '<0xFF>' is missing"),
    ('legacy', without_fallback, "its token '<0x00>' is missing or never used"),
    ('legacy', with_another_mark, 'nor has it byte fallback'),
    ('legacy', with_another_step, 'nor has it byte fallback'),
    ('metaspace', without_decoder, 'nor has it byte fallback'),
    ('llama3', with_a_word_end, 'neither byte-level BPE'),
    ('llama3', of_whole_words, 'neither byte-level BPE'),
    ('llama3', with_a_plain_token, "its token 'a b' stands for no exact bytes"),
    ('llama3', with_two_meanings, "its added token 'é' stands for no exact"),
  ],
)
def test_ids_without_exact_bytes_are_refused(kind, edit, words, tokenizer_dir):
  directory = tokenizer_dir(kind, edit=edit)
  with pytest.raises(ValueError) as refused:
    chat_lib.load_tokenizer(directory)
  message = str(refused.value)
  assert message.startswith(f'The tokenizer in {directory} cannot be used: ')
  assert words in message and "token '" in message
  assert message.count('. ') == 0 and message.endswith('.')


@pytest.mark.parametrize('kind', LEVEL + FALLBACK)
@pytest.mark.parametrize('named', ['LlamaTokenizerFast', 'Qwen2Tokenizer'])
def test_the_file_counts_and_not_the_class(kind, named, tokenizer_dir):
  """Classes that build the tokenizer anew would encode in another way."""
  directory = tokenizer_dir(kind, tokenizer_class=named)
  loaded = chat_lib.load_tokenizer(directory)
  file = tokenizers.Tokenizer.from_file(str(directory / 'tokenizer.json'))
  for text in TEXTS:
    text = f'Up {text}123456 I'
    ids = file.encode(text, add_special_tokens=False).ids
    assert loaded.encode(text, add_special_tokens=False) == ids


def test_a_template_in_a_file_of_its_own(tokenizer_dir, templates):
  directory = tokenizer_dir('qwen3', '')
  with pytest.raises(ValueError, match='no chat_template'):
    chat_lib.load_tokenizer(directory)
  (directory / 'chat_template.jinja').write_text(templates['chatml'])
  loaded = chat_lib.load_tokenizer(str(directory))
  assert loaded.chat_template == templates['chatml']


@pytest.mark.parametrize('torn', [None, '{"version": "1.', '{}'])
def test_a_directory_that_cannot_be_read(torn, tokenizer_dir):
  directory = tokenizer_dir('llama3')
  (directory / 'tokenizer.json').unlink()
  if torn is not None:
    (directory / 'tokenizer.json').write_text(torn)
  with pytest.raises(ValueError, match='cannot be read') as refused:
    chat_lib.load_tokenizer(directory)
  assert str(directory) in str(refused.value)
  says_why = 'there is no tokenizer.json' in str(refused.value)
  assert says_why == (torn is None)


def test_auto_tokenizer_may_read_other_ids(tokenizer_dir):
  """For a Qwen directory it builds Qwen's tokenizer, whatever is described."""
  same = tokenizer_dir('qwen3')
  (same / 'config.json').write_text('{"model_type": "qwen3"}')
  assert vocabulary.reads_alike(same)
  other = tokenizer_dir('legacy')
  (other / 'config.json').write_text('{"model_type": "qwen2"}')
  assert not vocabulary.reads_alike(other)
