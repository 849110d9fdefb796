"""Causal self-attention by the fused kernels of accelerators.

Rows are padded to a multiple of the row shards, key heads are repeated if
`tensor` requires it, and every device runs the kernel on its own rows and
heads, since a compiler cannot split one. Scores never reach main memory, so it
grows with T, not with T * T.

`splash` is the TPU kernel that comes with jax, `cudnn` the one of NVIDIA's
library. Both compute what `attention.attend_in_blocks` computes.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel as splash_kernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_mask as splash_mask,
)
from jax.sharding import PartitionSpec as P

from actfocus_jax.model import architecture
from actfocus_jax.parallel import mesh as mesh_lib

Kernel = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
_LANES = 128  # TPU blocks are multiples of this.
# Queries and keys in a block -> keys that are computed at a time. The scores of
# a block must fit the 16 MiB of a core's vector memory, in float32 and several
# times in the backward pass.
_BLOCKS = {512: 512, 768: 384}


def splash(
  q_BTHC: jax.Array,
  k_BTJC: jax.Array,
  v_BTJC: jax.Array,
  *,
  interpret: bool = False,
) -> jax.Array:
  """Causal attention of whole rows to themselves by TPU's splash kernel.

  H is a multiple of J; the result has the dtype of the queries. `interpret`
  runs the kernel as ordinary operations, on any platform.
  """
  kernel = functools.partial(_splash, interpret=interpret)
  return per_device(kernel, q_BTHC, k_BTJC, v_BTJC)


def cudnn(q_BTHC: jax.Array, k_BTJC: jax.Array, v_BTJC: jax.Array) -> jax.Array:
  """Causal attention of whole rows to themselves by cuDNN, for NVIDIA GPUs.

  The inputs are bfloat16 or float16; H is a multiple of J.
  """
  kernel = functools.partial(
    jax.nn.dot_product_attention, is_causal=True, implementation='cudnn'
  )
  return per_device(kernel, q_BTHC, k_BTJC, v_BTJC)


def per_device(
  kernel: Kernel, q_BTHC: jax.Array, k_BTJC: jax.Array, v_BTJC: jax.Array
) -> jax.Array:
  """Run a kernel on every device of the ambient mesh, on its rows and heads.

  Rows are split over `data` and `fsdp`, heads over `tensor`. If only the query
  heads divide over `tensor`, each key head is repeated as often as needed; if
  neither do, every device of the axis computes all heads. Without an ambient
  mesh the kernel is called directly. The kernel must be independent per row and
  per key head with its query heads.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return kernel(q_BTHC, k_BTJC, v_BTJC)
  B, H, J = q_BTHC.shape[0], q_BTHC.shape[2], k_BTJC.shape[2]
  devices = mesh.shape.get('tensor', 1)
  repeat = architecture.key_repeats(H, J, devices)
  fill = -B % mesh_lib.row_shards(mesh)
  q, k, v = (
    jnp.pad(x, ((0, fill), (0, 0), (0, 0), (0, 0)))
    for x in (
      q_BTHC,
      jnp.repeat(k_BTJC, repeat, axis=2),
      jnp.repeat(v_BTJC, repeat, axis=2),
    )
  )
  spec = P(*mesh_lib.ROWS, None, None if H % devices else 'tensor')
  # All axes are manual, so the compiler never splits the kernel. Kernels do not
  # declare over which axes their results vary, hence no check.
  out_BTHC = jax.shard_map(
    kernel, in_specs=(spec,) * 3, out_specs=spec, check_vma=False
  )(q, k, v)
  return out_BTHC[:B]


def _splash(q_BTHC, k_BTJC, v_BTJC, *, interpret: bool) -> jax.Array:
  """Splash attention on one device, with T padded to whole blocks.

  The padding comes last, so no real query sees it.
  """
  T, H, C = q_BTHC.shape[1:]
  size, keys = _block(T)
  fill = -T % size
  q_BHTC, k_BJTC, v_BJTC = (
    jnp.pad(x, ((0, 0), (0, fill), (0, 0), (0, 0))).swapaxes(1, 2)
    for x in (q_BTHC, k_BTJC, v_BTJC)
  )
  causal = splash_mask.CausalMask((T + fill, T + fill))
  attend_row = splash_kernel.make_splash_mha(
    splash_mask.MultiHeadMask([causal] * H),
    block_sizes=splash_kernel.BlockSizes(
      block_q=size,
      block_kv=size,
      block_kv_compute=keys,
      block_q_dkv=size,
      block_kv_dkv=size,
      block_kv_dkv_compute=keys,
      use_fused_bwd_kernel=True,
    ),
    head_shards=1,
    q_seq_shards=1,
    interpret=interpret,
  )
  # The kernel itself does not divide the scores by sqrt(C).
  q_BHTC = (q_BHTC.astype(jnp.float32) * C**-0.5).astype(q_BHTC.dtype)
  out_BHTC = jax.vmap(attend_row)(q_BHTC, k_BJTC, v_BJTC)
  return out_BHTC.swapaxes(1, 2)[:, :T]


def _block(T: int) -> tuple[int, int]:
  """Return the block with the least padding, the smaller one of a tie."""
  size = min(_BLOCKS, key=lambda size: (-T % size, size))
  if size > T:
    size = -(-T // _LANES) * _LANES
  return size, _BLOCKS.get(size, size)
