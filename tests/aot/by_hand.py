"""Programs for tests to read: of eight devices, or of two slices of four."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from actfocus_jax.aot import collectives, links, program_text
from actfocus_jax.parallel import mesh as mesh_lib

AXES = {'data': 2, 'fsdp': 4, 'tensor': 1}
EIGHT = collectives.Layout(AXES, AXES, links.Torus((2, 4)))
TWO_SLICES = collectives.Layout(AXES, AXES | {'data': 1}, links.Torus((2, 2)))


def compiled(function, *shapes, specs):
  """The text for 8 devices, data 2 and fsdp 4."""
  mesh = mesh_lib.make_mesh(data=2, fsdp=4)
  args = [
    jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, spec))
    for s, spec in zip(shapes, specs, strict=True)
  ]
  text = jax.jit(function).lower(*args).compile().as_text()
  return program_text.parse(text)
