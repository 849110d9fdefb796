"""Boards out of a file in the place of an environment's own generator.

One file holds many boards, in the form that the environment's `load` reads:

- a board of several lines: blank lines and lines that begin with `;` stand
  between boards (the public Boxoban format of Sokoban levels);
- a board of one line: every line is one (Sudoku), if the environment's
  `boards_are_lines` says so.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

from actfocus_jax.envs import base

# One board in so many is held out for evaluation.
_HOLD_OUT = 4


@dataclasses.dataclass(frozen=True)
class OnBoards:
  """An environment whose boards come from a file.

  Every fourth board is held out: those are what evaluation's seeds mean, one
  after the other. All other seeds go through the rest, one after the other; a
  run on this environment alone takes each once before any comes again. A board
  that stands in the file twice counts once. Other attributes are those of the
  environment.

  Attributes:
    env: What is played; it has `load(board, seed=...)`.
    train: Boards of all seeds but those of evaluation.
    test: Boards of evaluation.
    held_out: Seeds of evaluation.
  """

  env: base.Environment
  train: tuple[str, ...]
  test: tuple[str, ...]
  held_out: range

  @classmethod
  def read(
    cls, env, path: pathlib.Path, *, field: str, held_out: range
  ) -> 'OnBoards':
    """Reads and checks every board.

    Args:
      env: What is played; boards that its `is_solved(state)` says are
        solved are refused.
      path: The file.
      field: The name it was given by.
      held_out: Seeds of evaluation.

    Returns:
      The environment.

    Raises:
      ValueError: The file cannot be read, a board is none, or there are too
        few of them.
    """
    if not hasattr(env, 'load'):
      raise ValueError(
        f'{field} is {str(path)!r}, but the environment has no '
        "`load(board, seed=...)`; allowed: ''."
      )
    try:
      text = path.read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as error:
      raise ValueError(f'{field} is {str(path)!r}: {error}.') from error
    written = split(text, lines=getattr(env, 'boards_are_lines', False))
    different: dict[str, str] = {}  # by the text that the model would see
    for number, board in enumerate(written, 1):
      try:
        state, seen = env.load(board, seed=0)
        if getattr(env, 'is_solved', lambda _: False)(state):
          raise ValueError('it is solved already')
      except (ValueError, TypeError) as error:
        raise ValueError(
          f'{field} is {str(path)!r}, whose board {number} is none: {error}'
        ) from error
      different.setdefault(seen, board)
    boards = [*different.values()]
    train = tuple(b for i, b in enumerate(boards) if (i + 1) % _HOLD_OUT)
    test = tuple(boards[_HOLD_OUT - 1 :: _HOLD_OUT])
    if len(test) < len(held_out):
      raise ValueError(
        f'{field} is {str(path)!r}, of whose {len(boards)} '
        f'{"different " * (len(boards) < len(written))}boards every fourth '
        f'is held out, which is too few for {len(held_out)} boards of '
        f'eval.prompts; allowed: {_HOLD_OUT * len(held_out)} boards or more.'
      )
    return cls(env, train, test, held_out)

  @property
  def instructions(self) -> str:
    """Of the environment."""
    return self.env.instructions

  @property
  def actions(self) -> tuple[str, ...]:
    """Of the environment."""
    return self.env.actions

  def __getattr__(self, name: str):
    if name == 'env' or name.startswith('__'):  # Asked for before it is there.
      raise AttributeError(name)
    return getattr(self.env, name)

  def reset(self, seed: int) -> tuple[base.State, str]:
    """The board of a seed, and its text."""
    if seed in self.held_out:
      board = self.test[seed - self.held_out.start]
    else:
      board = self.train[seed % len(self.train)]
    return self.env.load(board, seed=seed)

  def step(
    self, state: base.State, action: str
  ) -> tuple[base.State, base.Step]:
    """One action, of the environment."""
    return self.env.step(state, action)


def split(text: str, *, lines: bool = False) -> Sequence[str]:
  """Cuts a file into boards.

  Args:
    text: Of the file.
    lines: Whether every line is a board; else blank lines and lines that begin
      with `;` stand between them.

  Returns:
    The boards.
  """
  boards, board = [], []
  for line in [*text.splitlines(), '']:
    is_between = not line.strip() or line.lstrip().startswith(';')
    if not is_between:
      board.append(line)
    if board and (is_between or lines):
      boards.append('\n'.join(board))
      board = []
  return boards
