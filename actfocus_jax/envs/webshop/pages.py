"""Pages of the shop: their texts, and the links of their elements.

    search -> results -> item -> description, features, reviews
                          |
                          +-> done, by `buy now`

A page is a function of the state. It has a text, and links: each element that
can be clicked, with the state that it leads to.
"""

import dataclasses

from actfocus_jax.envs.webshop import catalogue, shops

SEPARATOR = ' [SEP] '
BACK, PREVIOUS, NEXT, BUY = 'back to search', '< prev', 'next >', 'buy now'
SUB_PAGES = ('description', 'features', 'reviews')
# Sorted by name.
Chosen = tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class State:
  """Position of the customer in the shop.

  `page` is 'search', 'results', 'item', one of `SUB_PAGES`, or 'done'; `number`
  counts pages of results from 1; `asin` is the product on the page or bought.
  """

  goal: int
  page: str = 'search'
  query: str = ''
  number: int = 1
  asin: str = ''
  chosen: Chosen = ()


@dataclasses.dataclass(frozen=True)
class Page:
  """Pieces of a text, and the state behind each element (in lower case)."""

  texts: tuple[str, ...]
  links: dict[str, State]


def show(shop: shops.Shop, state: State, results_per_page: int) -> Page:
  """Return the page that belongs to a state."""
  if state.page == 'search':
    return Page((f'Instruction: {shop.goal(state.goal).text}',), {})
  if state.page == 'results':
    return _results(shop, state, results_per_page)
  product = shop.product(state.asin)
  if state.page == 'item':
    return _item(product, state)
  if state.page == 'done':
    return Page((f'You bought: {product.title}',), {})
  return _sub_page(product, state)


def _results(shop: shops.Shop, state: State, per_page: int) -> Page:
  found = shop.find(state.query)
  first = per_page * (state.number - 1)
  shown = [shop.product(asin) for asin in found[first : first + per_page]]
  texts = [f'Page {state.number} (Total results: {len(found)})']
  links = {BACK: State(state.goal)}
  if state.number > 1:
    links[PREVIOUS] = dataclasses.replace(state, number=state.number - 1)
  if first + per_page < len(found):
    links[NEXT] = dataclasses.replace(state, number=state.number + 1)
  for product in shown:
    texts += [product.asin, product.title, product.price_text]
    links[product.asin.lower()] = dataclasses.replace(
      state, page='item', asin=product.asin
    )
  return Page(tuple(texts), links)


def _item(product: catalogue.Product, state: State) -> Page:
  texts = [product.title, f'Price: {product.price_text}']
  if product.rating:
    texts.append(f'Rating: {product.rating}')
  links = {
    BACK: State(state.goal),
    PREVIOUS: dataclasses.replace(state, page='results', asin='', chosen=()),
  }
  for name in SUB_PAGES[: 3 if product.rating else 2]:
    links[name] = dataclasses.replace(state, page=name)
  links[BUY] = dataclasses.replace(state, page='done')
  for name, values in product.options:
    texts.append(f'{name}: {", ".join(values)}')
  for value, following in _choices(product, state).items():
    links.setdefault(value, following)  # A button goes before its namesake.
  links[BUY] = links.pop(BUY)  # The last one.
  texts += [f'Chosen {name}: {value}' for name, value in state.chosen]
  return Page(tuple(texts), links)


def _choices(product: catalogue.Product, state: State) -> dict[str, State]:
  """Return the state behind each option value, in the page's order.

  A value of two options means the first of them without a choice, or else the
  first of them with another choice.
  """
  chosen = dict(state.chosen)
  following = {v: state for _, values in product.options for v in values}
  for name, values in sorted(product.options, key=lambda o: o[0] in chosen):
    for value in values:
      if following[value] == state:
        pairs = tuple(sorted({**chosen, name: value}.items()))
        following[value] = dataclasses.replace(state, chosen=pairs)
  return following


def _sub_page(product: catalogue.Product, state: State) -> Page:
  texts = {
    'description': (product.description,),
    'features': product.bullets,
    'reviews': (f'Rating: {product.rating}',),
  }[state.page]
  links = {
    BACK: State(state.goal),
    PREVIOUS: dataclasses.replace(state, page='item'),
  }
  return Page(tuple(filter(None, texts)) or ('Nothing here.',), links)
