"""Shops for the tests: small ones by hand, and the public set where it is."""

import json
import os
import pathlib
import types

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[3]


@pytest.fixture(scope='session')
def public():
  """Directory of the public 1,000-product set."""
  default = ROOT.parent / 'shared' / 'data' / 'webshop-small'
  place = pathlib.Path(os.environ.get('ACTFOCUS_WEBSHOP_DATA') or default)
  if not (place / 'items_shuffle_1000.json').is_file():
    pytest.skip(
      'no public WebShop set: neither ACTFOCUS_WEBSHOP_DATA nor '
      '../shared/data/webshop-small beside the project'
    )
  return str(place)


def record(asin, name='A red thing', **fields):
  """A product as the public files write it, with unused fields."""
  return {
    'name': name,
    'full_description': 'A thing.',
    'pricing': '$9.99',
    'images': ['https://example.com/a.jpg'],
    'product_category': 'Toys › Things',
    'average_rating': '',
    'small_description': ['It is a thing.', 'It is red.'],
    'customization_options': '',
    'asin': asin,
    'category': 'toys',
    'query': 'things',
    'page': 3,
    'seller_id': None,
  } | fields


def values(*names):
  """Values of an option as the public files write them."""
  return [{'value': name, 'is_selected': False, 'url': None} for name in names]


def note(*wanted, instruction='Find me things'):
  return {
    'attributes': [*wanted, 'other'],
    'instruction': instruction,
    'instruction_attributes': list(wanted),
  }


def write(directory, records, notes, human=None, *, ending='.json'):
  """Writes public files; `ending='_1000.json'` makes them the small set."""
  directory = pathlib.Path(directory)
  directory.mkdir(exist_ok=True)
  files = {
    f'items_shuffle{ending}': records,
    f'items_ins_v2{ending}': notes,
    'items_human_ins.json': human,
  }
  for name, content in files.items():
    if content is not None:
      (directory / name).write_text(json.dumps(content))
  return str(directory)


@pytest.fixture(scope='session')
def kit():
  """Functions that make public files: record, values, note, write."""
  return types.SimpleNamespace(
    record=record, values=values, note=note, write=write
  )
