"""Files: bitwise round trips, and books that do not close are refused."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from actfocus_jax.model import architecture, hf
from actfocus_jax.model import mesh as meshes

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
  return meshes.make_mesh(data=2, fsdp=2, tensor=2)


@pytest.mark.parametrize('kind', ['tied', 'untied'])
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


def test_bfloat16_round_trip(tied, mesh, tmp_path):
  config, _, params = tied
  half = meshes.decode_layout(params, _mesh_of(params), jnp.bfloat16)
  hf.save(tmp_path / 'model', config, half)
  _, _, again = hf.load(
    tmp_path / 'model', mesh, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16
  )
  _equal(again, half)
  _, _, wide = hf.load(tmp_path / 'model', mesh, dtype=jnp.bfloat16)
  assert wide['embedding'][...].dtype == jnp.float32
  _equal(wide, jax.tree.map(lambda x: x.astype(jnp.float32), half))


def _mesh_of(params):
  return jax.tree.leaves(params)[0].sharding.mesh


def test_names_and_layout_are_those_of_hugging_face(saved, untied):
  """q_proj.weight is [out, in] there, and ours is [in, out]."""
  _, _, params = untied
  tensors = _read(saved)
  assert len(tensors) == 3 + 2 * 12
  ours = np.asarray(params['layers']['gate']['kernel'][1])
  theirs = tensors['model.layers.1.mlp.gate_proj.weight']
  assert theirs.shape == (48, 32)
  np.testing.assert_array_equal(theirs, ours.T)


def test_sharded_files_are_read(saved, mesh, untied):
  tensors = _read(saved)
  _shard(saved, tensors)
  _, _, params = hf.load(saved, mesh, dtype=jnp.float32)
  _equal(params, untied[2])


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
def test_books_that_do_not_close(saved, mesh, change, message):
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
  _write(saved, tensors)
  with pytest.raises(ValueError, match='holds both'):
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


def test_tied_weights_are_compared_in_every_block():
  class Lazy(np.ndarray):
    def get_shape(self):
      return list(self.shape)

  table = np.arange(10.0).reshape(5, 2).view(Lazy)
  hf._check_tied(table, table.copy(), rows=2)
  for row in range(5):
    other = table.copy()
    other[row, 1] += 1
    with pytest.raises(ValueError, match='differs'):
      hf._check_tied(table, other, rows=2)


def test_an_empty_directory_is_refused(mesh, tmp_path):
  with pytest.raises(ValueError, match='lacks config.json'):
    hf.load(tmp_path, mesh, dtype=jnp.float32)


class _Tokenizer:
  """Looks around while it is being saved, and may fail."""

  def __init__(self, target, fail=False):
    self.target, self.fail = target, fail

  def save_pretrained(self, directory):
    assert not self.target.exists()
    if self.fail:
      raise OSError('disk full')
    (pathlib.Path(directory) / 'tokenizer.json').write_text('{}')


def test_a_half_written_directory_never_looks_whole(tied, tmp_path):
  config, _, params = tied
  target = tmp_path / 'model'
  with pytest.raises(OSError, match='disk full'):
    hf.save(target, config, params, tokenizer=_Tokenizer(target, fail=True))
  assert not target.exists()
  hf.save(target, config, params, tokenizer=_Tokenizer(target))
  assert sorted(path.name for path in tmp_path.iterdir()) == ['model']
  assert sorted(path.name for path in target.iterdir()) == [
    'config.json',
    FILE,
    'tokenizer.json',
  ]
  with pytest.raises(ValueError, match='not empty'):
    hf.save(target, config, params)


def test_transformers_reads_the_config(saved):
  transformers = pytest.importorskip('transformers')
  found = transformers.AutoConfig.from_pretrained(saved)
  assert found.architectures == ['Qwen2ForCausalLM']
  assert found.rope_parameters['rope_theta'] == 100.0
  assert architecture.Config.from_hf(found.to_dict()).rope_theta == 100.0
  assert not found.tie_word_embeddings and found.head_dim == 8


def test_logits_equal_transformers(saved, mesh):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  peer = transformers.AutoModelForCausalLM.from_pretrained(
    saved, dtype=torch.float32
  )
  tokens = np.random.default_rng(0).integers(0, 96, (2, 9), np.int32)
  with torch.no_grad():
    expected = peer(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
  _, graphdef, params = hf.load(saved, mesh, dtype=jnp.float32)
  model = nnx.merge(graphdef, params)
  np.testing.assert_allclose(
    model.unembed(model.hidden(tokens)), expected, atol=2e-5
  )
