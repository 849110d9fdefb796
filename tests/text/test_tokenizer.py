"""The tokenizer that is trained on the environments' text."""

import itertools

from actfocus_jax.text import chat as chat_lib
from actfocus_jax.text import tokenizer as tokenizer_lib
from actfocus_jax.text import vocabulary

ACTIONS = ('Left', 'Down', 'Right', 'Up')
NAMES = ('kitchen', 'attic', 'cellar', 'library', 'garage')


def token_bytes(tokenizer, ids):
  return list(map(vocabulary.of(tokenizer).bytes_of, ids))


def pieces(tokenizer, text):
  ids = tokenizer.encode(text, add_special_tokens=False)
  assert tokenizer.decode(ids) == text
  return [tokenizer.decode([index]) for index in ids]


def test_saved_tokenizer_loads_as_the_same(tokenizer, tmp_path):
  tokenizer.save_pretrained(tmp_path)
  loaded = chat_lib.load_tokenizer(tmp_path)
  assert loaded.get_vocab() == tokenizer.get_vocab()
  assert loaded.chat_template == tokenizer.chat_template
  ours, theirs = chat_lib.Chat(tokenizer), chat_lib.Chat(loaded)
  assert (ours.stop_ids, ours.pad_id) == (theirs.stop_ids, theirs.pad_id)
  text = 'Turn 3:\n_#√POG  é\t<think>Up || Left</answer>  .'
  opening = ours.opening('rules', text)
  assert opening == theirs.opening('rules', text)
  assert ours.text(opening[0]) == theirs.text(opening[0])
  response = ours.respond('é', ['Up'])
  assert response == theirs.respond('é', ['Up'])
  assert ours.read(response) == theirs.read(response)


def test_digits_and_cells_are_single_tokens(tokenizer):
  # Repeated phrases are merged as far as they go; these must not be.
  assert '\nActions left: ' in pieces(tokenizer, '\nActions left: ')
  for text in ('2026', '____', '__OP', 'G_√X', '####', '10'):
    assert pieces(tokenizer, text) == list(text)
  board = 'Grid Map:\n__OP\nG___'
  assert pieces(tokenizer, board)[-9:] == list('__OP\nG___')


def test_actions_are_single_tokens(tokenizer):
  for first, second in itertools.product(ACTIONS, ACTIONS):
    text = f'.</think><answer>{first} || {second}</answer>'
    tail = ['</think>', '<answer>', first, ' || ', second, '</answer>']
    assert pieces(tokenizer, text)[1:] == tail


def test_any_text_round_trips(tokenizer):
  text = 'žluťoučký 😀\u2028 \x00 <|x|> <b> |||  \n\n\t~'
  ids = tokenizer.encode(text, add_special_tokens=False)
  assert b''.join(token_bytes(tokenizer, ids)).decode() == text


def test_vocab_size_is_a_limit():
  texts = [f'Walk from room {name} to the {name} door.' for name in NAMES]
  small = tokenizer_lib.train(texts, vocab_size=270)
  assert small.vocab_size == 270
  large = tokenizer_lib.train(texts, vocab_size=9999)
  assert 270 < large.vocab_size < 9999
