"""Counts the multiplications of a program before it is compiled.

The compiler's own count takes the body of a loop once, and layers,
micro-batches and decoding steps are loops. Here the traced program is walked,
loops times their length. Matrix products count, 2 m n k each; what is done
element by element does not. A product of float32 numbers at the default
precision is one pass of the matrix units, at the highest it is six.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax

_PASSES = {
  jax.lax.Precision.DEFAULT: 1,
  jax.lax.Precision.HIGH: 3,
  jax.lax.Precision.HIGHEST: 6,
}
# A causal kernel visits every second block of its grid, and half of those on
# the diagonal.
_CAUSAL = ('splash', 'flash')


def count(
  jaxpr: Any, *, trips: float = 1.0, only_kernels: bool = False
) -> float:
  """FLOPs of a traced program, over all devices together.

  Args:
    jaxpr: A jaxpr, closed or not.
    trips: Of loops whose length only the data decide.
    only_kernels: Whether what is outside of hand-written kernels is left out.

  Returns:
    The sum over its matrix products.
  """
  jaxpr = getattr(jaxpr, 'jaxpr', jaxpr)
  of = functools.partial(count, trips=trips, only_kernels=only_kernels)
  return sum(_of(equation, of, trips, only_kernels) for equation in jaxpr.eqns)


def _of(
  equation: Any, of: Callable[[Any], float], trips: float, only_kernels: bool
) -> float:
  name, params = equation.primitive.name, equation.params
  if name == 'dot_general':
    return 0.0 if only_kernels else _product(equation)
  if name == 'scan':
    return params['length'] * of(params['jaxpr'])
  if name == 'while':
    return trips * (of(params['body_jaxpr']) + of(params['cond_jaxpr']))
  if name == 'cond':
    return max(map(of, params['branches']))
  if name == 'shard_map':
    mesh, manual = params['mesh'], params['newly_manual_axes']
    blocks = math.prod(mesh.shape[axis] for axis in manual)
    return blocks * of(params['jaxpr'])
  if name == 'pallas_call':
    return _kernel(params, trips)
  return sum(map(of, _inner(params)))


def _product(equation: Any) -> float:
  left = equation.invars[0].aval.shape
  (contracted, _), _ = equation.params['dimension_numbers']
  depth = math.prod(left[axis] for axis in contracted)
  precision = equation.params['precision']
  passes = 1
  if precision is not None and 'f' in str(equation.invars[0].aval.dtype):
    passes = max(_PASSES.get(one, 1) for one in precision)
  return 2.0 * math.prod(equation.outvars[0].aval.shape) * depth * passes


def _kernel(params: dict[str, Any], trips: float) -> float:
  grid = params['grid_mapping'].grid
  steps = math.prod(x for x in grid if isinstance(x, int))
  whole = steps * count(params['jaxpr'], trips=trips)
  is_causal = any(word in str(params.get('name', '')) for word in _CAUSAL)
  return whole / 2 if is_causal else whole


def _inner(params: dict[str, Any]) -> list[Any]:
  """Programs inside of a call; what a custom rule would do instead is not."""
  found = []
  for name, value in params.items():
    if name in ('fwd_jaxpr_thunk', 'jvp_jaxpr_fun', 'bwd'):
      continue
    for one in value if isinstance(value, (tuple, list)) else (value,):
      if hasattr(getattr(one, 'jaxpr', one), 'eqns'):
        found.append(one)
  return found
