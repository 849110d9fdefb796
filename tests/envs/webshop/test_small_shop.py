"""The built-in shop: goals that can be met, short texts."""

import itertools

import pytest

from actfocus_jax.envs.webshop import (
  catalogue,
  reward,
  shops,
  small_shop,
)


@pytest.fixture(scope='module')
def products():
  return small_shop.make(0, 150)


def test_no_option_value_matches_another():
  options = [(n, v) for n, vs in small_shop.VALUES.items() for v in vs]
  for wish, (_, value) in itertools.product(options, options):
    assert reward.option_matches(wish, value) is (wish[1] == value)


def test_no_attribute_matches_another():
  for kind in small_shop.KINDS:
    for one, other in itertools.permutations(kind.attributes, 2):
      plain = catalogue.Product('B', f'x {other}', attributes=(other,))
      assert not reward.has_attribute(plain, one)
      assert reward.has_attribute(plain, other)


def test_goal_is_met_by_its_product_and_hardly_another(products):
  assert products != small_shop.make(1, 150)
  shop = shops.MemoryShop(products)
  assert shop.goal_count >= 3 * 256
  texts = {shop.goal(number).text for number in range(shop.goal_count)}
  assert len(texts) > 0.98 * shop.goal_count
  fitting = []
  for number in range(0, shop.goal_count, 7):
    goal = shop.goal(number)
    wishes = [value for _, value in goal.options]
    own = reward.score(goal, shop.product(goal.asin), wishes)
    assert own.is_perfect
    offered = [
      product
      for product in products
      if reward.score(
        goal, product, [v for _, vs in product.options for v in vs]
      ).is_perfect
    ]
    fitting.append(len(offered))
  assert min(fitting) == 1 and sum(fitting) / len(fitting) < 1.5
