"""Hugging Face directories <-> sharded parameters, both ways, without torch.

The name map lists, for every parameter path, the tensors that hold it in the
files (stacked layers: one tensor per layer) and whether they are transposed
there. It is checked in both directions: every parameter has a tensor and every
tensor a parameter. Each device reads only the slices that it holds.

A file is open only while a slice of it is copied, and one parameter (all its
layers) is read at a time; writing, one tensor and its shard. So the host never
holds the model beside the devices.
"""

import contextlib
import itertools
import json
import pathlib
import secrets
import shutil
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from actfocus_jax.model import architecture, files, transformer
from actfocus_jax.parallel import mesh as mesh_lib

# Parameter path -> (name in the files, transposed there).
_HEAD = 'lm_head.weight'
_TOP = {
  'embedding': ('model.embed_tokens.weight', False),
  'norm/scale': ('model.norm.weight', False),
  'head': (_HEAD, True),
}
_LAYER = {
  'attention_norm/scale': ('input_layernorm.weight', False),
  'mlp_norm/scale': ('post_attention_layernorm.weight', False),
  'q/kernel': ('self_attn.q_proj.weight', True),
  'q/bias': ('self_attn.q_proj.bias', False),
  'q_norm/scale': ('self_attn.q_norm.weight', False),
  'k/kernel': ('self_attn.k_proj.weight', True),
  'k/bias': ('self_attn.k_proj.bias', False),
  'k_norm/scale': ('self_attn.k_norm.weight', False),
  'v/kernel': ('self_attn.v_proj.weight', True),
  'v/bias': ('self_attn.v_proj.bias', False),
  'o/kernel': ('self_attn.o_proj.weight', True),
  'gate/kernel': ('mlp.gate_proj.weight', True),
  'up/kernel': ('mlp.up_proj.weight', True),
  'down/kernel': ('mlp.down_proj.weight', True),
}
_DTYPES = ('F32', 'BF16', 'F16')


# --- The name map ------------------------------------------------------------


class TensorSpec(NamedTuple):
  """Tensors in the files that hold one parameter."""

  names: tuple[str, ...]  # One, or one per layer.
  stacked: bool  # The tensors are layers of one array.
  transposed: bool  # The files hold [out, in] for our [in, out].


# Parameter path -> (spec, leaf).
NameMap = dict[str, tuple[TensorSpec, Any]]


def _tensor_spec(path: str, num_layers: int) -> TensorSpec:
  """Return the spec of a parameter path such as `layers/q/kernel`."""
  if not path.startswith('layers/'):
    name, transposed = _TOP[path]
    return TensorSpec((name,), stacked=False, transposed=transposed)
  name, transposed = _LAYER[path.removeprefix('layers/')]
  names = tuple(f'model.layers.{i}.{name}' for i in range(num_layers))
  return TensorSpec(names, stacked=True, transposed=transposed)


def _name_map(params: Any, config: architecture.Config) -> NameMap:
  """Return the name map of all parameters."""
  leaves = {
    mesh_lib.path_name(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  layers = config.num_layers
  return {path: (_tensor_spec(path, layers), x) for path, x in leaves.items()}


def _shapes(name_map: NameMap) -> dict[str, tuple[int, ...]]:
  """Return name -> shape of the expected tensors, in order."""
  expected = {}
  for spec, leaf in name_map.values():
    shape = leaf.shape[1:] if spec.stacked else leaf.shape
    shape = shape[::-1] if spec.transposed else shape
    expected |= dict.fromkeys(spec.names, tuple(shape))
  return expected


def _check_tensors(name_map: NameMap, tensors, config) -> None:
  """Raise ValueError unless model and files hold the same tensors."""
  expected = _shapes(name_map)
  for name, shape in expected.items():
    if name not in tensors:
      raise ValueError(f'tensor {name} is missing from the files.')
    stored = tensors[name].shape
    if stored != shape:
      raise ValueError(f'tensor {name} has shape {stored}, not {shape}.')
  for name, tensor in tensors.items():
    if tensor.dtype not in _DTYPES:
      raise ValueError(
        f'tensor {name} is {tensor.dtype}; allowed are {", ".join(_DTYPES)}.'
      )
    if name == _HEAD and config.tie_word_embeddings:
      _check_tied(tensors)
    elif name not in expected:
      raise ValueError(
        f'tensor {name} is unexpected: the model has no such tensor.'
      )


def _check_tied(tensors: dict[str, files.Tensor], *, rows: int = 8192) -> None:
  """Raise ValueError unless a tied head equals the embedding."""
  name = _TOP['embedding'][0]
  count = tensors[name].shape[0]
  same = tensors[name].shape == tensors[_HEAD].shape
  for start in range(0, count if same else 0, rows):
    block = (slice(start, min(start + rows, count)),)
    pair = [_slice(tensors, each, block) for each in (name, _HEAD)]
    same = same and np.array_equal(*pair)
  if not same:
    raise ValueError(
      f'tensor {_HEAD} differs from the embedding, but the config ties them.'
    )


# --- Reading -----------------------------------------------------------------


def load(
  directory: str | pathlib.Path,
  mesh: Mesh,
  *,
  dtype: Any,
  param_dtype: Any = jnp.float32,
  remat: bool = False,
) -> tuple[architecture.Config, nnx.GraphDef, nnx.State]:
  """Read a model directory into sharded parameters.

  Args:
    directory: holds config.json and model.safetensors, or shards and an index.
    mesh: mesh of the parameters, split by transformer.PARTITION_RULES.
    dtype: dtype of the computation.
    param_dtype: dtype of the parameters, independent of that of the files.
    remat: see transformer.Transformer.

  Raises:
    ValueError: if the config is not supported, a tensor is missing, unexpected,
      duplicated, of another shape, not of a float type or not finite, or tied
      weights differ. One sentence that names the tensor.
  """
  directory = pathlib.Path(directory)
  config = files.config(directory)
  graphdef, shapes = transformer.abstract(
    config, dtype, param_dtype=param_dtype, remat=remat
  )
  shardings = mesh_lib.param_shardings(
    mesh, transformer.PARTITION_RULES, shapes
  )
  name_map = _name_map(shapes, config)
  tensors = files.tensors(directory)
  _check_tensors(name_map, tensors, config)
  leaves = [
    _read(spec, leaf, sharding, tensors)
    for (spec, leaf), sharding in zip(
      name_map.values(), jax.tree.leaves(shardings), strict=True
    )
  ]
  _check_finite(name_map, leaves, mesh)
  params = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
  return config, graphdef, params


def _check_finite(
  name_map: NameMap, leaves: list[jax.Array], mesh: Mesh
) -> None:
  """Raise ValueError naming the first tensor with a NaN or an infinity."""
  specs = [spec for spec, _ in name_map.values()]
  sums = [
    jnp.sum(leaf, axis=range(spec.stacked, leaf.ndim), dtype=jnp.float32)
    for spec, leaf in zip(specs, leaves, strict=True)
  ]
  for spec, total in zip(specs, mesh_lib.fetch(mesh, sums), strict=True):
    for name, number in zip(spec.names, np.atleast_1d(total), strict=True):
      if not np.isfinite(number):
        raise ValueError(f'tensor {name} holds numbers that are not finite.')


def _slice(
  tensors: dict[str, files.Tensor], name: str, index: tuple[slice, ...]
) -> np.ndarray:
  """Return a copy of part of a tensor; its file is open only for the copy.

  A file that stays open stays mapped, and every page read of it would count as
  memory of this process.
  """
  with safetensors.safe_open(tensors[name].file, framework='numpy') as opened:
    return opened.get_slice(name)[index]


def _read(
  spec: TensorSpec, leaf: Any, sharding: NamedSharding, tensors
) -> jax.Array:
  """Return one parameter; each device reads its own slices once."""
  parts = {}

  def tensor(name, index):
    if not spec.transposed:
      return _slice(tensors, name, index)
    return _slice(tensors, name, index[::-1]).T

  def read(index):
    bounds = [s.indices(n) for s, n in zip(index, leaf.shape, strict=True)]
    key = tuple(bounds)
    if key not in parts:
      index = tuple(slice(start, stop) for start, stop, _ in bounds)
      shape = [stop - start for start, stop, _ in bounds]
      part = np.empty(shape, leaf.dtype)
      if spec.stacked:
        for i, name in enumerate(spec.names[index[0]]):
          part[i] = tensor(name, index[1:])
      else:
        part[...] = tensor(spec.names[0], index)
      parts[key] = part
    return parts[key]

  return jax.make_array_from_callback(leaf.shape, sharding, read)


# --- Writing -----------------------------------------------------------------


def save(
  directory: str | pathlib.Path,
  config: architecture.Config,
  params: nnx.State,
  *,
  tokenizer: Any = None,
  source: str | pathlib.Path | None = None,
  dtype: Any = None,
  max_shard_bytes: int = 5_000_000_000,
) -> None:
  """Write a directory that transformers and vLLM load.

  Everything is written into a sibling, which is renamed at the end, so a
  directory of this name is always complete.

  Args:
    directory: must not exist, or be empty.
    config: the architecture.
    params: the parameters.
    tokenizer: a transformers tokenizer that is saved beside them, or None.
    source: the model directory that the parameters come from, or None. Its
      config.json, tokenizer, chat template and generation config are copied
      unchanged, except for the dtype.
    dtype: float dtype of the files; None: that of the parameters.
    max_shard_bytes: size above which the weights are split into several files,
      with an index. A larger tensor has its own file.

  Raises:
    ValueError: if the directory exists and is not empty, `source` has another
      architecture, a number is too large for `dtype`, or other processes hold
      a part of the parameters.
  """
  directory = pathlib.Path(directory).resolve()
  if not all(leaf.is_fully_addressable for leaf in jax.tree.leaves(params)):
    raise ValueError(
      'Other processes hold a part of the parameters; a model directory is '
      'written by one process that holds them all.'
    )
  if directory.exists() and any(directory.iterdir()):
    raise ValueError(f'{directory} exists and is not empty; choose a new one.')
  if source is not None and files.config(pathlib.Path(source)) != config:
    raise ValueError(f'{source} has another architecture than the model.')
  dtype = np.dtype(dtype or jax.tree.leaves(params)[0].dtype)
  with _renamed_when_complete(directory) as partial:
    _write_companions(partial, config, dtype, tokenizer, source)
    _write_weights(partial, _name_map(params, config), dtype, max_shard_bytes)


def _write_weights(
  partial: pathlib.Path, name_map: NameMap, dtype: np.dtype, limit: int
) -> None:
  """Write one shard after the other, and the index of several."""
  sizes = {
    name: int(np.prod(shape)) * dtype.itemsize
    for name, shape in _shapes(name_map).items()
  }
  shards = _shards(sizes, limit)
  stream = _tensors(name_map, dtype)
  for file, names in shards.items():
    tensors = dict(itertools.islice(stream, len(names)))
    # transformers requires this metadata.
    safetensors.numpy.save_file(tensors, partial / file, {'format': 'pt'})
    del tensors  # Otherwise two shards would be in memory at a time.
    # The file is created readable by its owner only.
    shutil.copymode(partial / 'config.json', partial / file)
  if len(shards) > 1:
    listed = {name: file for file, names in shards.items() for name in names}
    total = {'total_size': sum(sizes.values())}
    index = {'metadata': total, 'weight_map': listed}
    _write_json(partial / files.INDEX, index)


def _shards(sizes: dict[str, int], limit: int) -> dict[str, list[str]]:
  """Return file -> names, in the order of the names."""
  shards, room = [], 0
  for name, size in sizes.items():
    if not shards or size > room:
      shards.append([])
      room = limit
    shards[-1].append(name)
    room -= size
  if len(shards) == 1:
    return {files.WEIGHTS: shards[0]}
  stem, suffix = files.WEIGHTS.split('.')
  count = len(shards)
  return {
    f'{stem}-{i:05d}-of-{count:05d}.{suffix}': names
    for i, names in enumerate(shards, 1)
  }


def _tensors(
  name_map: NameMap, dtype: np.dtype
) -> Iterator[tuple[str, np.ndarray]]:
  """Yield the parameters under the names and in the layout of the files."""
  for spec, leaf in name_map.values():
    for i, name in enumerate(spec.names):
      # A layer is a new array, so the host copy that jax keeps of every array
      # that was read is freed with it.
      part = np.asarray(leaf[i] if spec.stacked else leaf[...])
      part = part.T if spec.transposed else part
      # safetensors writes the buffer as it is in memory, so a transposed view
      # would be written untransposed.
      yield name, np.ascontiguousarray(_cast(name, part, dtype))


def _cast(name: str, part: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """Cast a tensor; ValueError if a finite number becomes infinite."""
  with np.errstate(over='ignore'):
    cast = part.astype(dtype, copy=False)
  if cast is not part and not np.isfinite(cast[np.isfinite(part)]).all():
    raise ValueError(
      f'tensor {name} has numbers too large for {dtype}; bfloat16 and float32'
      ' hold them.'
    )
  return cast


@contextlib.contextmanager
def _renamed_when_complete(directory: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yield a sibling that is renamed to the directory if nothing fails."""
  partial = directory.with_name(f'.{directory.name}.{secrets.token_hex(4)}')
  partial.mkdir(parents=True)
  try:
    yield partial
    partial.rename(directory)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise


def _write_companions(partial, config, dtype, tokenizer, source) -> None:
  """Write config.json, tokenizer and generation config."""
  raw = config.to_hf()
  if source is not None:
    raw = files.read_json(pathlib.Path(source) / 'config.json')
    for pattern in files.COMPANIONS:
      for file in pathlib.Path(source).glob(pattern):
        if file.is_file():
          shutil.copyfile(file, partial / file.name)
  # transformers 5 reads the first, older versions the second.
  raw |= {'dtype': str(dtype), 'torch_dtype': str(dtype)}
  _write_json(partial / 'config.json', raw)
  if tokenizer is not None:
    tokenizer.save_pretrained(partial)
    names = ('eos_token_id', 'pad_token_id')
    ends = {name: getattr(tokenizer, name) for name in names}
    _write_json(partial / 'generation_config.json', ends)


def _write_json(file: pathlib.Path, content: Any) -> None:
  file.write_text(json.dumps(content, indent=2) + '\n')
