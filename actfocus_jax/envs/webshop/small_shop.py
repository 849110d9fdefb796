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
from collections.abc import Iterator

import numpy as np

from actfocus_jax.envs.webshop import catalogue


@dataclasses.dataclass(frozen=True)
class Kind:
  """A kind of product; its options are keys of `VALUES`."""

  department: str
  name: str
  attributes: tuple[str, ...]
  options: tuple[str, ...]


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
# Department and name: options of a kind, then its attributes.
_KINDS = """\
clothing shirt: color size
  soft cotton, slim fit, long sleeve, quick dry, button down, high collar
clothing jacket: color size
  waterproof, hooded, fleece lined, light weight, slim fit, wind proof
clothing skirt: color size
  high waist, pleated, stretchy, soft cotton, side pocket, quick dry
clothing sock: color pack
  soft cotton, non slip, thick wool, quick dry, arch support, seamless
shoes sneaker: color number
  non slip, arch support, memory foam, rubber sole, light weight, vegan
shoes boot: color number
  waterproof, steel toe, rubber sole, fleece lined, non slip, side zip
shoes sandal: color number
  arch support, open toe, vegan, quick dry, ankle strap, memory foam
home lamp: color size
  dimmable, solar powered, touch control, energy saving, foldable, cordless
home rug: color size
  non slip, machine washable, thick wool, hand woven, stain proof, vegan
home pillow: size
  memory foam, machine washable, cooling gel, soft cotton, firm, foldable
home curtain: color length
  blackout, machine washable, noise reducing, pleated, sheer, stain proof
kitchen mug: color pack
  dishwasher safe, double wall, hand painted, spill proof, lead free, tall
kitchen pan: size
  non stick, dishwasher safe, cast iron, lead free, glass lid, oven safe
kitchen bottle: color size
  spill proof, double wall, wide mouth, lead free, light weight, foldable
electronics speaker: color
  waterproof, wireless, deep bass, solar powered, voice control, foldable
electronics charger: color length
  fast charging, wireless, foldable, dual port, solar powered, travel ready
electronics keyboard: color
  wireless, back lit, silent keys, spill proof, foldable, wrist rest
beauty soap: scent pack
  sulfate free, cruelty free, vegan, dry skin, hand made, deep cleansing
beauty lotion: scent size
  dry skin, fast absorbing, vegan, cruelty free, oil free, sun protection
beauty candle: scent size
  soy wax, hand made, long burning, smoke free, lead free, gift boxed
food tea: flavor pack
  caffeine free, organic, loose leaf, sugar free, fair trade, gift boxed
food cookie: flavor pack
  gluten free, sugar free, vegan, organic, nut free, hand made
outdoor tent: color size
  waterproof, wind proof, light weight, easy setup, fire proof, solar roof
outdoor backpack: color size
  waterproof, laptop sleeve, light weight, side pocket, lockable, foldable
"""
_NAMES = """\
Norvik Altus Bramo Cordal Delmar Ekko Fenwick Galvo Hartel Isko Jorvan Kelso
Lumera Mondo Nexa Orbit Pavo Quill Ravik Solano Tarn Umber Veltro Wexa Yarrow
Zeno
"""
BRANDS = tuple(_NAMES.split())


def _kinds() -> Iterator[Kind]:
  lines = iter(_KINDS.splitlines())
  for heading, attributes in zip(lines, lines, strict=True):
    department, name, *options = heading.replace(':', '').split()
    yield Kind(
      department, name, tuple(attributes.strip().split(', ')), tuple(options)
    )


KINDS = tuple(_kinds())


def make(seed: int, count: int) -> tuple[catalogue.Product, ...]:
  """Make the products of a shop, kinds mixed."""
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
