"""Public files: found, streamed, cleaned."""

import json
import tracemalloc

import pytest

from actfocus_jax.envs.webshop import catalogue

# --- Cleaning ----------------------------------------------------------------


def test_product_by_hand(kit):
  record = kit.record(
    'B01',
    name='  Soft\n Shirt ',
    full_description='Good\tfor  you',
    pricing='$1,299.00',
    product_category='Clothing › Men  ›  Shirts',
    average_rating=4.5,
    small_description=['Made of cotton. ', ' ', None, 'Red'],
    query=' Mens Shirts',
    customization_options={
      'Color': kit.values('Red/Blue', ' BLACK  '),
      'Size': None,
      'Style': [],
      'Number of Items': [{'value': 2}, '3', {'value': None}, {}],
      'Shape': [{'value': ['a']}, {'value': 'a||b'}],
    },
  )
  product = catalogue.product_of(
    record,
    {
      'attributes': ['soft ', '', 'cotton'],
      'instruction': 'Find me soft  shirts',
      'instruction_attributes': ['soft'],
    },
  )
  assert product == catalogue.Product(
    asin='B01',
    title='Soft Shirt',
    description='Good for you',
    bullets=('Made of cotton.', 'Red'),
    options=(
      ('color', ('red | blue', 'black')),
      ('number of items', ('2', '3')),
      ('shape', ('a| |b',)),
    ),
    price=1299.0,
    price_text='$1299.00',
    query='mens shirts',
    categories=('Clothing', 'Men', 'Shirts'),
    attributes=('soft', 'cotton'),
    rating='4.5',
    instruction='Find me soft shirts',
    wanted=('soft',),
  )
  assert hash(product)


@pytest.mark.parametrize('asin', [None, ' ', 'nan', 'B' * 11])
def test_record_without_a_usable_asin_is_dropped(kit, asin):
  assert catalogue.product_of(kit.record(asin), {}) is None


@pytest.mark.parametrize(
  'pricing, price, text',
  [
    ('$9.99', 9.99, '$9.99'),
    ('from $.50', 0.5, '$0.50'),
    (12.5, 12.5, '$12.50'),
    ('call us', 100.0, '$100.00'),
    (float('nan'), 100.0, '$100.00'),
    (-3, 100.0, '$100.00'),
    ('$' + '9' * 400, 100.0, '$100.00'),
  ],
)
def test_price_by_hand(pricing, price, text):
  assert catalogue.read_price(pricing, 'B01') == (price, text)


@pytest.mark.parametrize('pricing', ['$30.00 to $10.00', '$10 $30 $900'])
def test_price_range_gives_a_price_within_it(pricing):
  asins = [f'B{i}' for i in range(400)]
  found = [catalogue.read_price(pricing, asin) for asin in asins]
  assert {text for _, text in found} == {'$10.00 to $30.00'}
  prices = [price for price, _ in found]
  assert 10 < min(prices) < 10.5 and 29.5 < max(prices) < 30
  assert abs(sum(prices) / 400 - 20) < 3 * (20 / 12**0.5) / 400**0.5
  assert found == [catalogue.read_price(pricing, asin) for asin in asins]


# --- Streaming ---------------------------------------------------------------

LISTS = [
  ' [ ] ',
  '[12345, 67890 , -1.5e10]',
  '["a,]", "\\"", "é√𝄞\\ud834\\udd1e"]',
  '[{"a": [1, {"b": "]}"}]}, null, true]\n',
]
OBJECTS = ['{}', '{"a": 12, "b": {"c": []}}', ' {"√": "}", "k" : [123456]}\n']


def write_text(tmp_path, text, encoding='utf-8'):
  path = tmp_path / 'file.json'
  path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
  return path


@pytest.mark.parametrize('chunk', [1, 1000])
@pytest.mark.parametrize('text', LISTS + OBJECTS)
def test_stream_equals_json(tmp_path, monkeypatch, text, chunk):
  monkeypatch.setattr(catalogue, '_CHUNK', chunk)
  path = write_text(tmp_path, text)
  expected = json.loads(text)
  done = []
  found = list(catalogue.stream(path, text.strip()[0], done.append))
  is_list = isinstance(expected, list)
  assert found == (expected if is_list else list(expected.items()))
  assert done == sorted(done)
  assert done[-1] >= len(text.rstrip().encode())


def test_stream_needs_memory_for_one_element(tmp_path, monkeypatch):
  monkeypatch.setattr(catalogue, '_CHUNK', 4096)
  path = write_text(tmp_path, json.dumps(['x' * 1000] * 2000))
  tracemalloc.start()
  assert sum(1 for _ in catalogue.stream(path, '[')) == 2000
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 100_000 < path.stat().st_size


@pytest.mark.parametrize('text', LISTS[1:] + OBJECTS[1:])
def test_truncated_file_is_refused(tmp_path, text):
  data = text.rstrip().encode()
  opening = text.strip()[0]
  for length in range(len(data)):
    path = write_text(tmp_path, data[:length])
    with pytest.raises(ValueError, match='file.json is not the JSON .* again'):
      list(catalogue.stream(path, opening))
  assert list(catalogue.stream(write_text(tmp_path, data), opening))


@pytest.mark.parametrize(
  'data',
  ['{"a": 1}', '', 'html', '[1 2]', '[1,]', '[{"a" 1}]', '[1}', b'["\xff"]'],
)
def test_other_file_is_refused(tmp_path, data):
  path = write_text(tmp_path, data)
  with pytest.raises(ValueError, match='is not the JSON that belongs there'):
    list(catalogue.stream(path, '['))


# --- Readers -----------------------------------------------------------------


def test_products_get_their_notes(kit, tmp_path):
  records = [kit.record(' B01 '), kit.record('nan'), kit.record('B02')]
  data = kit.write(tmp_path, records, {'B01 ': kit.note('soft')})
  files = catalogue.find(data, human=False)
  notes = dict(catalogue.read_notes(files.notes))
  products = catalogue.read_products(files, lambda a: notes.get(a, {}))
  assert [(p.asin, p.wanted) for p in products] == [
    ('B01', ('soft',)),
    ('B02', ()),
  ]


@pytest.mark.parametrize('many', [{}, [3]])
def test_other_instructions_are_refused(tmp_path, many):
  path = write_text(tmp_path, json.dumps({'B01': [{}], 'B02': many}))
  with pytest.raises(ValueError, match="holds no instructions: 'B02'"):
    list(catalogue.read_instructions(path))


# --- Where the files are -----------------------------------------------------


@pytest.mark.parametrize(
  'gone, full, message',
  [
    ('items_shuffle', True, 'holds no items_shuffle.json$'),
    ('items_human', False, 'holds no items_human_ins.json$'),
  ],
)
def test_missing_file_is_named(kit, tmp_path, gone, full, message):
  kit.write(tmp_path, [], {}, {})
  assert catalogue.find(str(tmp_path), human=True, full=full).is_full
  for path in tmp_path.glob(f'{gone}*'):
    path.unlink()
  with pytest.raises(ValueError, match=message) as error:
    catalogue.find(str(tmp_path), human=True, full=full)
  assert str(tmp_path) in str(error.value)
