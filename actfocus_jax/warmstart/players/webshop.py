"""Scripted players of WebShop."""

import dataclasses

import numpy as np

from actfocus_jax.envs.webshop import catalogue, goals, pages, reward
from actfocus_jax.envs.webshop import env as webshop
from actfocus_jax.warmstart.players import uniform


@dataclasses.dataclass(frozen=True)
class WebShopCareless:
  """Takes the right action now and then; else clicks anywhere.

  It searches with the attributes and the query of the goal, opens the first
  result that fits, chooses the options and buys. It knows more than a model: it
  reads the goal's fields, and a product fits if its reward would be perfect. It
  does not know which product the goal was made of.

  Attributes:
    skill: probability, per action, of the right one.
    habit: probability, per action, of the hasty one: it opens the first result,
      and buys the product of its page. What remains of 1 is a uniformly random
      click. If nothing can be clicked, both are a search for one word.
  """

  skill: float = 0.55
  habit: float = 0.0

  def respond(
    self, env: webshop.WebShop, state: webshop.State, rng: np.random.Generator
  ) -> tuple[str, list[str]]:
    """Return e.g. `Next color: green.` and `click[green]`.

    The thought describes the right action, even if another one is taken.
    """
    goal, page = env.goal(state), env.page(state)
    luck = rng.random()
    thought, action = self._right(env, goal, state, page)
    if luck < self.skill:
      return thought, [action]
    if not page.links:
      word = uniform.draw(rng, self._keywords(goal).split())
      return thought, [f'search[{word}]']
    links = [*page.links]
    if luck < self.skill + self.habit:
      links = [_hasty(page)]
    return thought, [f'click[{uniform.draw(rng, links)}]']

  def _right(self, env, goal, state, page: pages.Page) -> tuple[str, str]:
    if state.page == 'search':
      keywords = self._keywords(goal)
      return f'I look for {keywords}.', f'search[{keywords}]'
    if state.page == 'results':
      return self._open_one(env, goal, page)
    product = env.product(state.asin)
    if state.page == 'item' and self._fits(goal, product):
      chosen = dict(state.chosen)
      for name, value in choices(goal, product).items():
        if chosen.get(name) != value:
          return f'Next {name}: {value}.', f'click[{value}]'
      return 'All is chosen.', f'click[{pages.BUY}]'
    return 'I go back.', f'click[{pages.PREVIOUS}]'

  def _open_one(self, env, goal, page: pages.Page) -> tuple[str, str]:
    products = [env.product(name.upper()) for name in page.links]
    found = [p for p in products if p is not None]
    fit = next((p for p in found if self._fits(goal, p)), None)
    if fit is not None:
      thought = f'{fit.asin} at {fit.price_text} fits.'
      return thought, f'click[{fit.asin.lower()}]'
    way = pages.NEXT if pages.NEXT in page.links else pages.BACK
    return 'Nothing here fits.', f'click[{way}]'

  def _keywords(self, goal: goals.Goal) -> str:
    return f'{", ".join(goal.attributes)} {goal.query}'

  def _fits(self, goal: goals.Goal, product: catalogue.Product) -> bool:
    chosen = choices(goal, product).values()
    return reward.score(goal, product, chosen).is_perfect


@dataclasses.dataclass(frozen=True)
class WebShopCareful(WebShopCareless):
  """Knows which product the goal was made of, and looks for that one."""

  skill: float = 1.0

  def _keywords(self, goal: goals.Goal) -> str:
    return goal.title

  def _fits(self, goal: goals.Goal, product: catalogue.Product) -> bool:
    return product.asin == goal.asin


def choices(goal: goals.Goal, product: catalogue.Product) -> dict[str, str]:
  """Return the option values of a product that a goal names, by option.

  A wish that the product cannot meet is left out. Equal names and values go
  before similar ones.
  """
  chosen: dict[str, str] = {}
  for wish in goal.options:
    found = [
      (name != wish[0], value != wish[1], name, value)
      for name, values in product.options
      for value in values
      if name not in chosen and reward.option_matches(wish, value)
    ]
    if found:
      _, _, name, value = min(found)
      chosen[name] = value
  return chosen


def _hasty(page: pages.Page) -> str:
  if pages.BUY in page.links:
    return pages.BUY
  ways = (pages.BACK, pages.PREVIOUS, pages.NEXT)
  return next(
    (name for name in page.links if name not in ways), [*page.links][0]
  )
