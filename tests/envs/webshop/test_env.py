"""WebShop: an episode by hand, rewards, malformed actions, any string."""

import dataclasses

import pytest

from actfocus_jax.envs import base, webshop
from actfocus_jax.envs.webshop import env as env_lib
from actfocus_jax.envs.webshop import pages, reward

UNBOUGHT = dict.fromkeys(
  ('bought', 'reward', 'r_type', 'attributes', 'options', 'price'), 0.0
)


@pytest.fixture(scope='module')
def env():
  return webshop.WebShop(results_per_page=3)


def shop_of(kit, tmp_path, **choices):
  """Three goals: a red or a blue shirt, and a hat."""
  shirt = kit.record(
    'B01',
    name='Acme Soft Shirt',
    pricing='$995.00',
    full_description='Warm.',
    small_description=['Washable.'],
    product_category='Clothing › Shirts',
    query='shirts',
    customization_options={'Color': kit.values('Red', 'Blue')},
  )
  hat = kit.record('B02', name='Straw Hat', pricing='$995.00', query='hats')
  notes = {
    'B01': kit.note('soft', 'warm', instruction='Find me soft, warm shirts'),
    'B02': kit.note('straw', instruction='Find me straw hats'),
  }
  data = kit.write(tmp_path, [shirt, hat], notes, ending='_1000.json')
  return webshop.WebShop(data=data, **choices)


def play(env, state, *actions):
  for action in actions:
    state, step = env.step(state, action)
  return state, step


ADVICE = 'Choose every option that the instruction names, then buy.'


def test_episode_by_hand(kit, tmp_path):
  env = shop_of(kit, tmp_path)
  state, text = env.load('1')
  assert text == (
    'Instruction: Find me soft, warm shirts with color: blue\n'
    f'{ADVICE}\n'
    'Available actions: search[keywords]'
  )
  item = 'Acme Soft Shirt [SEP] Price: $995.00 [SEP] color: red, blue'
  back = 'click[back to search], '
  buttons = (
    f'{back}click[< prev], click[description], click[features], '
    'click[red], click[blue], click[buy now]'
  )
  episode = [
    (
      'search[soft shirt]',
      'Page 1 (Total results: 1) [SEP] B01 [SEP] Acme Soft Shirt [SEP] $995.00',
      f'{back}click[b01]',
    ),
    ('Click[B01]', item, buttons),
    ('click[features]', 'Washable.', f'{back}click[< prev]'),
    (' CLICK[ <  Prev ] ', item, buttons),
    ('click[blue]', f'{item} [SEP] Chosen color: blue', buttons),
  ]
  for action, shown, available in episode:
    state, step = env.step(state, action)
    assert step == base.Step(
      text=(
        f'{shown}\n{ADVICE}\nAvailable actions: search[keywords], {available}'
      ),
      reward=0.0,
      done=False,
      success=False,
      info={'effective': True, **UNBOUGHT},
    )
  state, step = env.step(state, 'click[buy now]')
  parts = {'r_type': 1.0, 'attributes': 1.0, 'options': 1.0, 'price': 1.0}
  assert step == base.Step(
    text='You bought: Acme Soft Shirt',
    reward=1.0,
    done=True,
    success=True,
    info={'effective': True, 'bought': 1.0, 'reward': 1.0} | parts,
  )
  # What is over stays as it is.
  for action in ('click[back to search]', 'search[hat]', 'click[buy now]'):
    following, step = env.step(state, action)
    assert following == state
    assert (step.reward, step.done, step.success) == (0.0, True, True)
    assert step.info == {'effective': False, **UNBOUGHT}


@pytest.mark.parametrize(
  'actions, raw, parts',
  [
    (('search[shirt]', 'click[b01]', 'click[red]'), 3 / 4, (1, 1, 0, 1)),
    (('search[hat]', 'click[b02]'), 0.0, (0, 0, 0, 1)),
  ],
)
@pytest.mark.parametrize('kind', ['strict', 'graded'])
def test_wrong_purchase_by_hand(kit, tmp_path, actions, raw, parts, kind):
  env = shop_of(kit, tmp_path, reward=kind)
  state, step = play(env, env.load('1')[0], *actions, 'click[buy now]')
  assert step.reward == (raw if kind == 'graded' else 0.0)
  assert (step.done, step.success) == (True, False)
  names = ('r_type', 'attributes', 'options', 'price')
  assert step.info == {'effective': True, 'bought': 1.0, 'reward': raw} | dict(
    zip(names, map(float, parts), strict=True)
  )
  assert env.step(state, 'click[b01]')[1].success is False


MALFORMED = r"""
|search|search[  ]|click[]|[b01]|buy now|search[\n]
|search [hat]|click (b01)|click[b01|click[b01].|xclick[b01]
|click[b99]|click[buy now]|click[keywords]|search[hat]]x|click[[b01]]|||
""".replace(r'\n', '\n')


@pytest.mark.parametrize('action', MALFORMED.split('|'))
def test_malformed_action_changes_nothing(kit, tmp_path, action):
  env = shop_of(kit, tmp_path)
  state, before = play(env, env.load('0')[0], 'search[soft]')
  following, step = env.step(state, action)
  assert following == state
  assert step == dataclasses.replace(
    before, info={'effective': False, **UNBOUGHT}
  )


@pytest.mark.parametrize(
  'action, query',
  [
    ('search[hat]', 'hat'),
    ('SEARCH[Red  Hat]', 'Red Hat'),
    ('search[a[b]c]', 'a[b]c'),
    ('  search[\thi\n]\n', 'hi'),
    (f'search[{"x" * 600}]', 'x' * 500),
  ],
)
def test_search_works_from_every_page(env, action, query):
  state, _ = env.load('0')
  for page in ('search', 'results', 'item', 'features'):
    here = dataclasses.replace(
      state, page=page, query='lamp', asin='B840', number=2
    )
    following, step = env.step(here, action)
    assert following == env_lib.State(0, 'results', query)
    assert (step.reward, step.info) == (0.0, {'effective': True, **UNBOUGHT})


# --- Seeds and boards --------------------------------------------------------


def test_load_takes_the_number_of_a_goal(env):
  state, text = env.load(' 17\n')
  assert (state.goal, text) == (17, env.render(state))
  assert env.goal(state).text in text
  for board in ('', 'x', '-1', '1.0', '²', str(env.goal_count), '9' * 5000):
    with pytest.raises(ValueError, match='number of a goal, 0 to'):
      env.load(board)


# --- The public set ----------------------------------------------------------


def test_public_set_has_6910_goals(public):
  env = webshop.WebShop(data=public)
  assert env.goal_count == 6910
  human = webshop.WebShop(data=public, goals='human')
  assert human.goal_count == 13


def test_public_products_can_be_bought_as_asked(public):
  env = webshop.WebShop(data=public)
  for number in range(0, env.goal_count, 20):
    goal = env.goal(env.load(str(number))[0])
    product = env.product(goal.asin)
    wishes = [value for _, value in goal.options]
    assert reward.score(goal, product, wishes).is_perfect
    offered = pages.State(number, 'item', asin=goal.asin)
    assert {*wishes} <= {*env.page(offered).links}
