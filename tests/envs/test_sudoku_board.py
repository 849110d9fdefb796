"""Sudoku boards, against every 4x4 grid there is, found by brute force."""

import functools
import itertools

import numpy as np
import pytest

from actfocus_jax.envs import sudoku_board

EASY = '1200 3410 2143 4321'
# One of the few with 22 given numbers: none can be left out.
MINIMAL = (
  '800070000100000023000009000780000509000030800450200000'
  '000080400000046007000903000'
)
MINIMAL_SOLUTION = (
  '825371964149865723367429185782614539916537842453298671'
  '531782496298146357674953218'
)


def cells_of(text):
  return tuple(int(digit) for digit in text if digit != ' ')


def obeys_the_rules(cells, size):
  """Return whether every unit of a full board has all numbers."""
  box = {4: 2, 9: 3}[size]
  board = np.reshape(cells, (size, size))
  starts = range(0, size, box)
  parts = [*board, *board.T]
  parts += [
    board[r : r + box, c : c + box].ravel() for r in starts for c in starts
  ]
  return all(sorted(part) == list(range(1, size + 1)) for part in parts)


@functools.cache
def grids():
  """All 4x4 grids, from all rows of all permutations."""
  rows = list(itertools.permutations(range(1, 5)))
  pairs = [
    (a, b)
    for a, b in itertools.product(rows, repeat=2)
    if len({*a[:2], *b[:2]}) == len({*a[2:], *b[2:]}) == 4
  ]
  whole = (
    sum((*top, *bottom), ())
    for top, bottom in itertools.product(pairs, repeat=2)
  )
  return np.array([grid for grid in whole if obeys_the_rules(grid, 4)])


def agreeing(cells):
  """The grids that have the numbers of a board, by looking at them all."""
  cells = np.array(cells)
  return grids()[np.all((cells == 0) | (cells == grids()), axis=1)]


def test_completions_of_the_empty_board_are_all_grids():
  assert len(grids()) == 288
  found = list(sudoku_board.completions((0,) * 16))
  assert sorted(found) == sorted(map(tuple, grids().tolist()))


def random_board(rng, filled):
  """Numbers of a grid in some cells, one of them now and then changed."""
  cells = np.where(rng.permutation(16) < filled, grids()[rng.integers(288)], 0)
  if rng.random() < 0.5:
    cells[rng.integers(16)] = rng.integers(0, 5)
  return tuple(cells.tolist())


def test_completions_match_brute_force():
  rng = np.random.default_rng(0)
  counts = []
  for _ in range(400):
    cells = random_board(rng, rng.integers(0, 15))
    expected = sorted(map(tuple, agreeing(cells).tolist()))
    assert sorted(sudoku_board.completions(cells)) == expected
    shuffled = sudoku_board.completions(cells, np.random.default_rng(1))
    assert sorted(shuffled) == expected
    counts.append(len(expected))
  assert counts.count(0) > 30 and counts.count(1) > 30 and max(counts) > 10


def solutions(cells, most):
  """Number of completions, counted up to `most`."""
  return sum(1 for _ in itertools.islice(sudoku_board.completions(cells), most))


def test_hard_board_has_one_solution():
  cells = cells_of(MINIMAL)
  assert list(sudoku_board.completions(cells)) == [cells_of(MINIMAL_SOLUTION)]
  assert obeys_the_rules(cells_of(MINIMAL_SOLUTION), 9)
  for index in np.flatnonzero(cells)[:5]:
    fewer = (*cells[:index], 0, *cells[index + 1 :])
    assert solutions(fewer, most=2) == 2


def test_search_gives_up_after_its_steps(monkeypatch):
  monkeypatch.setattr(sudoku_board, '_MAX_SEARCH', 82)
  assert next(sudoku_board.completions((0,) * 81))
  monkeypatch.setattr(sudoku_board, '_MAX_SEARCH', 81)
  with pytest.raises(sudoku_board.TooHard, match='81 steps'):
    next(sudoku_board.completions((0,) * 81))
  with pytest.raises(ValueError, match='too hard .* add / and the solution'):
    sudoku_board.parse('0' * 81, 9)
  assert sudoku_board.parse(f'{"0" * 81}/{MINIMAL_SOLUTION}', 9)


def test_conflicts_and_valid_numbers_by_hand():
  cells = cells_of('1200 0030 0000 0004')
  at = functools.partial(sudoku_board.conflict, cells)
  assert [at(2, 1), at(15, 3), at(4, 2)] == ['row', None, 'box']
  assert [at(12, 1), at(3, 4), at(2, 4)] == ['column', 'column', None]
  # The number itself is no conflict.
  assert at(0, 1) is None
  valid = [sudoku_board.valid_numbers(cells, index) for index in (0, 2, 4, 9)]
  assert valid == [[1, 3, 4], [4], [4], [1, 3, 4]]
  assert sudoku_board.empty_cells(cells)[:3] == [2, 3, 4]


# --- Generated boards --------------------------------------------------------


def generate(seed, size=4, blanks=6):
  rng = np.random.default_rng(seed)
  return sudoku_board.generate(rng, size=size, blanks=blanks)


@pytest.mark.parametrize('size, blanks', [(4, 6), (4, 16), (9, 30)])
def test_generated_boards_obey_the_rules(size, blanks):
  puzzles = [generate(seed, size, blanks) for seed in range(20)]
  assert len(set(puzzles)) > 15
  for seed, puzzle in enumerate(puzzles):
    assert obeys_the_rules(puzzle.solution, size)
    assert puzzle.given.count(0) == blanks
    pairs = zip(puzzle.given, puzzle.solution, strict=True)
    assert all(given in (0, value) for given, value in pairs)
    assert puzzle == generate(seed, size, blanks)
    assert {type(value) for value in (*puzzle.given, *puzzle.solution)} == {int}


# --- Boards as text ----------------------------------------------------------


@pytest.mark.parametrize(
  'text',
  [
    '1200341021434321',
    ' \t1 2 . 0\r\n3 4 1 .\n\n2143\n4321',
    '12.. 341. 2143 4321 / 1234 3412 2143 4321',
  ],
)
def test_parse_reads_digits_and_dots(text):
  puzzle = sudoku_board.parse(text, 4)
  assert puzzle.given == cells_of(EASY)
  assert puzzle.solution == cells_of('1234 3412 2143 4321')


BAD_BOARDS = {
  '120034102143432': 'a 4x4 board has 16 cells, got 15',
  EASY.replace('4', '5'): r"unknown symbols \['5'\]; .* has 0 to 4 and \.",
  EASY.replace('3', '³'): 'unknown symbols',
  '0000 0000 0030 0003': r'board has 3 twice in the box of \(3,3\)',
  '1203 0040 0000 0000': 'the board cannot be solved',
  f'{EASY}/{EASY}': 'the solution of the board has empty cells',
  f'{EASY}/1234 3412 2143 4322': 'solution of the board has 2 twice in the',
  f'{EASY}/1243 3421 2134 4312': r'gives 1 in \(2,3\), its solution has 2',
  f'{EASY}/1234 3412 2143 4321/': 'a board has at most one /, got 2',
}


@pytest.mark.parametrize('text', BAD_BOARDS)
def test_parse_refuses_bad_boards(text):
  with pytest.raises(ValueError, match=BAD_BOARDS[text]) as caught:
    sudoku_board.parse(text, 4)
  assert len(str(caught.value)) < 120 and '\n' not in str(caught.value)
