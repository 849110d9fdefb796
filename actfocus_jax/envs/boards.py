"""Boards out of a file in the place of an environment's own generator.

One file holds many boards, in the form that the environment's `load` reads:

- a board of several lines: blank lines and lines that begin with `;` stand
  between boards (the public Boxoban format of Sokoban levels);
- a board of one line: every line is one (Sudoku), if the environment's
  `boards_are_lines` says so; it may be a method that says it of the lines
  between two blank ones.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from actfocus_jax.envs import base

# One board in so many is held out for evaluation.
_HOLD_OUT = 4


class Written(NamedTuple):
  """A board as it stands in a file, and its first line, counted from 1."""

  line: int
  text: str


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
    cls,
    env,
    path: pathlib.Path,
    *,
    field: str,
    held_out: range,
    few: bool = False,
  ) -> 'OnBoards':
    """Reads and checks every board.

    Args:
      env: What is played; boards that its `is_solved(state)` says are solved,
        or its `is_unsolvable(state)` never to be, are refused.
      path: The file.
      field: The name it was given by.
      held_out: Seeds of evaluation.
      few: Whether any number of boards will do: then several seeds of
        evaluation share one, and with training if no board is held out.

    Returns:
      The environment.

    Raises:
      ValueError: The file cannot be read, a board is none, or there are too
        few of them.
    """
    if not hasattr(env, 'load'):
      raise ValueError(
        f'{field} is {str(path)!r}, but the environment has no '
        "`load(board, *, seed=0)`; allowed: ''."
      )
    try:
      text = path.read_text(encoding='utf-8-sig')
    except (OSError, UnicodeDecodeError) as error:
      raise ValueError(f'{field} is {str(path)!r}: {error}.') from error
    written = split(text, lines=getattr(env, 'boards_are_lines', False))
    boards = _different(env, written, f'{field} is {str(path)!r}')
    train = tuple(b for i, b in enumerate(boards) if (i + 1) % _HOLD_OUT)
    test = tuple(boards[_HOLD_OUT - 1 :: _HOLD_OUT])
    if few and boards:
      return cls(env, train, test or train, held_out)
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
      board = self.test[(seed - self.held_out.start) % len(self.test)]
    else:
      board = self.train[seed % len(self.train)]
    return self.env.load(board, seed=seed)

  def step(
    self, state: base.State, action: str
  ) -> tuple[base.State, base.Step]:
    """One action, of the environment."""
    return self.env.step(state, action)


def split(
  text: str, *, lines: bool | Callable[[Sequence[str]], bool] = False
) -> list[Written]:
  """Cuts a file into boards.

  Args:
    text: Of the file.
    lines: Whether every line is a board, or what says so of the lines between
      two blank ones; else blank lines and lines that begin with `;` stand
      between boards.

  Returns:
    The boards.
  """
  boards, block = [], []
  for number, line in enumerate([*text.splitlines(), ''], 1):
    if line.strip() and not line.lstrip().startswith(';'):
      block.append(Written(number, line))
      continue
    texts = [line.text for line in block]
    if block and (lines(texts) if callable(lines) else lines):
      boards.extend(block)
    elif block:
      boards.append(Written(block[0].line, '\n'.join(texts)))
    block = []
  return boards


def _different(env, written: Sequence[Written], file: str) -> list[str]:
  """The boards that differ in the text that the model would see.

  Args:
    env: What is played.
    written: The boards as they stand in the file.
    file: The beginning of a sentence about it.

  Returns:
    Their texts in the file.

  Raises:
    ValueError: A board is none, or nothing to be played.
  """
  found: dict[str, str] = {}
  for number, (line, board) in enumerate(written, 1):
    where = f'{file}, whose board {number} (line {line})'
    try:
      state, seen = env.load(board, seed=0)
      if not isinstance(seen, str):
        raise TypeError(f'`load` gave {type(seen).__name__} as its text')
      is_new = seen not in found
      is_solved = is_new and getattr(env, 'is_solved', _no)(state)
      is_unsolvable = is_new and getattr(env, 'is_unsolvable', _no)(state)
    except ValueError as error:
      told = ' '.join(str(error).split())
      raise ValueError(
        f'{where} is none: {told}; lines that are no board begin with `;`.'
      ) from error
    except (Exception, SystemExit) as error:  # It may be anybody's.
      told = ' '.join(f'{type(error).__name__}: {error}'.split())
      raise ValueError(
        f'{where} is not read, for the environment failed: {told}; allowed: '
        'load(board, *, seed=0) -> (state, text).'
      ) from error
    if is_solved:
      raise ValueError(f'{where} is solved already; allowed: boards to solve.')
    if is_unsolvable:
      raise ValueError(
        f'{where} cannot be solved; allowed: boards that can be.'
      )
    found.setdefault(seen, board)
  return [*found.values()]


def _no(state: base.State) -> bool:
  del state
  return False
