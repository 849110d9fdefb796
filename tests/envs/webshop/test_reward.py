"""The reward: a table by hand, an independent score, and the edges."""

import dataclasses
import random

import pytest
from rapidfuzz import fuzz

from actfocus_jax.envs.webshop import catalogue, goals, reward

GOAL = goals.Goal(
  asin='B01',
  text='',
  attributes=('machine wash', 'soft'),
  options=(('color', 'navy blue'), ('size', 'large')),
  price_cap=40.0,
  title='Brand Cotton Shirt for Men',
  query='shirts',
  categories=('Clothing', 'Men', 'Shirts'),
)
WANTED = catalogue.Product(
  asin='B01',
  title='Brand Cotton Shirt for Men',
  price=40.0,
  query='shirts',
  categories=('Clothing', 'Men', 'Shirts'),
  attributes=('machine wash', 'soft'),
)
RIGHT = ('navy blue', 'large')


def changed(**fields):
  return dataclasses.replace(WANTED, **fields)


# bought, chosen -> r_type, attribute hits, option hits, price; of 2, 2 and 1.
TABLE = [
  (WANTED, RIGHT, (1.0, 2, 2, 1)),
  (WANTED, ('navy | white', 'large'), (1.0, 2, 2, 1)),  # navy comes first
  (WANTED, ('blue', 'large'), (1.0, 2, 1, 1)),  # and blue does not
  (WANTED, ('navy blue', 'small'), (1.0, 2, 1, 1)),
  (changed(price=40.01), RIGHT, (1.0, 2, 2, 0)),
  (changed(attributes=('soft',)), RIGHT, (1.0, 1, 2, 1)),
  # By the texts: in any case, and as a part of a word.
  (changed(attributes=(), description='Softly SOFT'), RIGHT, (1.0, 1, 2, 1)),
  (changed(attributes=('machine washing',)), RIGHT, (1.0, 1, 2, 1)),  # 88.9
  (changed(attributes=('washing by machine',)), RIGHT, (1.0, 0, 2, 1)),
  # Another kind: brand, cotton, shirt, men are the nouns of the goal.
  (changed(title='Wool hat', query='hats'), RIGHT, (0.0, 2, 2, 1)),
  (changed(title='Men', query='hats', categories=()), RIGHT, (1.0, 2, 2, 1)),
]


@pytest.mark.parametrize('bought, chosen, expected', TABLE)
def test_score_by_hand(bought, chosen, expected):
  r_type, attributes, options, price = expected
  score = reward.score(GOAL, bought, chosen)
  assert score == reward.Score(
    raw=r_type * (attributes + options + price) / 5,
    r_type=r_type,
    attributes=attributes / 2,
    options=options / 2,
    price=float(price),
  )
  assert score.is_perfect is (expected == (1.0, 2, 2, 1))


def test_goal_without_wishes_is_met():
  goal = dataclasses.replace(GOAL, attributes=(), options=(), price_cap=None)
  score = reward.score(goal, changed(price=10**6), ())
  assert score == reward.Score(1.0, 1.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize(
  'option, value, expected',
  [
    (('size', 'large'), 'large', True),
    (('size', 'large'), 'x-large', False),  # values alone: 100
    (('color', 'light gray'), 'gray-striped', True),
    (('color', 'black1901'), 'black1902', False),
    (('style', 'standard'), 'tan', False),  # a colour is a whole word
    (('', 'pecan'), 'pecan (pack of 12)', True),
    (('', 'xx-large'), 'x-large', True),  # 93.3: a person's goal has no name
  ],
)
def test_option_matches_by_hand(option, value, expected):
  assert reward.option_matches(option, value) is expected


# --- An independent score ----------------------------------------------------


def plain(text):
  return ''.join(c if c.isalnum() else ' ' for c in text.lower()).strip()


def restated(goal, bought, chosen):
  """The formula once more, with loops."""

  def alike(a, b):
    return fuzz.token_set_ratio(plain(a), plain(b)) > 85

  def colour(text):
    for word in plain(text).split():
      if word in reward.COLOURS:
        return word
    return text

  hits = 0
  for name in goal.attributes:
    for own in bought.attributes:
      if alike(own, name):
        hits += 1
        break
    else:
      bullets = ' '.join(bought.bullets)
      text = '\n'.join([bought.title, bullets, bought.description])
      hits += name in text.lower()
  for name, value in goal.options:
    for clicked in chosen:
      if clicked == value or alike(colour(f'{name} {value}'), colour(clicked)):
        hits += 1
        break
  if goal.price_cap is None or not bought.price > goal.price_cap:
    hits += 1
  wanted = {w for w in plain(goal.title).split() if w.isalpha() and len(w) > 1}
  have = {w for w in plain(bought.title).split() if w.isalpha() and len(w) > 1}
  wanted -= reward.FUNCTION_WORDS
  share = len(wanted & have) / len(wanted) if wanted else 0.2
  common = [c for c in set(goal.categories) if c in bought.categories]
  if goal.query == bought.query or len(common) > 1 or share > 0.2:
    kind = 1.0
  else:
    kind = 0.5
  if share < 0.1:
    kind = 0.1 if share else 0.0
  count = len(goal.attributes) + len(goal.options) + 1
  return kind * hits / count


WORDS = """\
red navy blue black shirt hat wash machine soft large small x-large with for 9
9.5 wool thick light free gluten
"""


def test_score_agrees_with_an_independent_one():
  rng = random.Random(1)

  def words(most):
    return ' '.join(rng.choices(WORDS.split(), k=rng.randrange(1, most)))

  def some(most, make):
    return tuple(make() for _ in range(rng.randrange(most)))

  seen = set()
  for _ in range(2000):
    goal = goals.Goal(
      'B01',
      '',
      some(4, lambda: words(3)),
      some(3, lambda: (rng.choice(['', 'size', 'color']), words(3))),
      rng.choice([None, 20.0]),
      words(14),
      rng.choice('ab'),
      some(4, lambda: rng.choice('xyz')),
    )
    bought = catalogue.Product(
      'B02',
      words(6),
      description=words(5),
      bullets=some(3, lambda: words(4)),
      price=rng.choice([19.0, 20.0, 21.0]),
      query=rng.choice('ab'),
      categories=some(4, lambda: rng.choice('xyz')),
      attributes=some(4, lambda: words(3)),
    )
    chosen = some(3, lambda: words(3))
    score = reward.score(goal, bought, chosen)
    assert score.raw == pytest.approx(restated(goal, bought, chosen), abs=1e-12)
    seen.add(score.r_type)
  assert seen == {0.0, 0.1, 0.5, 1.0}
