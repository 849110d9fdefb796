"""Parts of a batch: their rows, and that no row moves for a micro-batch."""

import jax
import numpy as np
import pytest

from actfocus_jax.learner import microbatch
from actfocus_jax.parallel import mesh as mesh_lib


def made(data, fsdp):
  return mesh_lib.make_mesh(
    data=data, fsdp=fsdp, devices=jax.devices()[: data * fsdp]
  )


def test_parts_worked_by_hand():
  x = np.arange(8)[:, None]
  with jax.set_mesh(made(2, 2)):
    micro = jax.jit(lambda x: microbatch.micro(x, 4))(x)
    consecutive = jax.jit(lambda x: microbatch.consecutive(x, 4))(x)
  # Four shards of two rows each: the first rows of all, then the second.
  assert micro[..., 0].tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]
  assert consecutive[..., 0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize(('rows', 'size'), [(24, 4), (24, 12), (6, 3)])
def test_join_undoes_micro(rows, size):
  """Also where the four shards do not divide a part of 3."""
  x = np.arange(2 * rows).reshape(rows, 2)
  with jax.set_mesh(made(2, 2)):
    back = jax.jit(lambda x: microbatch.join(microbatch.micro(x, size)))(x)
  np.testing.assert_array_equal(back, x)


def test_no_row_moves_for_a_micro_batch():
  mesh = made(2, 4)
  x = mesh_lib.put_rows(mesh, np.arange(96.0).reshape(48, 2))

  def through(x, cut):
    return microbatch.join(jax.lax.map(lambda part: part + 1, cut(x, 16)))

  def program(cut):
    with jax.set_mesh(mesh):
      return jax.jit(lambda x: through(x, cut)).lower(x).compile().as_text()

  moves = ('all-gather', 'all-to-all', 'all-reduce', 'collective-permute')
  assert not any(move in program(microbatch.micro) for move in moves)
  assert any(move in program(microbatch.consecutive) for move in moves)
