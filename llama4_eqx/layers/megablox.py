"""JAX's own grouped products for TPUs, for what `lax.ragged_dot_general` does less well there: its
outer product is dense, and for a product with transposed weights it copies them."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float, Int

from llama4_eqx.layers.collectives import call_kernel

# The largest tiles that fit the scoped memory of all TPUs from v5e on, by the bytes of a number.
_ROWS = 512
_TILE = {2: 1024, 4: 512}


def fits_megablox(left: Array, right: Array) -> bool:
    """Whether the kernels take these dtypes."""
    return left.dtype == right.dtype and left.dtype in (jnp.bfloat16, jnp.float32)


def grouped_product(
    x: Float[Array, "tokens rows"],
    weight: Float[Array, "experts rows columns"] | Float[Array, "experts columns rows"],
    sizes: Int[Array, "experts"],
    *,
    transposed: bool = False,
    interpret: bool = False,
) -> Float[Array, "tokens columns"]:
    """`x · weight[expert]` for each expert's rows, or `x · weight[expert]ᵀ`; anything elsewhere.

    `interpret` runs the transposed product's kernel on any platform.
    """
    if not transposed:
        return sequential_vmap(lax.ragged_dot)(x, weight, sizes)
    # Here, since the module is slow to import and of no use without a TPU.
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    tiles = _tiles(x, weight.shape[2], weight.shape[1])

    def product(x, weight, sizes):
        return gmm(x, weight, sizes, x.dtype, tiles, transpose_rhs=True, interpret=interpret)

    return _in_tiles(product, (x,), weight, sizes)[: len(x)]


def outer_product(
    left: Float[Array, "tokens rows"],
    right: Float[Array, "tokens columns"],
    sizes: Int[Array, "experts"],
    *,
    interpret: bool = False,
) -> Float[Array, "experts rows columns"]:
    """`leftᵀ · right` over each expert's rows, which `interpret` runs on any platform."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    tiles = _tiles(left, left.shape[1], right.shape[1])

    def product(left, right, sizes):
        return tgmm(left.T, right, sizes, left.dtype, tiles, interpret=interpret)

    return _in_tiles(product, (left, right), sizes)


def _tiles(rows: Array, *sizes: int) -> tuple[int, ...]:
    tile = _TILE[rows.dtype.itemsize]
    return min(_ROWS, -(-len(rows) // 16) * 16), *(min(tile, size) for size in sizes)


def _in_tiles(product: Callable[..., Array], rows: tuple[Array, ...], *others: Array) -> Array:
    """The product with rows in whole tiles, one after another under `vmap`."""
    block = _tiles(rows[0])[0]
    rows = tuple(jnp.pad(x, ((0, -len(x) % block), (0, 0))) for x in rows)
    return call_kernel(sequential_vmap(product), *rows, *others)
