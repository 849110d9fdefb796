"""Hugging Face directories <-> sharded parameters, both ways, without torch.

The life of a tensor: `books` says under which name, transposed or not, a
parameter (for stacked layers: each of its layers) stands in the files; every
device reads the slices it holds and nothing else. The books are kept twice:
each tensor of the model must be in the files once, and each tensor of the files
must be in the model, else the directory is refused.
"""

import contextlib
import json
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from actfocus_jax.model import architecture, transformer
from actfocus_jax.model import mesh as meshes

_SINGLE = 'model.safetensors'
_INDEX = 'model.safetensors.index.json'
_TIED = 'lm_head.weight'

# Parameter path -> (name in the files, transposed there).
_TOP = {
  'embedding': ('model.embed_tokens.weight', False),
  'norm/scale': ('model.norm.weight', False),
  'head': (_TIED, True),
}
_LAYER = {
  'attention_norm/scale': ('input_layernorm.weight', False),
  'mlp_norm/scale': ('post_attention_layernorm.weight', False),
  'q/kernel': ('self_attn.q_proj.weight', True),
  'q/bias': ('self_attn.q_proj.bias', False),
  'k/kernel': ('self_attn.k_proj.weight', True),
  'k/bias': ('self_attn.k_proj.bias', False),
  'v/kernel': ('self_attn.v_proj.weight', True),
  'v/bias': ('self_attn.v_proj.bias', False),
  'o/kernel': ('self_attn.o_proj.weight', True),
  'gate/kernel': ('mlp.gate_proj.weight', True),
  'up/kernel': ('mlp.up_proj.weight', True),
  'down/kernel': ('mlp.down_proj.weight', True),
}
_DTYPES = ('F32', 'BF16', 'F16')


class Entry(NamedTuple):
  """One parameter's page in the books.

  Attributes:
    names: the tensors it is made of: one, or one per layer.
    stacked: whether those are layers of one array.
    transposed: whether the files hold [out, in] for our [in, out].
  """

  names: tuple[str, ...]
  stacked: bool
  transposed: bool


def _entry(path: str, num_layers: int) -> Entry:
  """Returns the page of a parameter path such as `layers/q/kernel`."""
  if not path.startswith('layers/'):
    name, transposed = _TOP[path]
    return Entry((name,), stacked=False, transposed=transposed)
  name, transposed = _LAYER[path.removeprefix('layers/')]
  names = tuple(f'model.layers.{i}.{name}' for i in range(num_layers))
  return Entry(names, stacked=True, transposed=transposed)


def _books(
  params: Any, config: architecture.Config
) -> dict[str, tuple[Entry, Any]]:
  """Returns path -> (page, leaf) for every parameter."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(params)
  paths = [meshes.path_name(path) for path, _ in leaves]
  return {
    path: (_entry(path, config.num_layers), leaf)
    for path, (_, leaf) in zip(paths, leaves, strict=True)
  }


@contextlib.contextmanager
def _open_tensors(directory: pathlib.Path) -> Iterator[dict[str, Any]]:
  """Yields name -> lazy slice of all tensors of a directory.

  Raises:
    ValueError: if there is no model file, two kinds of them, a tensor twice,
      or if the index and its files disagree.
  """
  single, index = directory / _SINGLE, directory / _INDEX
  if single.exists() == index.exists():
    both = 'both' if single.exists() else 'neither'
    raise ValueError(f'{directory} holds {both} of {_SINGLE} and {_INDEX}.')
  listed = None
  files = [_SINGLE]
  if index.exists():
    listed = json.loads(index.read_text())['weight_map']
    files = sorted(set(listed.values()))
  tensors = {}
  with contextlib.ExitStack() as stack:
    for file in files:
      if not (directory / file).exists():
        raise ValueError(f'{directory} lacks {file}, which its index names.')
      opened = stack.enter_context(
        safetensors.safe_open(directory / file, framework='numpy')
      )
      for name in opened.keys():  # noqa: SIM118 (not a dict)
        # The index names one file per tensor, so this sees duplicates too.
        if listed is not None and listed.get(name) != file:
          raise ValueError(
            f'tensor {name} is unexpected in {file}: the index says'
            f' {listed.get(name)}; it is misplaced, or a duplicate.'
          )
        tensors[name] = opened.get_slice(name)
    yield tensors


def _check_books(books, tensors, config: architecture.Config) -> None:
  """Raises ValueError unless model and files hold the same tensors."""
  expected = {}
  for entry, leaf in books.values():
    shape = leaf.shape[1:] if entry.stacked else leaf.shape
    shape = shape[::-1] if entry.transposed else shape
    expected |= dict.fromkeys(entry.names, tuple(shape))
  for name, shape in expected.items():
    if name not in tensors:
      raise ValueError(f'tensor {name} is missing from the files.')
    found = tuple(tensors[name].get_shape())
    if found != shape:
      raise ValueError(f'tensor {name} has shape {found}, not {shape}.')
    if tensors[name].get_dtype() not in _DTYPES:
      raise ValueError(
        f'tensor {name} is {tensors[name].get_dtype()}; allowed are {_DTYPES}.'
      )
  for name in tensors:
    if name == _TIED and config.tie_word_embeddings:
      _check_tied(tensors[_TOP['embedding'][0]], tensors[_TIED])
    elif name not in expected:
      raise ValueError(f'tensor {name} is unexpected: the model has none such.')


def _check_tied(embedding: Any, head: Any, *, rows: int = 8192) -> None:
  """Raises ValueError unless a tied head is the embedding, block by block."""
  same = embedding.get_shape() == head.get_shape()
  size = embedding.get_shape()[0] if same else 0
  for start in range(0, size, rows):
    block = slice(start, min(start + rows, size))
    same = same and np.array_equal(embedding[block], head[block])
  if not same:
    raise ValueError(
      f'tensor {_TIED} differs from the embedding, but the config ties them.'
    )


def _read(
  entry: Entry, leaf: Any, sharding: NamedSharding, tensors: dict[str, Any]
) -> jax.Array:
  """Returns one parameter; each device reads its own slices, copies once."""
  seen = {}

  def tensor(name: str, index: tuple[slice, ...]) -> np.ndarray:
    part = tensors[name][index[::-1] if entry.transposed else index]
    return part.T if entry.transposed else part

  def read(index: tuple[slice, ...]) -> np.ndarray:
    bounds = [s.indices(n) for s, n in zip(index, leaf.shape, strict=True)]
    key = tuple(bounds)
    if key not in seen:
      index = tuple(slice(start, stop) for start, stop, _ in bounds)
      if entry.stacked:
        part = np.stack([tensor(n, index[1:]) for n in entry.names[index[0]]])
      else:
        part = tensor(entry.names[0], index)
      seen[key] = np.ascontiguousarray(part.astype(leaf.dtype))
    return seen[key]

  return jax.make_array_from_callback(leaf.shape, sharding, read)


def read_config(directory: str | pathlib.Path) -> architecture.Config:
  """Reads config.json.

  Raises:
    ValueError: if there is none, or the config is not supported.
  """
  file = pathlib.Path(directory) / 'config.json'
  if not file.exists():
    raise ValueError(f'{directory} lacks config.json.')
  return architecture.Config.from_hf(json.loads(file.read_text()))


def load(
  directory: str | pathlib.Path,
  mesh: Mesh,
  *,
  dtype: Any,
  param_dtype: Any = jnp.float32,
  remat: bool = False,
) -> tuple[architecture.Config, nnx.GraphDef, nnx.State]:
  """Reads a Qwen2 directory into sharded parameters.

  Args:
    directory: holds config.json and model.safetensors, or shards and an index.
    mesh: where the parameters go, by transformer.PARTITION_RULES.
    dtype: dtype of the computation.
    param_dtype: dtype of the parameters, whatever that of the files.
    remat: see transformer.Transformer.

  Returns:
    (config, graphdef, params), as transformer.create gives them.

  Raises:
    ValueError: if the config is not supported, or a tensor is missing,
      unexpected, twice there, of another shape or a type that is no float, or
      if tied weights differ. One sentence, naming the tensor.
  """
  directory = pathlib.Path(directory)
  config = read_config(directory)
  graphdef, shapes = transformer.abstract(
    config, dtype, param_dtype=param_dtype, remat=remat
  )
  where = meshes.param_shardings(mesh, transformer.PARTITION_RULES, shapes)
  books = _books(shapes, config)
  with _open_tensors(directory) as tensors:
    _check_books(books, tensors, config)
    leaves = [
      _read(entry, leaf, sharding, tensors)
      for (entry, leaf), sharding in zip(
        books.values(), jax.tree.leaves(where), strict=True
      )
    ]
  return (
    config,
    graphdef,
    jax.tree.unflatten(jax.tree.structure(shapes), leaves),
  )


def _host(x: jax.Array) -> np.ndarray:
  """Returns a whole parameter on this host; every process must call it."""
  if x.is_fully_addressable:
    return np.asarray(x)
  return multihost_utils.process_allgather(x, tiled=True)


def _tensors(params: Any, config: architecture.Config) -> dict[str, np.ndarray]:
  """Returns the parameters under the names and in the layout of the files."""
  tensors = {}
  for entry, leaf in _books(params, config).values():
    whole = _host(leaf)
    for name, part in zip(
      entry.names, whole if entry.stacked else [whole], strict=True
    ):
      # safetensors writes the buffer as it lies: a transposed view would be
      # written untransposed.
      tensors[name] = np.ascontiguousarray(part.T if entry.transposed else part)
  return tensors


def save(
  directory: str | pathlib.Path,
  config: architecture.Config,
  params: nnx.State,
  *,
  tokenizer: Any = None,
) -> None:
  """Writes a directory that transformers and vLLM load.

  Everything is written into a sibling and renamed at the end, so a directory
  of this name is always whole. With several processes all must call this, and
  the first one writes.

  Args:
    directory: must not exist, or be empty.
    config: the architecture.
    params: the parameters, in the dtype in which they are to be written.
    tokenizer: a transformers tokenizer, or None.

  Raises:
    ValueError: if the directory exists and is not empty.
  """
  directory = pathlib.Path(directory)
  if directory.exists() and any(directory.iterdir()):
    raise ValueError(f'{directory} exists and is not empty; name a new one.')
  tensors = _tensors(params, config)
  if jax.process_index() == 0:
    _write(directory, config, tensors, tokenizer)
  multihost_utils.sync_global_devices('hf.save')


def _write(directory, config, tensors, tokenizer) -> None:
  """Writes all files beside the directory, then renames."""
  dtype = str(next(iter(tensors.values())).dtype)
  directory.parent.mkdir(parents=True, exist_ok=True)
  partial = pathlib.Path(
    tempfile.mkdtemp(prefix=f'.{directory.name}.', dir=directory.parent)
  )
  try:
    partial.chmod(0o755)  # mkdtemp keeps others out.
    # transformers asks for the format entry.
    safetensors.numpy.save_file(tensors, partial / _SINGLE, {'format': 'pt'})
    written = json.dumps(config.to_hf() | {'torch_dtype': dtype}, indent=2)
    (partial / 'config.json').write_text(written + '\n')
    if tokenizer is not None:
      tokenizer.save_pretrained(partial)
    partial.rename(directory)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise
