"""WebShop: find a product that fits a goal, choose its options, buy it.

One step:

1. The action is `search[keywords]`, from any page, or `click[element]` with an
   element of the page. Anything else does nothing; it costs the action.
2. The state moves to another page, or gets an option chosen (pages.py).
3. `click[buy now]` ends the episode, and reward.py judges the purchase.
   `reward='strict'` pays 1 for one that is right in every part, else 0;
   `'graded'` pays the raw reward. Success is the strict one in both.

Step.info holds `effective`, and of a purchase `bought` (1.0), `reward` (raw)
and its parts `r_type`, `attributes`, `options`, `price`, each in [0, 1]; all 0
before it. The purchase rate is the share of the episodes with a purchase.
"""

import dataclasses
import functools

from actfocus_jax.envs import base
from actfocus_jax.envs.webshop import catalogue, pages, shops, store
from actfocus_jax.envs.webshop import goals as goals_lib
from actfocus_jax.envs.webshop import reward as reward_lib

State = pages.State
Page = pages.Page

_NO_PURCHASE = dict.fromkeys(
  ('bought', 'reward', 'r_type', 'attributes', 'options', 'price'), 0.0
)
_GOALS = ('synthetic', 'human')
_REWARDS = {
  'strict': 'You get 1 if every wish is met and the price is within the limit.',
  'graded': 'You get the share of the wishes that are met, the price included.',
}
_LONGEST_QUERY = 500
_ADVICE = 'Choose every option that the instruction names, then buy.'
_INSTRUCTIONS = """\
You shop online. Find a product that fits the instruction, choose the options \
it names, and buy it.
search[keywords] searches the shop, from any page. click[element] clicks one \
of the available actions.
{reward} Buying ends the game."""


class WebShop:
  """The environment; see the module's docstring for its dynamics."""

  actions = ()

  def __init__(
    self,
    *,
    data: str = '',
    goals: str = 'synthetic',
    reward: str = 'strict',
    index: str = '',
    results_per_page: int = 10,
    shop_seed: int = 0,
    products: int = 150,
    instructions: str | None = None,
    progress: store.Progress | None = None,
  ):
    """Open a shop, which is kept for all environments of the process.

    configs/README.md explains the fields. The 1,000-product set is read into
    memory; the full files are made into a shop on disk once, with `progress`
    called meanwhile (None draws a bar on stderr).

    Raises:
      ValueError: a value out of range; files or libraries are missing.
    """
    for name, value, choices in (
      ('goals', goals, _GOALS),
      ('reward', reward, _REWARDS),
    ):
      if value not in choices:
        raise ValueError(
          f'{name} must be one of {list(choices)}, got {value!r}'
        )
    for name, value, low, high in (
      ('results_per_page', results_per_page, 1, 50),
      ('shop_seed', shop_seed, 0, 2**63),
      ('products', products, 10, 10_000),
    ):
      if not low <= value <= high:
        raise ValueError(f'{name} must be {low} to {high}, got {value}')
    self.results_per_page = results_per_page
    self._is_strict = reward == 'strict'
    self._shop = shops.open_shop(
      data=data,
      human=goals == 'human',
      index=index,
      shop_seed=shop_seed,
      products=products,
      progress=progress or store.Bar(),
    )
    self._schedule = goals_lib.Schedule(self._shop.goal, self._shop.goal_count)
    default = _INSTRUCTIONS.format(reward=_REWARDS[reward])
    self.instructions = default if instructions is None else instructions
    self._show = functools.lru_cache(maxsize=1 << 12)(self._show_uncached)

  @property
  def goal_count(self) -> int:
    """Number of goals, evaluation and training together."""
    return self._shop.goal_count

  @property
  def evaluation_boards(self) -> int:
    """Number of goals for evaluation; see `base.Environment`."""
    return self._schedule.held_out

  def reset(self, seed: int) -> tuple[State, str]:
    """Take the goal of a seed: below 10,000 for evaluation, else training."""
    state = State(self._schedule.number(seed))
    return state, self.render(state)

  def load(self, board: str, *, seed: int = 0) -> tuple[State, str]:
    """Take a goal by its number, in digits and below `goal_count`.

    Raises:
      ValueError: no such number.
    """
    del seed
    text = board.strip()
    is_number = text.isascii() and text.isdigit() and len(text) < 20
    if not is_number or int(text) >= self.goal_count:
      raise ValueError(
        f'a board is the number of a goal, 0 to {self.goal_count - 1}, '
        f'got {board!r}'
      )
    state = State(int(text))
    return state, self.render(state)

  def step(self, state: State, action: str) -> tuple[State, base.Step]:
    """Run one action. A state that is done stays as it is, with reward 0."""
    following = self._follow(state, action)
    is_done = following.page == 'done'
    info = {'effective': following != state, **_NO_PURCHASE}
    reward, success = 0.0, False
    if is_done:
      score = self.score(following)
      success = score.is_perfect
    if is_done and state.page != 'done':
      reward = float(success) if self._is_strict else score.raw
      parts = dataclasses.asdict(score)
      info |= {'bought': 1.0, 'reward': parts.pop('raw'), **parts}
    return following, base.Step(
      text=self.render(following),
      reward=reward,
      done=is_done,
      success=success,
      info=info,
    )

  def render(self, state: State) -> str:
    """Write the page's text, the advice, and the available actions."""
    return self._show(state)[1]

  def page(self, state: State) -> Page:
    """Return the page of a state: its texts and links."""
    return self._show(state)[0]

  def goal(self, state: State) -> goals_lib.Goal:
    """Return the goal of a state."""
    return self._shop.goal(state.goal)

  def product(self, asin: str) -> catalogue.Product | None:
    """Return the product with an ASIN, or None."""
    return self._shop.product(asin)

  def score(self, state: State) -> reward_lib.Score:
    """Return the score of buying the product of the state as chosen."""
    values = (value for _, value in state.chosen)
    return reward_lib.score(
      self.goal(state), self._shop.product(state.asin), values
    )

  def _follow(self, state: State, action: str) -> State:
    name, _, rest = action.strip().partition('[')
    argument = ' '.join(rest[:-1].split()) if rest.endswith(']') else ''
    if not argument or state.page == 'done':
      return state
    if name.lower() == 'search':
      return State(state.goal, 'results', argument[:_LONGEST_QUERY])
    if name.lower() == 'click':
      return self.page(state).links.get(argument.lower(), state)
    return state

  def _show_uncached(self, state: State) -> tuple[Page, str]:
    page = pages.show(self._shop, state, self.results_per_page)
    text = pages.SEPARATOR.join(page.texts)
    if state.page == 'done':
      return page, text
    actions = ('search[keywords]', *(f'click[{name}]' for name in page.links))
    available = f'Available actions: {", ".join(actions)}'
    return page, f'{text}\n{_ADVICE}\n{available}'
