"""The interface of an environment, and the rules of one turn.

One turn:

1. A model answers with a list of action strings, or with nothing readable.
2. The list is cut to the actions allowed per turn and to those left in the
   episode; the rest is neither run nor judged.
3. Names are looked up. Unknown ones cost the format penalty, once per turn.
4. The known ones run one by one until the environment is done.
5. The rewards of the actions run are added up; the penalty stays apart, because
   it belongs to the return of the episode and is never shown to the model.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

# A frozen, hashable dataclass of the environment's own; opaque to all others.
State = Any


@dataclasses.dataclass(frozen=True)
class Step:
  """Result of one action.

  Attributes:
    text: the new state as the model reads it; UTF-8 can write it.
    reward: reward of this action; finite.
    done: the environment has ended.
    success: the environment declares itself solved.
    info: finite numbers by name, which become metrics of the episode. The entry
      `effective` (the action changed something) is True by default.
  """

  text: str
  reward: float
  done: bool
  success: bool = False
  info: Mapping[str, float] = dataclasses.field(default_factory=dict)


class Environment(Protocol):
  """An environment: the object is constant; the state holds what changes.

  Both methods are pure: equal arguments give equal results, and no state is
  ever changed in place. So the members of a group share a state, and a state
  can be kept, compared and hashed.

  Optional members:

  - `load(board, *, seed=0) -> (state, text)` reads a board that is given as
    text, with the noise of a seed. It raises ValueError for anything else. With
    it boards may come from a file (boards.py).
  - `is_solved(state)` and `is_unsolvable(state)`: a file with such a board is
    refused.
  - `boards_are_lines = True`: every line of the file is a board.
  - `render(state) -> text`.
  - `evaluation_boards`: number of distinct evaluation boards (int), the most
    that eval.prompts may be.

  Attributes:
    instructions: the rules, the symbols and the action names.
    actions: known action names in their canonical spelling; empty for an
      environment that takes any string and judges it itself.
  """

  instructions: str
  actions: tuple[str, ...]

  def reset(self, seed: int) -> tuple[State, str]:
    """Return the state and its text that belong to a seed (>= 0)."""
    ...

  def step(self, state: State, action: str) -> tuple[State, Step]:
    """Run one action, which is one of `actions` unless these are empty."""
    ...


@dataclasses.dataclass(frozen=True)
class TurnResult:
  """Result of one turn.

  Attributes:
    text: the state after the turn as the model reads it.
    reward: sum of the rewards of the actions run; shown to the model.
    penalty: 0.0 or the format penalty; part of the return, never shown.
    done: the environment has ended.
    success: the environment declares itself solved.
    actions_used: actions run, each of which costs one of the episode's budget.
    valid: at least one action was run.
    effective: number of actions run that changed something.
    info: the other numbers of `Step.info`; the last action overrides.
  """

  text: str
  reward: float
  penalty: float
  done: bool
  success: bool
  actions_used: int
  valid: bool
  effective: int
  info: Mapping[str, float] = dataclasses.field(default_factory=dict)


def find_action(actions: Sequence[str], name: str) -> str | None:
  """Return the canonical spelling of a name, or None if it is unknown."""
  return next((a for a in actions if a.lower() == name.lower()), None)


def require_action(actions: Sequence[str], name: str) -> str:
  """Return the canonical spelling; raises ValueError if it is unknown."""
  action = find_action(actions, name)
  if action is None:
    raise ValueError(f'unknown action {name!r}; known are {list(actions)}')
  return action


def reset(env: Environment, seed: int) -> tuple[State, str]:
  """Reset an environment.

  Raises:
    ValueError: the result is not a state and a text.
  """
  given = env.reset(seed)
  _check_pair('reset', 'a state and a text', given)
  _check_text('The text of a reset', given[1])
  return tuple(given)


def play_turn(
  env: Environment,
  state: State,
  text: str,
  answer: Sequence[str] | None,
  *,
  budget: int,
  max_actions: int,
  format_penalty: float = -0.1,
) -> tuple[State, TurnResult]:
  """Play one turn: judge the actions of an answer and run them in order.

  Args:
    env: the environment.
    state: state before the turn, not done.
    text: text of this state, returned again if no action is run.
    answer: action strings, split and trimmed; None for an unreadable response.
    budget: actions left in the episode, at least 1.
    max_actions: actions allowed in one turn, at least 1.
    format_penalty: reward, usually negative, for an unknown name or for a turn
      without any valid action; given at most once.

  Returns:
    The state after the turn, and the result.

  Raises:
    ValueError: budget or max_actions is below 1, or a step does not return a
      state and a `Step`.
  """
  if budget < 1 or max_actions < 1:
    raise ValueError(
      f'budget and max_actions must be >= 1, got {budget} and {max_actions}'
    )
  names = list(answer or ())[: min(budget, max_actions)]
  known = names
  if env.actions:  # Without a table the environment judges the strings.
    found = (find_action(env.actions, name) for name in names)
    known = [action for action in found if action is not None]
  is_bad_format = not known or len(known) < len(names)
  state, steps = _run(env, state, known)
  return state, TurnResult(
    text=steps[-1].text if steps else text,
    reward=sum((float(step.reward) for step in steps), 0.0),
    penalty=format_penalty if is_bad_format else 0.0,
    done=bool(steps and steps[-1].done),
    success=bool(steps and steps[-1].success),
    actions_used=len(steps),
    valid=bool(steps),
    effective=sum(bool(step.info.get('effective', True)) for step in steps),
    info={
      name: float(value)
      for step in steps
      for name, value in step.info.items()
      if name != 'effective'
    },
  )


def _run(
  env: Environment, state: State, actions: Sequence[str]
) -> tuple[State, list[Step]]:
  steps = []
  for action in actions:
    given = env.step(state, action)
    _check_pair('step', 'a state and a Step', given)
    state, step = given
    _check_step(step)
    steps.append(step)
    if step.done:
      break
  return state, steps


def _check_pair(method: str, wanted: str, given):
  is_sequence = isinstance(given, (tuple, list))
  if not is_sequence or len(given) != 2:
    found = f'{len(given)} values' if is_sequence else type(given).__name__
    raise ValueError(f'{method} returned {found}; allowed: {wanted}.')


def _check_step(step: Step):
  _check_text('The text of a step', step.text)
  _check_number('The reward of a step', step.reward)
  for name in ('done', 'success'):
    value = getattr(step, name)
    if not isinstance(value, (bool, np.bool_)):
      raise ValueError(f'Step.{name} is {value!r}; allowed: True and False.')
  for name, value in step.info.items():
    _check_text('A name in Step.info', name)
    _check_number(f'Step.info[{name!r}]', value)


def _check_text(what: str, text):
  if not isinstance(text, str):
    raise ValueError(f'{what} is of {type(text).__name__}; allowed: str.')
  try:
    text.encode()
  except UnicodeEncodeError as error:
    bad = text[error.start : error.end]
    raise ValueError(
      f'{what} has {bad!r}, which UTF-8 cannot write; allowed: whole '
      'characters.'
    ) from error


def _check_number(what: str, value):
  try:
    is_finite = math.isfinite(value)
  except (TypeError, ValueError, OverflowError):
    is_finite = False
  if not is_finite:
    raise ValueError(f'{what} is {value!r}; allowed: finite numbers.')
