"""Boards from a file in place of an environment's own generator.

One file holds many boards, in the form that the environment's `load` reads:

- a board of several lines: blank lines and lines that begin with `;` stand
  between boards (the public Boxoban format of Sokoban levels);
- a board of one line: every line is one (Sudoku), if the environment's
  `boards_are_lines` is true. It may also be a method: (lines between two blank
  ones) -> bool.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from actfocus_jax.envs import base

# One in this many boards is held out for evaluation.
_HOLD_OUT = 4


class Written(NamedTuple):
  """A board of a file; `line` is its first line, counted from 1."""

  line: int
  text: str


@dataclasses.dataclass(frozen=True)
class OnBoards:
  """An environment whose boards come from a file.

  Every fourth board is held out (`test`); the seeds of evaluation (`held_out`)
  give these in order. All other seeds go through the rest (`train`) in order: a
  run on this environment alone takes each board once before any is repeated.
  Repeated boards of the file count once. All other members are those of `env`.
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
    """Read a file and check every board.

    Args:
      env: the environment. Boards for which its `is_solved(state)` or
        `is_unsolvable(state)` is true are refused.
      path: the file.
      field: name of the config field that holds the path.
      held_out: seeds of evaluation.
      few: accept any number of boards. Then several seeds of evaluation share
        one, and share it with training if no board is held out.

    Raises:
      ValueError: the file cannot be read, an entry is not a board, or there
        are too few boards.
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

  def __getattr__(self, name: str):
    if name == 'env' or name.startswith('__'):  # Not set while unpickled.
      raise AttributeError(name)
    return getattr(self.env, name)

  def reset(self, seed: int) -> tuple[base.State, str]:
    """Return the board of a seed, and its text."""
    if seed in self.held_out:
      board = self.test[(seed - self.held_out.start) % len(self.test)]
    else:
      board = self.train[seed % len(self.train)]
    return self.env.load(board, seed=seed)


def split(
  text: str, *, lines: bool | Callable[[Sequence[str]], bool] = False
) -> list[Written]:
  """Cut the text of a file into boards.

  Args:
    text: text of the file.
    lines: True if every line is a board, or a function (lines between two blank
      ones) -> bool. Otherwise blank lines and lines that begin with `;`
      separate the boards.
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
  """Return the boards that differ in the text that the model would see.

  Raises:
    ValueError: an entry is not a board, is solved or cannot be solved.
  """
  found: dict[str, str] = {}
  for number, (line, board) in enumerate(written, 1):
    where = f'{file}, whose board {number} (line {line})'
    try:
      state, seen = env.load(board, seed=0)
      if not isinstance(seen, str):
        raise TypeError(f'`load` gave {type(seen).__name__} as its text')
      is_new = seen not in found
      is_solved, is_unsolvable = (
        is_new and hasattr(env, name) and getattr(env, name)(state)
        for name in ('is_solved', 'is_unsolvable')
      )
    except ValueError as error:
      reason = ' '.join(str(error).split())
      raise ValueError(
        f'{where} is not a board: {reason}; comments begin with `;`.'
      ) from error
    except (Exception, SystemExit) as error:  # It may be anybody's.
      reason = ' '.join(f'{type(error).__name__}: {error}'.split())
      raise ValueError(
        f'{where} cannot be read: the environment failed: {reason}; allowed: '
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
