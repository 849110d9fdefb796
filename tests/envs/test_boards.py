"""Boards from files: how they are cut, who gets which, what is refused."""

import copy

import pytest

from actfocus_jax.envs import (
  ENVS,
  boards,
  frozen_lake,
  players,
  sokoban,
  sudoku,
)

# Two levels in the symbols of public level files; the first is ragged.
LEVELS = """
; 0
  ####
###  #
#@$ .#
######

; 1 with a comment

#######
#+-$*-#
#######
"""
OURS = """
######
###__#
#PX_O#
######
"""


def test_a_file_is_cut_at_blank_lines_and_comments():
  first, second = boards.split(LEVELS)
  assert first.splitlines()[0] == '  ####' and len(first.splitlines()) == 4
  assert second.splitlines()[1] == '#+-$*-#'
  assert boards.split('12\n\n34\n; no\n56', lines=True) == ['12', '34', '56']
  assert boards.split('') == [] == boards.split('; nothing\n\n')


def test_public_symbols_are_ours():
  env = sokoban.Sokoban()
  first, second = boards.split(LEVELS)
  assert env.load(first)[0] == env.load(OURS)[0]
  assert env.load(first)[1] == OURS.strip()
  assert env.load(second)[1] == '#######\n#S_X√_#\n#######'


@pytest.mark.parametrize('board', ['#@$#', '@@.$', '@.$?', '$.'])
def test_a_public_level_must_be_whole(board):
  with pytest.raises(ValueError, match=r'room has one player|symbol'):
    sokoban.Sokoban().load(board)


def lakes(count):
  """Lakes of one row, told apart by their length."""
  return '\n\n'.join('S' + 'F' * i + 'G' for i in range(count))


def on_boards(tmp_path, text, env=None, held_out=range(5, 7)):
  path = tmp_path / 'boards.txt'
  path.write_text(text)
  env = env or frozen_lake.FrozenLake(success_probability=1.0)
  return boards.OnBoards.read(env, path, field='env.boards', held_out=held_out)


def length(env, seed):
  return env.reset(seed)[0].lake.cols - 2


def test_every_fourth_board_is_held_out(tmp_path):
  env = on_boards(tmp_path, lakes(8))
  assert [length(env, seed) for seed in (5, 6)] == [3, 7]
  trained = [length(env, seed) for seed in range(10_000, 10_006)]
  assert sorted(trained) == [0, 1, 2, 4, 5, 6]  # each once
  assert trained == [length(env, seed) for seed in range(10_006, 10_012)]


def test_a_board_that_comes_twice_counts_once(tmp_path):
  """Else evaluation would hold boards of training."""
  text = '\n\n'.join([lakes(4), lakes(8)])
  env = on_boards(tmp_path, text)
  trained = {length(env, seed) for seed in range(10_000, 10_006)}
  assert trained == {0, 1, 2, 4, 5, 6}
  assert {length(env, seed) for seed in (5, 6)} == {3, 7}


GAMES = {
  'frozen_lake': ['S' + 'F' * i + 'G' for i in range(1, 5)],
  'sokoban': ['#P' + '_' * i + 'XO#' for i in range(1, 5)],
  'sudoku': [
    '1234341221434320',
    '1234341221434301',
    '1234341221430321',
    '1234341221404321',
  ],
  'webshop': ['0', '1', '2', '3'],
}


@pytest.mark.parametrize('name', GAMES)
def test_players_play_boards_from_a_file(tmp_path, name):
  text = '\n\n'.join(GAMES[name])
  env = on_boards(tmp_path, text, ENVS[name](), range(5, 6))
  assert env.reset(5)[1] != env.reset(10_000)[1]
  for player in players.PLAYERS[name].values():
    assert 0 <= players.success_rate(env, player, range(5, 9)) <= 1
  with pytest.raises(AttributeError, match='nothing'):
    _ = env.nothing
  assert copy.deepcopy(env).train == env.train


def test_it_plays_like_its_environment(tmp_path):
  lake = frozen_lake.FrozenLake(success_probability=0.5)
  env = on_boards(tmp_path, lakes(8), lake)
  state, text = env.reset(10_001)
  assert (env.instructions, env.actions) == (lake.instructions, lake.actions)
  assert env.step(state, 'Right') == lake.step(state, 'Right')
  assert state.seed == 10_001 and text == lake.render(state)
  assert env.reset(10_001) == (state, text)


class Boardless:
  """Has no boards."""

  actions = ()
  instructions = ''


class Seedless(Boardless):
  """Its boards have no noise, and no argument for it."""

  def load(self, board):
    return board, board


@pytest.mark.parametrize(
  ('text', 'env', 'words'),
  [
    (lakes(7), None, ['7 boards', 'eval.prompts', '8 boards or more']),
    (lakes(8) + '\n\nSFX', None, ['board 9 is none']),
    ('', None, ['0 boards']),
    (lakes(8), Boardless(), ['no `load']),
    ('\n\n'.join([lakes(2)] * 4), None, ['of whose 2 different boards']),
    (lakes(8), Seedless(), ['board 1 is none', 'seed']),
    ('#P√_#', sokoban.Sokoban(), ['board 1 is none: it is solved already']),
    ('1234341221434321', sudoku.Sudoku(), ['solved already']),
  ],
)
def test_bad_files_are_refused(tmp_path, text, env, words):
  with pytest.raises(ValueError, match='env.boards') as error:
    on_boards(tmp_path, text, env)
  for word in words:
    assert word in str(error.value)
  assert '\n' not in str(error.value)


def test_a_missing_file_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r'env.boards is .*none.txt'):
    boards.OnBoards.read(
      frozen_lake.FrozenLake(),
      tmp_path / 'none.txt',
      field='env.boards',
      held_out=range(1),
    )
