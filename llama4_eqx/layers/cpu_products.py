"""Products with matrices `[out, in]`, in forms that XLA's CPU compiler makes fast programs of."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

# A product of one row with a matrix of fewer numbers runs in one thread.
ONE_THREAD = 2**20


def product(
    rows: Num[Array, "rows in_features"],
    matrix: Num[Array, "..."],
    dtype: DTypeLike | None = None,
    axis: int = 1,
) -> Num[Array, "rows out_features"]:
    """`rows · matrixᵀ`, summed and returned in the dtype, that of the operands by default. The
    matrix's inputs are along `axis`."""
    numbers = (((1,), (axis,)), ((), ()))
    return lax.dot_general(rows, matrix, numbers, preferred_element_type=dtype)


def product_in_halves(
    row: Float[Array, "rows in_features"], matrix: Float[Array, "out_features in_features"]
) -> Float[Array, "rows out_features"]:
    """That of one row, as a batch of two, each of half the outputs.

    A batch runs in several threads, however few its numbers are: decoding in float32 reads a matrix
    of 2 MB in 0.55 of the time.
    """
    halves = matrix.reshape(2, -1, matrix.shape[1])
    both = jnp.broadcast_to(row, (2, *row.shape))
    return lax.dot_general(both, halves, (((2,), (2,)), ((0,), (0,)))).reshape(1, -1)


def product_in_blocks(
    row: Num[Array, "rows in_features"], matrix: Num[Array, "..."], blocks: int, axis: int = 1
) -> Float[Array, "rows out_features"]:
    """That of one row with a matrix of narrow numbers, in float32. Its inputs are along `axis`, in
    `blocks` of the same size, which JAX 0.10 computes fast if they are 8 of bfloat16 or 16 of int8.

    `product` would convert the whole matrix first. Here the products of each block of the inputs
    are added up as they are converted, and what that leaves, a number for each place in a block, is
    summed last. That keeps many numbers of a row under way at a time, which one sum doesn't.
    """
    size = matrix.shape[axis] // blocks
    row, matrix = in_turn(row, matrix)
    wide = jnp.expand_dims(row[0].astype(jnp.float32), 1 - axis)
    sums = jnp.zeros((), jnp.float32)
    for start in range(0, blocks * size, size):
        x, numbers = (
            lax.slice_in_dim(one, start, start + size, axis=axis) for one in (wide, matrix)
        )
        sums = sums + numbers.astype(jnp.float32) * x
    # With ones, since XLA would take a plain sum and the additions away from the conversion.
    return product(jnp.ones((1, size)), sums, axis=axis)


@jax.custom_jvp
def bfloat16_product(
    rows: Float[Array, "rows in_features"], matrix: Float[Array, "out_features in_features"]
) -> Float[Array, "rows out_features"]:
    """`product` of bfloat16, twice as fast by a sum in float32, and for one row in blocks.

    Its derivatives are those of `product`.
    """
    if len(rows) == 1 and matrix.shape[1] % 8 == 0:
        out = product_in_blocks(rows, matrix, 8)  # of sixteen, XLA converts the matrix first
    else:
        rows, matrix = in_turn(rows, matrix)
        out = product(rows, matrix, jnp.float32)
    return out.astype(rows.dtype)


bfloat16_product.defjvps(
    lambda d_rows, out, rows, matrix: product(d_rows, matrix),
    lambda d_matrix, out, rows, matrix: product(rows, d_matrix),
)


def in_turn(*operands: Array) -> tuple[Array, ...]:
    """The operands, tied to each other: in a loop, XLA would convert those that stay the same to
    float32 ahead of it, and keep them in twice the bytes."""
    return tuple(lax.optimization_barrier(operands))
