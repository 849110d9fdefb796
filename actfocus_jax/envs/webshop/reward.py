"""The reward of a purchase: kind, attributes, options and price.

    raw = r_type * (attribute hits + option hits + price within the cap)
          / (attributes of the goal + options of the goal + 1)

Source: WebShop, arXiv 2207.01206, its reward, with two differences. Nouns are
found without a tagger: words of two letters or more, without function words. A
colour is a whole word, so `standard` does not contain `tan`, and a clicked
value that equals the goal's always counts.
"""

import dataclasses
import re
from collections.abc import Iterable

from actfocus_jax.envs.webshop import catalogue, goals

_SIMILAR = 85.0
_NOUN = re.compile(r'[^\W\d_]{2,}')
_WORD = re.compile(r'[^\W_]+')
_FUNCTION_WORDS = """\
about above after again against all also am an and any are as at be because
been before being below between both but by can could did do does doing down
during each else etc few for from further had has have having he her here
hers him his how if in into is it its itself just may me might more most must
my no nor not now of off on once only onto or other our ours out over own per
plus same shall she should so some such than that the their theirs them then
there these they this those through to too under until up upon us very via
was we were what when where which while who whom whose why will with within
without would yet you your yours
"""
_COLOURS = """\
amber apricot aqua aquamarine ash azure beige black blonde blue blush bronze
brown burgundy camel camo camouflage caramel champagne charcoal cherry
chestnut chocolate cobalt coffee copper coral cream crimson cyan denim emerald
espresso fuchsia ginger gold golden gray green grey indigo ivory jade khaki
lavender leopard lilac lime magenta mahogany maroon mauve mint mocha
multicolor mustard navy nude ochre olive orange peach pearl pink plum purple
rainbow red rose ruby rust salmon sand sapphire scarlet silver slate tan taupe
teal terracotta turquoise violet walnut white wine yellow
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
COLOURS = frozenset(_COLOURS.split())


@dataclasses.dataclass(frozen=True)
class Score:
  """Score of a purchase.

  Attributes:
    raw: the whole, in [0, 1].
    r_type: match of the kind of product, 0, 0.1, 0.5 or 1.
    attributes: share of the goal's attributes that the product has.
    options: share of the goal's options that were chosen; 1 without options.
    price: 1 within the cap, else 0.
  """

  raw: float
  r_type: float
  attributes: float
  options: float
  price: float

  @property
  def is_perfect(self) -> bool:
    """True if every part is met."""
    return self.raw >= 1.0


def score(
  goal: goals.Goal, bought: catalogue.Product, chosen: Iterable[str]
) -> Score:
  """Judge a purchase of a product with the chosen values of its options."""
  attributes = sum(has_attribute(bought, name) for name in goal.attributes)
  values = tuple(chosen)
  options = sum(
    any(option_matches(pair, value) for value in values)
    for pair in goal.options
  )
  price = float(goal.price_cap is None or bought.price <= goal.price_cap)
  r_type = type_score(goal, bought)
  wishes = len(goal.attributes) + len(goal.options) + 1
  return Score(
    raw=r_type * (attributes + options + price) / wishes,
    r_type=r_type,
    attributes=attributes / len(goal.attributes) if goal.attributes else 1.0,
    options=options / len(goal.options) if goal.options else 1.0,
    price=price,
  )


def type_score(goal: goals.Goal, bought: catalogue.Product) -> float:
  """Score the kind of product: 1, 0.5, 0.1 or 0.

  The title's score is the share of the nouns in the goal's title that the
  bought product's title has too. A score of 0 gives 0, one below 0.1 gives 0.1.
  Otherwise equal queries, two shared categories or a title's score above 0.2
  give 1, and anything else 0.5.
  """
  wanted = nouns(goal.title)
  shared = wanted & nouns(bought.title)
  # A title without any noun decides nothing.
  title = len(shared) / len(wanted) if wanted else 0.2
  if title == 0.0:
    return 0.0
  if title < 0.1:
    return 0.1
  alike = len(set(goal.categories) & set(bought.categories))
  is_right = goal.query == bought.query or alike >= 2 or title > 0.2
  return 1.0 if is_right else 0.5


def nouns(title: str) -> set[str]:
  """Return the words of a title that may be nouns, in lower case."""
  return set(_NOUN.findall(title.lower())) - FUNCTION_WORDS


def has_attribute(product: catalogue.Product, name: str) -> bool:
  """Return whether a product has an attribute, by its list or its texts."""
  if any(_are_similar(own, name) for own in product.attributes):
    return True
  texts = (product.title, ' '.join(product.bullets), product.description)
  return any(name.lower() in text.lower() for text in texts)


def option_matches(option: tuple[str, str], value: str) -> bool:
  """Return whether a chosen value fits an option (name, value) of a goal.

  The name counts as part of the text: it keeps apart many values that differ
  in one word only. A text with a colour word is first reduced to its first one.
  """
  wanted = ' '.join(filter(None, option))
  return value == option[1] or _are_similar(_colour(wanted), _colour(value))


def _colour(text: str) -> str:
  words = _WORD.findall(text.lower())
  return next((word for word in words if word in COLOURS), text)


def _are_similar(one: str, other: str) -> bool:
  from rapidfuzz import fuzz, utils

  ratio = fuzz.token_set_ratio(one, other, processor=utils.default_process)
  return ratio > _SIMILAR
