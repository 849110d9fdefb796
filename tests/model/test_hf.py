"""Files: bitwise round trips, and books that do not close are refused."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from actfocus_jax.model import hf
from actfocus_jax.parallel import mesh as mesh_lib

FILE = 'model.safetensors'
INDEX = 'model.safetensors.index.json'


def _equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def _read(directory):
  return safetensors.numpy.load_file(directory / FILE)


def _write(directory, tensors, file=FILE):
  safetensors.numpy.save_file(tensors, directory / file)


@pytest.fixture
def saved(untied, tmp_path):
  config, _, params = untied
  hf.save(tmp_path / 'model', config, params)
  return tmp_path / 'model'


@pytest.fixture
def mesh():
  return mesh_lib.make_mesh(data=2, fsdp=2, tensor=2)


@pytest.mark.parametrize('kind', ['tied', 'untied', 'qwen3'])
def test_load_of_save_is_bitwise(kind, request, mesh, tmp_path):
  config, graphdef, params = request.getfixturevalue(kind)
  hf.save(tmp_path / 'model', config, params)
  again = hf.load(tmp_path / 'model', mesh, dtype=jnp.float32)
  assert again[:2] == (config, graphdef)
  _equal(again[2], params)
  kernel = again[2]['layers']['down']['kernel'][...]
  assert kernel.addressable_shards[0].data.shape == (2, 24, 16)
  # And from eight devices back into files.
  hf.save(tmp_path / 'again', config, again[2])
  assert (tmp_path / 'again' / FILE).read_bytes() == (
    tmp_path / 'model' / FILE
  ).read_bytes()


def _shard(directory, tensors):
  """Splits model.safetensors into two files and an index."""
  names = sorted(tensors)
  parts = {'a.safetensors': names[::2], 'b.safetensors': names[1::2]}
  for file, part in parts.items():
    _write(directory, {name: tensors[name] for name in part}, file)
  (directory / FILE).unlink()
  listed = {name: file for file, part in parts.items() for name in part}
  (directory / INDEX).write_text(json.dumps({'weight_map': listed}))
  return listed


def _drop(tensors):
  del tensors['model.layers.1.mlp.up_proj.weight']


def _add(tensors):
  tensors['model.layers.2.mlp.up_proj.weight'] = np.ones(3, np.float32)


def _transpose(tensors):
  name = 'model.layers.0.mlp.up_proj.weight'
  tensors[name] = np.ascontiguousarray(tensors[name].T)


def _integers(tensors):
  tensors['model.norm.weight'] = tensors['model.norm.weight'].astype(np.int8)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (_drop, 'layers.1.mlp.up_proj.weight is missing'),
    (_add, 'layers.2.mlp.up_proj.weight is unexpected'),
    (_transpose, r'has shape \(32, 48\), not \(48, 32\)'),
    (_integers, 'model.norm.weight is I8'),
  ],
)
def test_mismatched_tensors_are_refused(saved, mesh, change, message):
  tensors = _read(saved)
  change(tensors)
  _write(saved, tensors)
  with pytest.raises(ValueError, match=message):
    hf.load(saved, mesh, dtype=jnp.float32)


def test_duplicates_and_wrong_indices(saved, mesh):
  tensors = _read(saved)
  listed = _shard(saved, tensors)
  name = 'lm_head.weight'
  other = next(f for f in set(listed.values()) if f != listed[name])
  held = safetensors.numpy.load_file(saved / other)
  _write(saved, held | {name: tensors[name]}, other)
  with pytest.raises(ValueError, match='lm_head.weight .* a duplicate'):
    hf.load(saved, mesh, dtype=jnp.float32)
  _write(saved, held, other)
  unlisted = {k: v for k, v in listed.items() if k != name}
  (saved / INDEX).write_text(json.dumps({'weight_map': unlisted}))
  with pytest.raises(ValueError, match='lm_head.weight is unexpected'):
    hf.load(saved, mesh, dtype=jnp.float32)
  (saved / INDEX).write_text(json.dumps({'weight_map': listed}))
  (saved / other).unlink()
  with pytest.raises(ValueError, match=f'lacks {other}'):
    hf.load(saved, mesh, dtype=jnp.float32)


def test_tied_weights_must_agree(tied, mesh, tmp_path):
  config, _, params = tied
  hf.save(tmp_path / 'model', config, params)
  tensors = _read(tmp_path / 'model')
  head = tensors['model.embed_tokens.weight'].copy()
  _write(tmp_path / 'model', tensors | {'lm_head.weight': head})
  _equal(hf.load(tmp_path / 'model', mesh, dtype=jnp.float32)[2], params)
  head[95, 31] += 1e-3
  _write(tmp_path / 'model', tensors | {'lm_head.weight': head})
  with pytest.raises(ValueError, match='lm_head.weight differs'):
    hf.load(tmp_path / 'model', mesh, dtype=jnp.float32)


class _Tokenizer:
  """Checks that the target does not exist yet, and may fail."""

  eos_token_id, pad_token_id = 5, 3

  def __init__(self, target, fail=False):
    self.target, self.fail = target, fail

  def save_pretrained(self, directory):
    assert not self.target.exists()
    if self.fail:
      raise OSError('disk full')
    (pathlib.Path(directory) / 'tokenizer.json').write_text('{}')


def test_failed_save_leaves_no_directory(tied, tmp_path):
  config, _, params = tied
  target = tmp_path / 'model'
  with pytest.raises(OSError, match='disk full'):
    hf.save(target, config, params, tokenizer=_Tokenizer(target, fail=True))
  assert not target.exists()
  hf.save(target, config, params, tokenizer=_Tokenizer(target))
  assert sorted(path.name for path in tmp_path.iterdir()) == ['model']
  assert sorted(path.name for path in target.iterdir()) == [
    'config.json',
    'generation_config.json',
    FILE,
    'tokenizer.json',
  ]
  written = json.loads((target / 'generation_config.json').read_text())
  assert written == {'eos_token_id': 5, 'pad_token_id': 3}
  with pytest.raises(ValueError, match='not empty'):
    hf.save(target, config, params)


def test_half_precision_files(untied, saved, mesh, tmp_path):
  """Any float type on disk, any in memory; each value rounded once."""
  config, _, params = untied
  for name in ('bfloat16', 'float16'):
    target = tmp_path / name
    hf.save(target, config, params, dtype=name)
    assert (target / FILE).stat().st_size < (saved / FILE).stat().st_size
    raw = json.loads((target / 'config.json').read_text())
    assert raw['dtype'] == raw['torch_dtype'] == name
    _, _, again = hf.load(target, mesh, dtype=jnp.float32)
    rounded = jax.tree.map(
      lambda x, name=name: np.asarray(x).astype(name).astype(np.float32), params
    )
    _equal(again, rounded)


def test_large_models_are_written_in_shards(untied, saved, mesh, tmp_path):
  config, _, params = untied
  whole, limit = _read(saved), 20_000
  target = tmp_path / 'shards'
  hf.save(target, config, params, max_shard_bytes=limit)
  files = sorted(target.glob('*.safetensors'))
  count = len(files)
  assert count > 2 and not (target / FILE).exists()
  assert files[0].name == f'model-00001-of-{count:05d}.safetensors'
  index = json.loads((target / INDEX).read_text())
  assert index['weight_map'].keys() == whole.keys()
  sizes = []
  for file in files:
    part = safetensors.numpy.load_file(file)
    sizes.append(sum(x.nbytes for x in part.values()))
    for name, tensor in part.items():
      assert index['weight_map'][name] == file.name
      np.testing.assert_array_equal(tensor, whole[name])
  assert max(sizes) <= limit
  assert index['metadata']['total_size'] == sum(sizes)
  _equal(hf.load(target, mesh, dtype=jnp.float32)[2], params)


def test_a_trained_copy_keeps_what_belongs_to_its_source(
  untied, saved, mesh, tmp_path
):
  config, _, params = untied
  kept = {
    'tokenizer.json': '{"model": {}}',
    'tokenizer_config.json': '{}',
    'chat_template.jinja': 'x',
    'generation_config.json': '{"eos_token_id": [5, 7]}',
    'LICENSE': 'Apache-2.0',
  }
  for name, text in kept.items():
    (saved / name).write_text(text)
  (saved / 'optimizer.pt').write_text('no')
  raw = json.loads((saved / 'config.json').read_text()) | {'bos_token_id': 1}
  (saved / 'config.json').write_text(json.dumps(raw))
  target = tmp_path / 'copy'
  changed = jax.tree.map(lambda x: x + 1, params)
  hf.save(target, config, changed, source=saved, dtype='bfloat16')
  assert {p.name for p in target.iterdir()} == {*kept, FILE, 'config.json'}
  for name, text in kept.items():
    assert (target / name).read_text() == text
  written = json.loads((target / 'config.json').read_text())
  half = {'dtype': 'bfloat16', 'torch_dtype': 'bfloat16'}
  assert written == raw | half
  assert _read(target)['model.norm.weight'].dtype == jnp.bfloat16
  for file in target.iterdir():
    assert file.stat().st_mode & 0o044 == 0o044, file  # others may read it
  other = dataclasses.replace(config, rope_theta=7.0)
  with pytest.raises(ValueError, match='another architecture'):
    hf.save(tmp_path / 'other', other, params, source=saved)
  assert not (tmp_path / 'other').exists()


def test_save_refuses_numbers_too_large_for_the_dtype(untied, tmp_path):
  config, _, params = untied
  large = jax.tree.map(lambda x: x.at[..., -1].set(1e5), params)
  with pytest.raises(ValueError, match='tensor .* too large for float16'):
    hf.save(tmp_path / 'model', config, large, dtype='float16')
  assert list(tmp_path.iterdir()) == []
  hf.save(tmp_path / 'model', config, large, dtype='bfloat16')


def test_nonfinite_numbers_are_refused(saved, mesh):
  tensors = _read(saved)
  name = 'model.layers.1.self_attn.k_proj.bias'
  tensors[name][3] = -np.inf
  _write(saved, tensors)
  with pytest.raises(ValueError, match=f'{name} holds numbers that are not fi'):
    hf.load(saved, mesh, dtype=jnp.float32)
