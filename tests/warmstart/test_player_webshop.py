"""Scripted shoppers: what they say, how they choose, how often they win."""

import os
import pathlib

import numpy as np
import pytest

from actfocus_jax.envs import base, webshop
from actfocus_jax.envs.webshop import catalogue, goals, pages
from actfocus_jax.warmstart import players
from actfocus_jax.warmstart.players import webshop as shoppers

ROOT = pathlib.Path(__file__).resolve().parents[2]
EPISODE = {'turns': 9, 'max_actions': 1, 'budget': 9}


@pytest.fixture(scope='module')
def env():
  return webshop.WebShop(results_per_page=3)


def rng(seed=0):
  return np.random.default_rng(seed)


def test_a_perfect_episode_by_hand(env):
  state, _ = env.load('17')
  goal = env.goal(state)
  assert goal.text == (
    'Find me energy saving, solar powered lamps with color: black, '
    'and size: tiny, and price lower than 40.00 dollars'
  )
  player, said = shoppers.WebShopCareless(skill=1.0), []
  for _ in range(5):
    thought, actions = player.respond(env, state, rng())
    said.append((thought, *actions))
    state, step = env.step(state, actions[0])
  assert said == [
    (
      'I look for energy saving, solar powered lamps.',
      'search[energy saving, solar powered lamps]',
    ),
    # The first result costs 25.00, but it is neither solar powered nor black.
    ('B548 at $10.00 fits.', 'click[b548]'),
    ('Next color: black.', 'click[black]'),
    ('Next size: tiny.', 'click[tiny]'),
    ('All is chosen.', 'click[buy now]'),
  ]
  assert step.success


@pytest.mark.parametrize('skill', [0.0, 0.55, 1.0])
def test_answers_are_short_and_can_be_clicked(env, skill):
  player = shoppers.WebShopCareless(skill)
  for seed in range(60):
    state, _ = env.reset(seed)
    for turn in range(9):
      first, second = (
        player.respond(env, state, rng((seed, turn))) for _ in range(2)
      )
      assert first == second
      thought, (action,) = first
      assert len(thought.split()) <= 25
      following, step = env.step(state, action)
      assert following != state or 'click' in action
      if step.done:
        break
      state = following


def test_the_thought_is_right_where_the_action_is_not(env):
  state, _ = env.step(env.reset(0)[0], 'search[lamp]')
  thoughts, actions = set(), set()
  for seed in range(100):
    thought, (action,) = shoppers.WebShopCareless(0.0).respond(
      env, state, rng(seed)
    )
    thoughts.add(thought)
    actions.add(action)
  assert len(thoughts) == 1
  assert actions == {f'click[{name}]' for name in env.page(state).links}


def test_skill_is_the_chance_of_the_right_action(env):
  state, _ = env.reset(1)
  goal = env.goal(state)
  state, _ = env.step(state, f'search[{goal.title}]')
  right = shoppers.WebShopCareful(1.0).respond(env, state, rng())[1]
  for skill in (0.0, 0.55, 1.0):
    player = shoppers.WebShopCareful(skill)
    hits = [
      player.respond(env, state, rng(seed))[1] == right for seed in range(2000)
    ]
    expected = skill + (1 - skill) / len(env.page(state).links)
    error = np.sqrt(expected * (1 - expected) / 2000)
    assert abs(np.mean(hits) - expected) <= 3 * error


def test_a_careless_search_has_one_word_of_the_goal(env):
  state, _ = env.reset(2)
  goal = env.goal(state)
  words = {*' '.join(goal.attributes).split(), goal.query}
  found = {
    shoppers.WebShopCareless(0.0).respond(env, state, rng(seed))[1][0]
    for seed in range(100)
  }
  assert {name.rstrip(',]')[7:] for name in found} == words


def test_it_goes_on_where_nothing_fits(env):
  player = shoppers.WebShopCareless(1.0)
  state, _ = env.reset(0)
  goal = env.goal(state)
  # Four or more of a kind, three results a page.
  other = 'tea' if 'sock' in goal.query else 'sock'
  state, _ = env.step(state, f'search[{other}]')
  said = []
  while state.page == 'results':
    thought, (action,) = player.respond(env, state, rng())
    assert thought == 'Nothing here fits.'
    said.append(action)
    state, _ = env.step(state, action)
  assert said[-1] == 'click[back to search]' and len(said) >= 2
  assert {*said[:-1]} == {'click[next >]'}


@pytest.mark.parametrize('page', ['item', 'features', 'description'])
def test_it_goes_back_from_what_does_not_fit(env, page):
  state, _ = env.reset(0)
  goal = env.goal(state)
  names = ('B840',) if 'sock' not in goal.query else ('B097',)
  here = pages.State(state.goal, page, 'tea', 1, names[0])
  answer = shoppers.WebShopCareless(1.0).respond(env, here, rng())
  assert answer == ('I go back.', ['click[< prev]'])


def test_choices_prefer_equal_names_and_values():
  product = catalogue.Product(
    'B01',
    'Thing',
    options=(
      ('style', ('9', 'red')),
      ('size', ('9 wide', '9', '8')),
      ('color', ('dark red', 'red')),
    ),
  )

  def wish(*options):
    goal = goals.Goal('B01', '', (), options, None, '', '', ())
    return shoppers.choices(goal, product)

  assert wish(('size', '9'), ('color', 'red')) == {'size': '9', 'color': 'red'}
  assert wish(('style', '9'), ('size', '9')) == {'style': '9', 'size': '9'}
  assert wish(('size', '7')) == {}
  assert wish(('', '9'), ('', '9')) == {'size': '9', 'style': '9'}


def test_the_perfect_shoppers_buy_what_is_asked_for(env):
  seeds = [*range(123, 223), *range(10_000, 10_100)]
  for player in (shoppers.WebShopCareful(), shoppers.WebShopCareless(1.0)):
    assert players.success_rate(env, player, seeds, **EPISODE) == 1.0


# Measured on seeds 10,000..11,999, three results a page.
@pytest.mark.parametrize(
  'player, expected',
  [
    (shoppers.WebShopCareless(0.0), 0.0015),
    (shoppers.WebShopCareless(), 0.352),
  ],
)
def test_success(env, player, expected):
  rate = players.success_rate(env, player, range(10_000, 10_400), **EPISODE)
  error = np.sqrt(expected * (1 - expected) * (1 / 400 + 1 / 2000))
  assert abs(rate - expected) <= 3 * error


def purchases(env, player, seeds):
  bought = 0
  for seed in seeds:
    state, _ = env.reset(seed)
    for turn in range(9):
      _, answer = player.respond(env, state, rng((seed, turn)))
      state, result = base.play_turn(
        env, state, '', answer, budget=9, max_actions=1
      )
      if result.done:
        bought += 1
        break
  return bought / len(seeds)


def test_perfect_shoppers_on_the_public_set():
  default = ROOT.parent / 'shared' / 'data' / 'webshop-small'
  place = pathlib.Path(os.environ.get('ACTFOCUS_WEBSHOP_DATA') or default)
  if not place.is_dir():
    pytest.skip('no public WebShop set; ACTFOCUS_WEBSHOP_DATA may name it')
  env = webshop.WebShop(data=str(place))
  careful, reader = shoppers.WebShopCareful(), shoppers.WebShopCareless(1.0)
  seeds = range(10_000, 10_200)
  assert players.success_rate(env, careful, seeds, **EPISODE) >= 0.95
  # By the goal's fields and the reward, but not by the product it was made of.
  assert players.success_rate(env, reader, seeds, **EPISODE) > 0.9
  assert purchases(env, careful, range(123, 163)) == 1.0
