"""Pages: every text and every link of a little shop, by hand."""

import pytest

from actfocus_jax.envs.webshop import catalogue, pages, shops

SHIRT = catalogue.Product(
  asin='B01',
  title='Soft Shirt',
  description='A shirt.',
  bullets=('Warm.', 'Washable.'),
  options=(('size', ('s', 'm')), ('color', ('red', 'blue'))),
  price=9.5,
  price_text='$9.50',
  rating='4.5',
  instruction='Find me soft shirts',
  wanted=('soft',),
)
SOCKS = [
  catalogue.Product(asin=f'C0{i}', title=f'Sock {i}', price_text=f'${i}.00')
  for i in range(1, 6)
]


@pytest.fixture(scope='module')
def shop():
  return shops.MemoryShop([SHIRT, *SOCKS])


def at(page, **fields):
  return pages.State(0, page, **fields)


def show(shop, state):
  return pages.show(shop, state, results_per_page=2)


SOCK = 'sock'
START = pages.State(0)
ITEM = at('item', query=SOCK, number=2, asin='B01')


@pytest.mark.parametrize(
  'number, texts, ways',
  [
    (2, 'C03 Sock_3 $3.00 C04 Sock_4 $4.00', {'< prev': 1, 'next >': 3}),
    (3, 'C05 Sock_5 $5.00', {'< prev': 2}),
  ],
)
def test_results_page_by_hand(shop, number, texts, ways):
  page = show(shop, at('results', query=SOCK, number=number))
  items = [text.replace('_', ' ') for text in texts.split()]
  assert page.texts == (f'Page {number} (Total results: 5)', *items)
  expected = {'back to search': START}
  for name, there in ways.items():
    expected[name] = at('results', query=SOCK, number=there)
  for asin in items[::3]:
    expected[asin.lower()] = at('item', query=SOCK, number=number, asin=asin)
  assert page.links == expected
  assert list(page.links) == list(expected)


def test_options_are_chosen_changed_and_kept(shop):
  state, seen = ITEM, []
  for value in ('m', 'red', 'red', 's', 'features', '< prev', 'blue'):
    state = show(shop, state).links[value]
    seen.append(dict(state.chosen))
  assert seen == [
    {'size': 'm'},
    {'size': 'm', 'color': 'red'},
    {'size': 'm', 'color': 'red'},
    {'size': 's', 'color': 'red'},
    {'size': 's', 'color': 'red'},
    {'size': 's', 'color': 'red'},
    {'size': 's', 'color': 'blue'},
  ]
  page = show(shop, state)
  assert page.texts[-2:] == ('Chosen color: blue', 'Chosen size: s')
  assert page.links['buy now'].chosen == (('color', 'blue'), ('size', 's'))
  # Whoever leaves the product forgets its options.
  for way in ('< prev', 'back to search'):
    assert page.links[way].chosen == ()


# --- Awkward options ---------------------------------------------------------


def clicked(shop, state, *values):
  for value in values:
    state = show(shop, state).links[value]
  return dict(state.chosen)


def test_value_of_two_options_chooses_the_open_one():
  options = (('a', ('1', '2')), ('b', ('1', '2')))
  shop = shops.MemoryShop([catalogue.Product('B01', 'Thing', options=options)])
  state = at('item', asin='B01')
  assert clicked(shop, state, '1') == {'a': '1'}
  assert clicked(shop, state, '1', '1') == {'a': '1', 'b': '1'}
  assert clicked(shop, state, '2', '1') == {'a': '2', 'b': '1'}
  assert clicked(shop, state, '1', '2') == {'a': '1', 'b': '2'}
  # Every combination can be reached from every other one.
  assert clicked(shop, state, '2', '2', '1', '1', '2') == {'a': '2', 'b': '1'}
