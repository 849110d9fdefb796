"""Hugging Face model directory: locate it, and check that it is complete.

`locate` finds the directory, on disk or on the Hugging Face hub; `check` reads
its small files and the headers of its weights; `tensors` returns the file of
each tensor. Nothing here imports jax or reads a weight, so that an unusable
directory is refused at once.
"""

import functools
import hashlib
import json
import pathlib
import re
from typing import Any, NamedTuple

from actfocus_jax.model import architecture

WEIGHTS = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
# Files of a model beside config.json and weights; a trained copy keeps them
# unchanged.
COMPANIONS = (
  'generation_config.json',
  'tokenizer*',
  'special_tokens_map.json',
  'added_tokens.json',
  'chat_template*',
  'vocab.json',
  'merges.txt',
  'LICENSE*',
)
_DOWNLOADED = ('config.json', 'model*.safetensors', INDEX, *COMPANIONS)
_NEEDED = f'config.json, tokenizer.json and {WEIGHTS} (or shards and {INDEX})'
_HUB_ID = re.compile(r'[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*')


class Tensor(NamedTuple):
  """Location of one tensor: file, dtype there (F32, BF16, ...) and shape."""

  file: pathlib.Path
  dtype: str
  shape: tuple[int, ...]


# --- Locate ------------------------------------------------------------------


@functools.cache
def locate(path: str, revision: str = '') -> pathlib.Path:
  """Return the directory of a model, downloaded if needed; cached.

  An existing directory is used as it is. Otherwise `ORGANISATION/NAME` is a
  Hugging Face hub id: huggingface_hub finds it in its cache or downloads it
  (HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE keep their meaning).
  `revision` is a branch, tag or commit of it; '' is its main branch.

  Raises:
    ValueError: if there is no such directory and the hub has no such model or
      cannot be reached; the message says how to download it.
  """
  directory = pathlib.Path(path).expanduser()
  if directory.is_dir():
    if revision:
      raise ValueError(
        f'model.revision is {revision!r}, but model.path is a directory,'
        f" {path!r}; allowed: '' unless model.path is a hub id."
      )
    return directory
  if not _HUB_ID.fullmatch(path):
    raise ValueError(
      f'model.path is {path!r}, which is neither a directory nor a Hugging Face'
      f' hub id; allowed: a model directory with {_NEEDED}, or an id such as'
      ' Qwen/Qwen2.5-0.5B-Instruct.'
    )
  import huggingface_hub
  from huggingface_hub import constants

  try:
    snapshot = huggingface_hub.snapshot_download(
      path, revision=revision or None, allow_patterns=list(_DOWNLOADED)
    )
  except Exception as error:  # A network may raise anything.
    raise ValueError(
      f'model.path is {path!r}, which is not a directory, is not in the cache'
      f' {constants.HF_HUB_CACHE}, and cannot be downloaded'
      f' ({_reason(error)}). {how_to_fetch(path, revision)}'
    ) from error
  return pathlib.Path(snapshot)


def how_to_fetch(name: str, revision: str = '') -> str:
  """Return instructions for getting a model to a machine without network."""
  local = f'models/{name.partition("/")[2]}'
  fetch = f'hf download {name} --local-dir {local}'
  fetch += f' --revision {revision}' if revision else ''
  return (
    f'On a machine with network, run `{fetch}`, copy that directory here, and'
    f' set --config.model.path={local}.'
  )


def is_hub_id(path: str) -> bool:
  """Return whether a `model.path` is a hub id and not a directory."""
  is_directory = pathlib.Path(path).expanduser().is_dir()
  return not is_directory and bool(_HUB_ID.fullmatch(path))


def _reason(error: Exception) -> str:
  """Return the first line of the original error."""
  while error.__cause__ is not None:
    error = error.__cause__
  lines = str(error).strip().splitlines() or ['']
  return f'{type(error).__name__}: {lines[0].rstrip(".")}'


# --- Check -------------------------------------------------------------------


def check(directory: pathlib.Path) -> architecture.Config:
  """Return the architecture if the directory is complete.

  Raises:
    ValueError: if a file is missing, is cut or cannot be read, or the
      architecture is not supported; one sentence that names the directory.
  """
  for name in ('config.json', 'tokenizer.json'):
    if not (directory / name).is_file():
      raise ValueError(
        f'{directory} lacks {name}; allowed: a Hugging Face model directory'
        f' with {_NEEDED}.'
      )
  model_config = config(directory)
  if 'model' not in read_json(directory / 'tokenizer.json'):
    raise ValueError(
      f'{directory / "tokenizer.json"} cannot be read: it describes no model.'
    )
  tensors(directory)
  return model_config


def config(directory: pathlib.Path) -> architecture.Config:
  """Return the architecture in a directory, or raise ValueError."""
  raw = read_json(directory / 'config.json')
  try:
    return architecture.Config.from_hf(raw)
  except ValueError as error:
    raise ValueError(f'{directory} cannot be used: {error}') from error


def stop_ids(directory: pathlib.Path) -> tuple[int, ...]:
  """Return the stop ids in generation_config.json, () if there are none.

  Raises:
    ValueError: if the file cannot be read or holds anything but ids.
  """
  file = directory / 'generation_config.json'
  named = read_json(file).get('eos_token_id') if file.exists() else None
  if named is None:
    return ()
  ids = tuple(named) if isinstance(named, list) else (named,)
  if not all(type(index) is int and index >= 0 for index in ids):
    raise ValueError(
      f'eos_token_id in {file} is {named!r}; it must be an id or a list of ids.'
    )
  return ids


def fingerprint(directory: pathlib.Path) -> str:
  """Return a SHA-256 over everything that determines a model's output.

  That is weights, architecture, tokenizer, chat template and stop ids, not the
  names of the directory or of the shards.
  """
  weights = {tensor.file for tensor in tensors(directory).values()}
  patterns = ('config.json', *(p for p in COMPANIONS if p != 'LICENSE*'))
  others = {file for p in patterns for file in directory.glob(p)}
  digest = hashlib.sha256()
  for file in (*sorted(others), *sorted(weights)):
    if file.is_file():
      with file.open('rb') as stream:
        digest.update(hashlib.file_digest(stream, 'sha256').digest())
  return digest.hexdigest()


def commit(directory: pathlib.Path) -> str:
  """Return the commit of a directory in the hub's cache, else ''."""
  is_snapshot = directory.parent.name == 'snapshots'
  return directory.name if is_snapshot else ''


def read_json(file: pathlib.Path) -> dict[str, Any]:
  """Return the JSON object in a file; ValueError if there is none."""
  try:
    content = json.loads(file.read_text())
  except (ValueError, OSError) as error:
    raise ValueError(f'{file} cannot be read: {error}.') from error
  if not isinstance(content, dict):
    raise ValueError(f'{file} cannot be read: it does not hold a JSON object.')
  return content


def tensors(directory: pathlib.Path) -> dict[str, Tensor]:
  """Return name -> location of every tensor, from the headers of the files.

  Raises:
    ValueError: if there are no weights or two kinds of them, a file is cut, a
      tensor is duplicated, or the index and its files disagree.
  """
  single, index = directory / WEIGHTS, directory / INDEX
  if single.exists() and index.exists():
    raise ValueError(
      f'{directory} holds both {WEIGHTS} and {INDEX}; remove the one that is'
      ' not its model.'
    )
  for file in (single, index):
    if file.is_symlink() and not file.exists():
      raise ValueError(f'{file} is a link to a file that does not exist.')
  if single.is_file():
    return _header(single)
  if not index.exists():
    raise ValueError(
      f'{directory} lacks {WEIGHTS} (or shards and {INDEX}); other formats of'
      ' weights are not read.'
    )
  listed = read_json(index).get('weight_map')
  if not isinstance(listed, dict) or not all(
    isinstance(file, str) and pathlib.Path(file).name == file != ''
    for file in listed.values()
  ):
    raise ValueError(
      f'{index} cannot be read: it has no weight_map from tensors to files'
      ' beside it.'
    )
  locations = {}
  for name in sorted(set(listed.values())):
    file = directory / name
    if not file.is_file():
      raise ValueError(f'{directory} lacks {name}, which its index lists.')
    for tensor, location in _header(file).items():
      # The index lists one file per tensor, so this detects duplicates too.
      if listed.get(tensor) != name:
        raise ValueError(
          f'tensor {tensor} is unexpected in {file}: the index says'
          f' {listed.get(tensor)}; it is misplaced, or a duplicate.'
        )
      locations[tensor] = location
  for tensor in listed.keys() - locations.keys():
    raise ValueError(
      f'tensor {tensor} is missing from {directory / listed[tensor]}, where the'
      ' index says it is.'
    )
  return locations


def _header(file: pathlib.Path) -> dict[str, Tensor]:
  """Return the tensors of one file, if the file is complete.

  The file begins with the length of a JSON header, in 8 bytes; the header holds
  the end of each tensor. A failed download leaves a small text in its place, or
  a file that is too short.
  """
  size = file.stat().st_size
  with file.open('rb') as stream:
    length = int.from_bytes(stream.read(8), 'little')
    header = stream.read(length) if length < size else b''
  if length == int.from_bytes(b'version ', 'little'):
    raise ValueError(
      f'{file} cannot be read: it is a pointer of git-lfs; `git lfs pull`'
      ' fetches the weights it stands for.'
    )
  try:
    entries = json.loads(header)
    entries.pop('__metadata__', None)
    ends = [entry['data_offsets'][1] for entry in entries.values()]
    locations = {
      name: Tensor(file, entry['dtype'], tuple(entry['shape']))
      for name, entry in entries.items()
    }
  except (ValueError, AttributeError, LookupError, TypeError):
    ends, locations = [-1], {}
  if 8 + length + max(ends, default=0) != size:
    raise ValueError(
      f'{file} cannot be read: it is not a complete safetensors file, with'
      f' {size} bytes; was the download cut?'
    )
  return locations
