"""WebShop: an episode by hand, rewards, what is no action, any string."""

import copy
import dataclasses
import random
import re

import pytest

from actfocus_jax.envs import base, webshop
from actfocus_jax.envs.webshop import catalogue, pages, reward
from actfocus_jax.envs.webshop import env as env_lib

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


def test_an_episode_by_hand(kit, tmp_path):
  env = shop_of(kit, tmp_path)
  state, text = env.load('1')
  assert text == (
    'Instruction: Find me soft, warm shirts with color: blue\n'
    f'{ADVICE}\n'
    'Available actions: search[keywords]'
  )
  episode = [
    (
      'search[soft shirt]',
      'Page 1 (Total results: 1) [SEP] B01 [SEP] Acme Soft Shirt [SEP] $995.00',
      'click[back to search], click[b01]',
    ),
    (
      'Click[B01]',
      'Acme Soft Shirt [SEP] Price: $995.00 [SEP] color: red, blue',
      'click[back to search], click[< prev], click[description], '
      'click[features], click[red], click[blue], click[buy now]',
    ),
    ('click[features]', 'Washable.', 'click[back to search], click[< prev]'),
    (
      ' CLICK[ <  Prev ] ',
      'Acme Soft Shirt [SEP] Price: $995.00 [SEP] color: red, blue',
      'click[back to search], click[< prev], click[description], '
      'click[features], click[red], click[blue], click[buy now]',
    ),
    (
      'click[blue]',
      'Acme Soft Shirt [SEP] Price: $995.00 [SEP] color: red, blue'
      ' [SEP] Chosen color: blue',
      'click[back to search], click[< prev], click[description], '
      'click[features], click[red], click[blue], click[buy now]',
    ),
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
    (('search[shirt]', 'click[b01]'), 3 / 4, (1, 1, 0, 1)),
    (('search[hat]', 'click[b02]'), 0.0, (0, 0, 0, 1)),
  ],
)
@pytest.mark.parametrize('kind', ['strict', 'graded'])
def test_a_wrong_purchase(kit, tmp_path, actions, raw, parts, kind):
  env = shop_of(kit, tmp_path, reward=kind)
  state, step = play(env, env.load('1')[0], *actions, 'click[buy now]')
  assert step.reward == (raw if kind == 'graded' else 0.0)
  assert (step.done, step.success) == (True, False)
  names = ('r_type', 'attributes', 'options', 'price')
  assert step.info == {'effective': True, 'bought': 1.0, 'reward': raw} | dict(
    zip(names, map(float, parts), strict=True)
  )
  assert env.step(state, 'click[b01]')[1].success is False


def test_graded_rewards_are_told(kit, tmp_path):
  texts = [
    shop_of(kit, tmp_path, reward=kind).instructions
    for kind in ('strict', 'graded')
  ]
  assert 'You get 1 if every wish' in texts[0]
  assert 'share of the wishes' in texts[1]
  for text in texts:
    assert 'search[keywords]' in text and 'click[element]' in text


MALFORMED = r"""
|search|search[|search]|search[]|search[  ]|click[]|click|[b01]|buy now
|search [hat]|click (b01)|click[b01|click b01]|click[b01].|xclick[b01]
|click[b99]|click[buy now]|click[red]|click[keywords]|search[hat]]x
|click[[b01]]|click[b01]]|searc[hat]|search[hat]click|||search[\n]
""".replace(r'\n', '\n')


@pytest.mark.parametrize('action', MALFORMED.split('|'))
def test_what_is_no_action_does_nothing(kit, tmp_path, action):
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
    ('search[]]', ']'),
    ('  search[\thi\n]\n', 'hi'),
    (f'search[{"x" * 600}]', 'x' * 500),
  ],
)
def test_searches(env, action, query):
  state, _ = env.load('0')
  for page in ('search', 'results', 'item', 'features'):
    here = dataclasses.replace(
      state, page=page, query='lamp', asin='B840', number=2
    )
    following, step = env.step(here, action)
    assert following == env_lib.State(0, 'results', query)
    assert (step.reward, step.info) == (0.0, {'effective': True, **UNBOUGHT})


def test_the_same_search_again_changes_nothing(env):
  state, _ = play(env, env.load('0')[0], 'search[lamp]')
  following, step = env.step(state, 'search[lamp]')
  assert following == state and step.info['effective'] is False


# --- Seeds and boards --------------------------------------------------------


def test_evaluation_and_training_share_no_goal(env):
  evaluation = {env.reset(seed)[1] for seed in range(123, 379)}
  assert len(evaluation) == 256
  training = {env.reset(10_000 + seed)[1] for seed in range(env.goal_count)}
  assert len(training) > 0.6 * env.goal_count
  assert not training & evaluation
  assert {env.reset(10**9 + seed)[1] for seed in range(50)} <= training


def test_boards_are_goals_by_number(env):
  state, text = env.load(' 17\n')
  assert (state.goal, text) == (17, env.render(state))
  assert env.goal(state).text in text
  for board in ('', 'x', '-1', '1.0', '²', str(env.goal_count), '9' * 5000):
    with pytest.raises(ValueError, match='number of a goal, 0 to'):
      env.load(board)


def test_equal_arguments_give_equal_results(env):
  twin = webshop.WebShop(results_per_page=3)
  for seed in (0, 123, 10_000, 10**9):
    state, text = env.reset(seed)
    assert (state, text) == twin.reset(seed)
    assert hash(state) == hash(twin.reset(seed)[0])
    rng = random.Random(seed)
    action = 'search[soft lamp shirt]'
    for _ in range(25):
      before = copy.deepcopy(state)
      following, step = env.step(state, action)
      assert state == before
      assert (following, step) == twin.step(before, action)
      assert step.text == env.render(following)
      kinds = (step.text, step.reward, step.done, step.success)
      assert [type(kind) for kind in kinds] == [str, float, bool, bool]
      assert type(step.info['effective']) is bool
      state = following
      links = [f'click[{name}]' for name in env.page(state).links]
      action = rng.choice(links or ['search[mug]'])


def test_states_are_small(env):
  fields = dataclasses.fields(env_lib.State)
  assert [field.name for field in fields] == [
    'goal',
    'page',
    'query',
    'number',
    'asin',
    'chosen',
  ]
  with pytest.raises(dataclasses.FrozenInstanceError):
    env.reset(0)[0].page = 'done'


def test_shops_are_opened_once(env):
  assert webshop.WebShop(reward='graded')._shop is env._shop
  assert webshop.WebShop(shop_seed=1)._shop is not env._shop


def test_instructions_are_a_field():
  assert webshop.WebShop(instructions='Buy.').instructions == 'Buy.'


# --- Any string --------------------------------------------------------------


def strings(rng, env, state):
  """A valid action, a mutated one, or random bytes."""
  links = [f'click[{name}]' for name in env.page(state).links]
  valid = rng.choice([*links, 'search[soft red lamp]'])
  kind = rng.random()
  if kind < 0.2:
    return valid
  if kind < 0.4:
    data = bytes(rng.randrange(256) for _ in range(rng.randrange(60)))
    errors = rng.choice(['replace', 'surrogateescape'])
    text = data.decode('utf-8', errors)
    return text if rng.random() < 0.5 else f'search[{text}]'
  letters = [*valid]
  for _ in range(rng.randrange(1, 4)):
    place = rng.randrange(len(letters) + 1)
    letters[place : place + rng.randrange(2)] = rng.choice(
      ['', '[', ']', ' ', '|', '\0', 'é', 'İ', '\ud800', '<', 'x', '\n', '9']
    )
  return ''.join(letters)


_SHAPE = re.compile(r'\s*(search|click)\[(.*)\]\s*', re.I | re.S)


def expected_effect(env, state, action):
  """Whether an action may change the state, by another reading of it."""
  match = _SHAPE.fullmatch(action)
  argument = ' '.join(match[2].split()) if match else ''
  if not argument:
    return False
  return (
    match[1].lower() == 'search' or argument.lower() in env.page(state).links
  )


def fuzz(env, seed, count):
  rng = random.Random(seed)
  effects = {True: 0, False: 0}
  state, _ = env.reset(0)
  for number in range(count):
    action = strings(rng, env, state)
    following, step = env.step(state, action)
    assert step.text == env.render(following)
    if not expected_effect(env, state, action):
      assert following == state, action
      assert step.info == {'effective': False, **UNBOUGHT}, action
    is_bought = following.page == 'done'
    assert step.done is is_bought
    assert is_bought or (step.reward, step.success) == (0.0, False)
    effects[following != state] += 1
    state = env.reset(number)[0] if is_bought else following
  assert min(effects.values()) > 0.2 * count


def test_any_string(env):
  fuzz(env, 0, 20_000)


@pytest.mark.slow
def test_more_strings(env):
  fuzz(env, 1, 100_000)


def test_long_strings_take_no_time(env):
  state, _ = env.reset(0)
  for action in (
    'search[' + 'a ' * 10**6 + ']',
    'click[' * 10**5 + ']' * 10**5,
    'search[' + '] ' * 10**6,
    ' ' * 10**6 + 'x',
  ):
    env.step(state, action)


# --- Arguments ---------------------------------------------------------------


@pytest.mark.parametrize(
  'field, wrong',
  [
    ('goals', 'both'),
    ('reward', ''),
    ('results_per_page', 0),
    ('results_per_page', 51),
    ('shop_seed', -1),
    ('products', 9),
    ('products', 10_001),
    ('data', '/nowhere'),
  ],
)
def test_wrong_fields_raise(field, wrong):
  with pytest.raises(ValueError, match=f'^{field} .*{wrong}'):
    webshop.WebShop(**{field: wrong})


@pytest.mark.parametrize('choice', [{'goals': 'human'}, {'index': '/tmp/x'}])
def test_what_needs_data_says_so(choice):
  with pytest.raises(ValueError, match="needs data; it is ''"):
    webshop.WebShop(**choice)


# --- The public set ----------------------------------------------------------


def test_public_goals(public):
  env = webshop.WebShop(data=public)
  assert env.goal_count == 6910
  human = webshop.WebShop(data=public, goals='human')
  assert human.goal_count == 13
  for seed in range(30):
    for kind in (env, human):
      assert kind.reset(seed)[1].startswith('Instruction: ')


def test_public_products_can_be_bought_as_asked(public):
  env = webshop.WebShop(data=public)
  for number in range(0, env.goal_count, 20):
    goal = env.goal(env.load(str(number))[0])
    product = env.product(goal.asin)
    wishes = [value for _, value in goal.options]
    assert reward.score(goal, product, wishes).is_perfect
    assert isinstance(product, catalogue.Product)
    offered = pages.State(number, 'item', asin=goal.asin)
    assert {*wishes} <= {*env.page(offered).links}


def test_any_string_on_the_public_set(public):
  fuzz(webshop.WebShop(data=public), 2, 2_000)
