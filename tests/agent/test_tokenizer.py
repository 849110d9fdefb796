"""The tokenizer that is trained on demonstrations, and these themselves."""

import dataclasses

import pytest
from trajectory_check import check_trajectory

from actfocus_jax.envs import sokoban
from actfocus_jax.rollout import episode, games
from actfocus_jax.text import chat as chat_lib
from actfocus_jax.text import tokenizer as tokenizer_lib
from actfocus_jax.warmstart import demonstrations, players

LIMITS = games.Limits(response_tokens=60, context=900)
PLAYER = players.frozen_lake.FrozenLakeCareless()


def cast(env, player=None, limits=LIMITS):
  """One game and who plays it."""
  return [(games.Game('it', env, limits), player or PLAYER)]


def pieces(tokenizer, text):
  ids = tokenizer.encode(text, add_special_tokens=False)
  assert tokenizer.decode(ids) == text
  return [tokenizer.decode([index]) for index in ids]


def test_loaded_through_transformers_it_is_the_same(tokenizer, tmp_path):
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


@pytest.mark.parametrize('first', ['Left', 'Down', 'Right', 'Up'])
@pytest.mark.parametrize('second', ['Left', 'Down', 'Right', 'Up'])
def test_actions_are_tokens_of_their_own(tokenizer, first, second):
  text = f'.</think><answer>{first} || {second}</answer>'
  tail = ['</think>', '<answer>', first, ' || ', second, '</answer>']
  assert pieces(tokenizer, text)[1:] == tail


def test_any_text_survives(tokenizer):
  text = 'žluťoučký 😀\u2028 \x00 <|x|> <b> |||  \n\n\t~'
  ids = tokenizer.encode(text, add_special_tokens=False)
  assert b''.join(chat_lib.token_bytes(tokenizer, ids)).decode() == text


def test_vocabulary_has_its_limit(lake):
  small = demonstrations.train_tokenizer(cast(lake), range(9), 300)
  assert small.vocab_size == 300
  large = demonstrations.train_tokenizer(cast(lake), range(9), 9999)
  assert 300 < large.vocab_size < 9999


def test_split_markup_by_hand():
  text = '<|im_start|>user\nO_<|im_end|>\n<|im_start|>x<|endoftext|>'
  assert tokenizer_lib.split_markup(text) == ['user\nO_', '\n', 'x']


def test_a_directory_without_template_is_refused(tokenizer, tmp_path):
  tokenizer.save_pretrained(tmp_path)
  for path in tmp_path.glob('chat_template*'):
    path.unlink()
  with pytest.raises(ValueError, match='no chat_template'):
    chat_lib.load_tokenizer(tmp_path)


def test_demonstrations_are_rollouts_that_nobody_sampled(chat, lake):
  played = demonstrations.play(chat, cast(lake), range(6))
  batch = episode.to_trajectory(played, [0] * 6, length=900, pad=chat.pad_id)
  check_trajectory(batch)
  assert not batch.logprob.any() and batch.action.any()
  for one in played:
    assert one.over and one.episode_return >= 0.0  # No format penalty.
    for turn in one.turns:
      assert one.ids[turn.stop - 1] in chat.stop_ids
      assert 1 <= len(turn.response.answer) <= 2
  again = demonstrations.play(chat, cast(lake), range(6))
  assert [one.ids for one in again] == [one.ids for one in played]
  assert len({tuple(one.ids) for one in played}) == 6


def test_demonstrations_of_sokoban():
  rooms = cast(sokoban.Sokoban(), players.sokoban.SokobanCareless())
  made = demonstrations.train_tokenizer(rooms, range(4), 500)
  assert pieces(made, '#_XO√PS') == list('#_XO√PS')
  chat = chat_lib.Chat(made)
  (one,) = demonstrations.play(chat, rooms, [8])
  assert one.over and one.turns[0].response.answer


def test_too_short_a_limit_is_refused(chat, lake):
  short = dataclasses.replace(LIMITS, response_tokens=4)
  with pytest.raises(ValueError, match='response_tokens is 4'):
    demonstrations.play(chat, cast(lake, limits=short), [0])


def test_the_context_ends_a_demonstration(chat, lake):
  whole = demonstrations.play(chat, cast(lake), range(8))
  longest = max(whole, key=lambda one: len(one.turns))
  assert len(longest.turns) > 1
  # Room for the second prompt and for no more than a token of the answer.
  context = longest.turns[1].start + 1
  tight = dataclasses.replace(LIMITS, context=context)
  seed = whole.index(longest)
  (one,) = demonstrations.play(chat, cast(lake, limits=tight), [seed])
  assert len(one.turns) == 1 and len(one.ids) <= context
