"""JAX's own grouped outer product for TPUs, where `lax.ragged_dot_general` has only a dense one."""

import jax.numpy as jnp
from jax._src import config
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float, Int

from llama4_eqx.layers.collectives import pvary, varying_axes

# The largest tiles that fit the scoped memory of all TPUs from v5e on, by the bytes of a number.
_ROWS = 512
_TILE = {2: 1024, 4: 512}


def fits_megablox(left: Array, right: Array) -> bool:
    """Whether the kernel takes these dtypes."""
    return left.dtype == right.dtype and left.dtype in (jnp.bfloat16, jnp.float32)


def outer_product(
    left: Float[Array, "tokens rows"],
    right: Float[Array, "tokens columns"],
    sizes: Int[Array, "experts"],
    *,
    interpret: bool = False,
) -> Float[Array, "experts rows columns"]:
    """`leftᵀ · right` over each expert's rows, which `interpret` runs on any platform."""
    # Here, since the module is slow to import and of no use without a TPU.
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    block = min(_ROWS, -(-len(left) // 16) * 16)
    tile = _TILE[left.dtype.itemsize]
    tiles = (block, min(tile, left.shape[1]), min(tile, right.shape[1]))

    @sequential_vmap
    def product(left, right, sizes):
        left, right = (jnp.pad(x, ((0, -len(x) % block), (0, 0))) for x in (left, right))
        with config._check_vma(False):
            return tgmm(left.T, right, sizes, left.dtype, tiles, interpret=interpret)

    # The kernel loses on which mesh axes its operands vary.
    return pvary(product(left, right, sizes), tuple(varying_axes(left) | varying_axes(right)))
