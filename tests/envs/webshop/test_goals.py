"""Goals: their texts, their price caps, and which seed gets which."""

import collections
import dataclasses
import itertools

import numpy as np
import pytest

from actfocus_jax.config import schema
from actfocus_jax.envs.webshop import catalogue, goals

SHIRT = catalogue.Product(
  asin='B01',
  title='Soft shirt',
  options=(('size', ('small', 'large')), ('color', ('red', 'blue', 'grey'))),
  price=12.0,
  query='shirts',
  categories=('Clothing', 'Shirts'),
  attributes=('soft', 'warm'),
  instruction='Find me soft shirts',
  wanted=('soft',),
)


def without_cap(goal):
  return goal.text.partition(', and price lower')[0]


def test_synthetic_goal_by_hand():
  goal = goals.synthetic(SHIRT, 3)
  assert goal.price_cap in (30.0, 40.0, 50.0)
  assert goal == goals.Goal(
    asin='B01',
    text=(
      'Find me soft shirts with color: blue, and size: large, '
      f'and price lower than {goal.price_cap:.2f} dollars'
    ),
    attributes=('soft',),
    options=(('color', 'blue'), ('size', 'large')),
    price_cap=goal.price_cap,
    title='Soft shirt',
    query='shirts',
    categories=('Clothing', 'Shirts'),
  )


def test_synthetic_goals_are_all_combinations():
  count = goals.synthetic_count(SHIRT)
  found = [goals.synthetic(SHIRT, number).options for number in range(count)]
  expected = itertools.product(('red', 'blue', 'grey'), ('small', 'large'))
  assert found == [(('color', c), ('size', s)) for c, s in expected]
  plain = dataclasses.replace(SHIRT, options=())
  assert goals.synthetic_count(plain) == 1
  assert goals.synthetic(plain, 0).options == ()
  for field in ('instruction', 'wanted'):
    without = dataclasses.replace(SHIRT, **{field: ''})
    assert goals.synthetic_count(without) == 0


def test_synthetic_goals_of_a_product_end_at_a_million():
  values = tuple(map(str, range(100)))
  options = tuple((name, values) for name in 'abcdefghijkl')
  for count, expected in ((2, 10**4), (12, 10**6)):
    product = dataclasses.replace(SHIRT, options=options[:count])
    assert goals.synthetic_count(product) == expected
  # More products than the full files have still add up.
  numbering = goals.Numbering([goals.synthetic_count(product)] * 2_000_000)
  assert numbering.count == 2 * 10**12
  assert numbering.place(numbering.count - 1) == (1_999_999, 10**6 - 1)


def test_human_goal_by_hand():
  goal = goals.human(
    SHIRT,
    {
      'instruction': 'i want a soft  shirt.',
      'instruction_attributes': ['soft'],
      'instruction_options': ['red', 'large'],
      'attributes': ['warm'],
    },
  )
  assert without_cap(goal) == 'i want a soft shirt'
  assert goal.attributes == ('soft',)
  assert goal.options == (('', 'red'), ('', 'large'))
  assert f'lower than {goal.price_cap:.2f} dollars' in goal.text


# --- Price caps --------------------------------------------------------------


@pytest.mark.parametrize(
  'price, caps',
  [
    (10.0, {30: 1 / 6, 40: 2 / 6, 50: 3 / 6}),
    (960.0, {980: 1 / 3, 990: 2 / 3}),
    (970.0, {990: 1.0}),
    (980.0, {None: 1.0}),
  ],
)
def test_price_cap_is_the_larger_of_two_draws(price, caps):
  draws = collections.Counter(
    goals.price_cap(price, key) for key in range(2000)
  )
  assert set(draws) == set(caps)
  for cap, share in caps.items():
    error = np.sqrt(share * (1 - share) / 2000)
    assert abs(draws[cap] / 2000 - share) <= 3 * error


# --- Numbers and seeds -------------------------------------------------------


@pytest.mark.parametrize('counts', [[], [2, 0, 0, 1, 4, 0]])
def test_numbering_counts_product_by_product(counts):
  numbering = goals.Numbering(counts)
  expected = [(i, own) for i, n in enumerate(counts) for own in range(n)]
  assert numbering.count == len(expected)
  found = [numbering.place(number) for number in range(numbering.count)]
  assert found == expected


@pytest.mark.parametrize('count', [1, 2, 65, 6910])
def test_shuffle_is_a_permutation(count):
  found = [goals.shuffled(place, count) for place in range(count)]
  assert sorted(found) == list(range(count))
  if count > 10:
    assert found != sorted(found)


def numbered(texts):
  """A schedule over goals of which only the texts matter."""
  made = [
    goals.Goal('', text, (), (), None, '', '', ()) for text in map(str, texts)
  ]
  return goals.Schedule(made.__getitem__, len(made)), made


@pytest.mark.parametrize('count, held_out', [(300, 100), (3000, 500)])
def test_schedule_separates_evaluation_and_training(count, held_out):
  schedule, _ = numbered(range(count))
  assert schedule.held_out == held_out
  evaluation = [schedule.number(seed) for seed in range(123, 123 + held_out)]
  assert len(set(evaluation)) == held_out
  others = count - held_out
  training = [schedule.number(10_000 + seed) for seed in range(2 * others)]
  assert training[:others] == training[others:]
  assert len(set(training)) == others
  assert not set(training) & set(evaluation)
  assert schedule.number(10**9 + 7) in training
  assert {schedule.number(seed) for seed in (0, 9_999)} <= set(evaluation)


def test_first_training_seed_is_that_of_the_config():
  # Neither of the two may import the other.
  assert goals.FIRST_TRAINING_SEED == schema.FIRST_TRAINING_SEED


def test_equal_goals_are_on_one_side():
  schedule, made = numbered([number // 4 for number in range(400)])
  evaluation = {made[schedule.number(seed)].text for seed in range(133)}
  training = {made[schedule.number(10_000 + s)].text for s in range(300)}
  assert training and not training & evaluation
  # Without the check four equal ones in a row would be on both sides.
  assert len(evaluation) > 60


def test_too_few_goals_are_refused():
  with pytest.raises(ValueError, match='gives 2 goals.* 3 or more'):
    numbered(range(2))
  schedule, _ = numbered([7, 7, 7])
  with pytest.raises(ValueError, match='equals one for evaluation'):
    schedule.number(10_000)
