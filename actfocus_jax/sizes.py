"""The sizes of a run that its config tells: the model's, and what a mesh cuts.

Neither weights nor jax are read, so that a run and its `--dry_run` refuse the
same shapes.
"""

import pathlib

import ml_collections

from actfocus_jax import errors
from actfocus_jax.config import presets, validate
from actfocus_jax.model import architecture, files
from actfocus_jax.parallel import mesh_shapes


def check_splits(c: ml_collections.ConfigDict, directory: pathlib.Path | None):
  """Refuses a mesh that cuts no machine's share of batches or model evenly.

  Args:
    c: A checked config.
    directory: As of `dry_run.describe`.

  Raises:
    UsageError: One sentence with the nearest shapes.
  """
  try:
    mesh_shapes.check(c.mesh, splits(c, directory))
  except ValueError as error:
    raise errors.UsageError(str(error)) from error


def splits(
  c: ml_collections.ConfigDict, directory: pathlib.Path | None = None
) -> tuple[mesh_shapes.Split, ...]:
  """What the mesh of a run must cut into equal parts: batches and the model.

  Args:
    c: A checked config.
    directory: Of the model; None looks for it, where one is named.
  """
  if directory is None and c.model.path and c.model.path not in presets.SHAPES:
    directory = files.locate(c.model.path, c.model.revision)
  model = shape(c, directory).splits
  if not c.model.path:  # Set phrases add to its vocabulary.
    model = tuple(part for part in model if part.what != 'vocab_size')
  return mesh_shapes.of_rows(validate.mesh_rows(c)) + model


def shape(
  c: ml_collections.ConfigDict, directory: pathlib.Path | None
) -> architecture.Config:
  """The architecture of the model, known or read from its config.json."""
  if directory is not None:
    return files.config(directory)
  known = presets.SHAPES.get(c.model.path)
  return architecture.Config(**known) if known else small(c)


def small(c: ml_collections.ConfigDict) -> architecture.Config:
  """About the small model of `warm_start`; set phrases add to its tokens."""
  w = c.warm_start
  return architecture.Config(
    vocab_size=w.vocab_size,
    hidden_size=w.hidden_size,
    intermediate_size=w.intermediate_size,
    num_layers=w.num_layers,
    num_heads=w.num_heads,
    num_key_value_heads=w.num_key_value_heads,
    head_dim=w.hidden_size // w.num_heads,
  )
