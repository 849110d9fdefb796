"""A small shop made from a seed, so that WebShop runs without any files.

The stages of one product:

1. Its kind comes from a table: department, name, attributes, options.
2. Three of the kind's six attributes are drawn. The title shows the first, the
   description the first two, the features the third; a search finds them all.
3. Some values of each option, and a price, are drawn.
4. Its instruction names two of the three attributes.

About five products share a kind, and most pairs of attributes belong to one of
them or to two. Which one fits also depends on the option values and the price.
"""

import dataclasses

import numpy as np

from actfocus_jax.envs.webshop import catalogue


@dataclasses.dataclass(frozen=True)
class Kind:
  """A kind of product.

  Attributes:
    department: the wide category.
    name: name in the singular; an s at the end makes the plural.
    attributes: possible attributes.
    options: names of its options, keys of `VALUES`.
  """

  department: str
  name: str
  attributes: tuple[str, ...]
  options: tuple[str, ...]


def _kind(department: str, name: str, attributes: str, options: str) -> Kind:
  return Kind(
    department, name, tuple(attributes.split(', ')), tuple(options.split())
  )


# No value is similar to another one by the measure of the reward, and neither
# are two attributes of one kind.
VALUES = {
  'color': ('black', 'white', 'red', 'blue', 'green', 'grey', 'brown', 'pink'),
  'size': ('small', 'medium', 'large', 'tiny', 'giant'),
  'number': ('6', '7', '8', '9', '10', '11'),
  'scent': ('rose', 'mint', 'lemon', 'vanilla', 'cedar'),
  'flavor': ('honey', 'cherry', 'ginger', 'apple', 'plain'),
  'pack': ('single', 'double', 'family'),
  'length': ('short', 'long', 'half'),
}
KINDS = (
  _kind(
    'clothing',
    'shirt',
    'soft cotton, slim fit, long sleeve, quick dry, button down, high collar',
    'color size',
  ),
  _kind(
    'clothing',
    'jacket',
    'waterproof, hooded, fleece lined, light weight, slim fit, wind proof',
    'color size',
  ),
  _kind(
    'clothing',
    'skirt',
    'high waist, pleated, stretchy, soft cotton, side pocket, quick dry',
    'color size',
  ),
  _kind(
    'clothing',
    'sock',
    'soft cotton, non slip, thick wool, quick dry, arch support, seamless',
    'color pack',
  ),
  _kind(
    'shoes',
    'sneaker',
    'non slip, arch support, memory foam, rubber sole, light weight, vegan',
    'color number',
  ),
  _kind(
    'shoes',
    'boot',
    'waterproof, steel toe, rubber sole, fleece lined, non slip, side zip',
    'color number',
  ),
  _kind(
    'shoes',
    'sandal',
    'arch support, open toe, vegan, quick dry, ankle strap, memory foam',
    'color number',
  ),
  _kind(
    'home',
    'lamp',
    'dimmable, solar powered, touch control, energy saving, foldable, cordless',
    'color size',
  ),
  _kind(
    'home',
    'rug',
    'non slip, machine washable, thick wool, hand woven, stain proof, vegan',
    'color size',
  ),
  _kind(
    'home',
    'pillow',
    'memory foam, machine washable, cooling gel, soft cotton, firm, foldable',
    'size',
  ),
  _kind(
    'home',
    'curtain',
    'blackout, machine washable, noise reducing, pleated, sheer, stain proof',
    'color length',
  ),
  _kind(
    'kitchen',
    'mug',
    'dishwasher safe, double wall, hand painted, spill proof, lead free, tall',
    'color pack',
  ),
  _kind(
    'kitchen',
    'pan',
    'non stick, dishwasher safe, cast iron, lead free, glass lid, oven safe',
    'size',
  ),
  _kind(
    'kitchen',
    'bottle',
    'spill proof, double wall, wide mouth, lead free, light weight, foldable',
    'color size',
  ),
  _kind(
    'electronics',
    'speaker',
    'waterproof, wireless, deep bass, solar powered, voice control, foldable',
    'color',
  ),
  _kind(
    'electronics',
    'charger',
    'fast charging, wireless, foldable, dual port, solar powered, travel ready',
    'color length',
  ),
  _kind(
    'electronics',
    'keyboard',
    'wireless, back lit, silent keys, spill proof, foldable, wrist rest',
    'color',
  ),
  _kind(
    'beauty',
    'soap',
    'sulfate free, cruelty free, vegan, dry skin, hand made, deep cleansing',
    'scent pack',
  ),
  _kind(
    'beauty',
    'lotion',
    'dry skin, fast absorbing, vegan, cruelty free, oil free, sun protection',
    'scent size',
  ),
  _kind(
    'beauty',
    'candle',
    'soy wax, hand made, long burning, smoke free, lead free, gift boxed',
    'scent size',
  ),
  _kind(
    'food',
    'tea',
    'caffeine free, organic, loose leaf, sugar free, fair trade, gift boxed',
    'flavor pack',
  ),
  _kind(
    'food',
    'cookie',
    'gluten free, sugar free, vegan, organic, nut free, hand made',
    'flavor pack',
  ),
  _kind(
    'outdoor',
    'tent',
    'waterproof, wind proof, light weight, easy setup, fire proof, solar roof',
    'color size',
  ),
  _kind(
    'outdoor',
    'backpack',
    'waterproof, laptop sleeve, light weight, side pocket, lockable, foldable',
    'color size',
  ),
)
_NAMES = """\
Norvik Altus Bramo Cordal Delmar Ekko Fenwick Galvo Hartel Isko Jorvan Kelso
Lumera Mondo Nexa Orbit Pavo Quill Ravik Solano Tarn Umber Veltro Wexa Yarrow
Zeno
"""
BRANDS = tuple(_NAMES.split())


def make(seed: int, count: int) -> tuple[catalogue.Product, ...]:
  """Make the products of a shop.

  Args:
    seed: fixes them.
    count: number of products.

  Returns:
    The products, kinds mixed.
  """
  rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(3,)))
  digits = max(3, len(str(2 * count)))
  numbers = rng.choice(10**digits, size=count, replace=False)
  return tuple(
    _product(KINDS[place % len(KINDS)], f'B{number:0{digits}d}', rng)
    for place, number in zip(rng.permutation(count), numbers, strict=True)
  )


def _product(
  kind: Kind, asin: str, rng: np.random.Generator
) -> catalogue.Product:
  first, second, third = _draw(kind.attributes, 3, rng)
  wanted = _draw((first, second, third), 2, rng)
  price = 5.0 * int(rng.integers(1, 25))
  return catalogue.Product(
    asin=asin,
    title=f'{_draw(BRANDS, 1, rng)[0]} {first} {kind.name}',
    description=f'This {kind.name} is {first}, {second}.',
    bullets=(f'Known for: {third}.',),
    options=tuple(
      (name, _draw(VALUES[name], int(rng.integers(2, 4)), rng))
      for name in kind.options
    ),
    price=price,
    price_text=f'${price:.2f}',
    query=f'{kind.name}s',
    categories=(kind.department, f'{kind.name}s'),
    attributes=(first, second, third),
    instruction=f'Find me {", ".join(wanted)} {kind.name}s',
    wanted=wanted,
  )


def _draw(
  choices: tuple[str, ...], count: int, rng: np.random.Generator
) -> tuple[str, ...]:
  places = rng.choice(len(choices), size=count, replace=False)
  return tuple(choices[place] for place in places)
