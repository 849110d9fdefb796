"""Boards from files: how they are cut, who gets which, what is refused."""

import copy

import pytest

from actfocus_jax.envs import ENVS, boards, frozen_lake, sokoban, sudoku
from actfocus_jax.rollout import env_pool
from actfocus_jax.warmstart import players

POOL, TURNS = env_pool.EnvPool(), dict(turns=5, max_actions=2, budget=10)

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


def test_file_is_cut_at_blank_lines_and_comments():
  first, second = boards.split(LEVELS)
  assert (first.line, second.line) == (3, 10)
  first, second = first.text.splitlines(), second.text.splitlines()
  assert first[0] == '  ####' and len(first) == 4
  assert second[1] == '#+-$*-#'
  lines = boards.split('12\n\n34\n; no\n56\n78', lines=True)
  assert lines == [(1, '12'), (3, '34'), (5, '56'), (6, '78')]
  assert boards.split('') == [] == boards.split('; nothing\n\n')


def test_sudoku_may_be_written_row_by_row(tmp_path):
  env = sudoku.Sudoku()
  line, other = '1234341221434320', '1234341221434301'
  rows, spaced = '1234\n3412\n2143\n0321', '1 2 3 4\n3412\n2143\n4021'
  text = f'{line}\n{other}\n\n{rows}\n; so\n{spaced}'
  written = boards.split(f'{text}\n\n12', lines=env.boards_are_lines)
  assert written == [(1, line), (2, other), (4, rows), (9, spaced), (14, '12')]
  played = on_boards(tmp_path, text, env, range(5, 6))
  assert played.reset(5)[0] == env.load('1234341221434021')[0]
  assert len(played.train) == 3


def test_public_sokoban_symbols_are_translated():
  env = sokoban.Sokoban()
  first, second = boards.split(LEVELS)
  assert env.load(first.text)[0] == env.load(OURS)[0]
  assert env.load(first.text)[1] == OURS.strip()
  assert env.load(second.text)[1] == '#######\n#S_X√_#\n#######'


def lakes(count):
  """Lakes of one row, each of another length."""
  return '\n\n'.join('S' + 'F' * i + 'G' for i in range(count))


def on_boards(tmp_path, text, env=None, held_out=range(5, 7)):
  path = tmp_path / 'boards.txt'
  path.write_text(text)
  env = env or frozen_lake.FrozenLake(success_probability=1.0)
  return boards.OnBoards.read(env, path, field='env.boards', held_out=held_out)


def length(env, seed):
  return env.reset(seed)[0].lake.cols - 2


def test_every_fourth_different_board_is_held_out(tmp_path):
  env = on_boards(tmp_path, '\n\n'.join([lakes(4), lakes(8)]))
  assert [length(env, seed) for seed in (5, 6)] == [3, 7]
  trained = [length(env, seed) for seed in range(10_000, 10_006)]
  assert sorted(trained) == [0, 1, 2, 4, 5, 6]  # each once
  assert trained == [length(env, seed) for seed in range(10_006, 10_012)]


SOLVED = '1234341221434321'
GAMES = {
  'frozen_lake': ['S' + 'F' * i + 'G' for i in range(1, 5)],
  'sokoban': ['#P' + '_' * i + 'XO#' for i in range(1, 5)],
  'sudoku': [SOLVED[:i] + '0' + SOLVED[i + 1 :] for i in range(4)],
  'webshop': ['0', '1', '2', '3'],
}


@pytest.mark.parametrize('name', GAMES)
def test_every_environment_plays_boards_from_a_file(tmp_path, name):
  text = '\n\n'.join(GAMES[name])
  env = on_boards(tmp_path, text, ENVS[name](), range(5, 6))
  assert env.reset(5)[1] != env.reset(10_000)[1]
  for player in players.PLAYERS[name].values():
    solved = players.play(env, player, range(5, 9), pool=POOL, **TURNS)
    assert {*solved} <= {True, False}
  with pytest.raises(AttributeError, match='nothing'):
    _ = env.nothing
  assert copy.deepcopy(env).train == env.train


def test_episode_is_that_of_the_environment(tmp_path):
  lake = frozen_lake.FrozenLake(success_probability=0.5)
  env = on_boards(tmp_path, lakes(8), lake)
  state, text = env.reset(10_001)
  assert (env.instructions, env.actions) == (lake.instructions, lake.actions)
  assert env.step(state, 'Right') == lake.step(state, 'Right')
  assert state.seed == 10_001 and text == lake.render(state)
  assert env.reset(10_001) == (state, text)


class Failing:
  """Its `load` is broken."""

  instructions, actions = '', ()

  def load(self, board, *, seed=0):
    raise KeyError(board)


@pytest.mark.parametrize(
  ('text', 'env', 'words'),
  [
    (lakes(7), None, ['7 boards', 'eval.prompts', '8 boards or more']),
    (
      lakes(8) + '\n\nSFX',
      None,
      ['board 9 (line 17) is not a board', 'begin with `;`'],
    ),
    ('SG\n\nSF\nHG\n\nSH\nHG', None, ['board 3 (line 6) cannot be solved']),
    ('#P_XO#\n\n#P_OX#', sokoban.Sokoban(), ['board 2 (line 3) cannot be']),
    ('\n\n'.join([lakes(2)] * 4), None, ['of whose 2 different boards']),
    (lakes(8), Failing(), ['the environment failed: KeyError:']),
    ('#P√_#', sokoban.Sokoban(), ['board 1 (line 1) is solved already']),
  ],
)
def test_bad_file_is_refused_in_one_sentence(tmp_path, text, env, words):
  with pytest.raises(ValueError, match='env.boards') as error:
    on_boards(tmp_path, text, env)
  for word in words:
    assert word in str(error.value)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(('count', 'held_out'), [(3, 0), (8, 3)])
def test_few_boards_are_enough_to_play_by_hand(tmp_path, count, held_out):
  path = tmp_path / 'boards.txt'
  path.write_text(lakes(count))
  options = dict(field='env.boards', held_out=range(5, 37), few=True)
  env = boards.OnBoards.read(frozen_lake.FrozenLake(), path, **options)
  assert length(env, 5) == held_out
  assert max(length(env, seed) for seed in (36, 37, 10_000)) < count
