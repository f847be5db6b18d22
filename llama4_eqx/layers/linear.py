"""Products with a checkpoint's `[out, in]` weights, plain and by attention heads; embeddings."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from llama4_eqx.layers.platforms import by_platform
from llama4_eqx.layers.quantized import Quantized, quantized_product
from llama4_eqx.layers.remat import save_residual

# XLA's CPU compiler runs a product with a matrix of fewer numbers in one thread.
_ONE_THREAD = 2**20
# Pieces of the inputs, in a product of one row in bfloat16.
_PIECES = 8


def linear(
    x: Float[Array, "*batch in_features"],
    weight: Float[Array, "out_features in_features"] | Quantized,
) -> Float[Array, "*batch out_features"]:
    """`x · weightᵀ`.

    Computed as one two-dimensional product: from an einsum with more axes XLA makes, on CPUs, a
    transposed copy of the weight at every call.
    """
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(weight, Quantized):
        out = quantized_product(rows, weight)
    else:
        out = _product(rows, weight)
    return save_residual(out).reshape(*x.shape[:-1], weight.shape[0])


def lookup(
    table: Float[Array, "vocab hidden"], tokens: Int[Array, "*batch seq"]
) -> Float[Array, "*batch seq hidden"]:
    """The tokens' rows of the table."""
    if table.dtype != jnp.bfloat16:
        return table[tokens]
    return by_platform(table, tokens, cpu=_lookup_in_turn, default=lambda table, at: table[at])


def _lookup_in_turn(table: Array, tokens: Array) -> Array:
    """Tied to the tokens: else XLA converts the table to float32 ahead of a loop around this."""
    table, tokens = lax.optimization_barrier((table, tokens))
    return table[tokens]


def _product(
    rows: Float[Array, "rows in_features"], weight: Float[Array, "out_features in_features"]
) -> Float[Array, "rows out_features"]:
    if rows.dtype == weight.dtype == jnp.bfloat16:
        return by_platform(rows, weight, cpu=_product_of_bfloat16, default=_whole_product)
    if len(rows) == 1 and weight.size < _ONE_THREAD and len(weight) % 2 == 0:
        return by_platform(rows, weight, cpu=_product_in_halves, default=_whole_product)
    return _whole_product(rows, weight)


def _whole_product(rows: Array, weight: Array, dtype: DTypeLike | None = None) -> Array:
    numbers = (((1,), (1,)), ((), ()))
    return lax.dot_general(rows, weight, numbers, preferred_element_type=dtype)


def _product_in_halves(rows: Array, weight: Array) -> Array:
    """That of one row, as a batch of two, each of half the outputs.

    XLA runs a product with so few numbers in one thread, and a batch in several: decoding on CPUs
    reads a matrix of 2 MB in 0.55 of the time.
    """
    halves = weight.reshape(2, -1, weight.shape[1])
    both = jnp.broadcast_to(rows, (2, *rows.shape))
    return lax.dot_general(both, halves, (((2,), (2,)), ((0,), (0,)))).reshape(1, -1)


@jax.custom_jvp
def _product_of_bfloat16(rows: Array, weight: Array) -> Array:
    """With a sum in float32, at which XLA's CPU compiler is twice as fast as at one in bfloat16.

    For one row, though, it would convert the whole matrix first. So there the inputs are cut into
    pieces, whose products are added up as they are converted; what that leaves is summed last.
    """
    # Tied to the rows: else XLA converts the weight ahead of a loop around this.
    rows, weight = lax.optimization_barrier((rows, weight))
    size, rest = divmod(weight.shape[1], _PIECES)
    if len(rows) != 1 or rest:
        return _whole_product(rows, weight, jnp.float32).astype(rows.dtype)
    x = rows.astype(jnp.float32)
    pieces = [slice(i * size, (i + 1) * size) for i in range(_PIECES)]
    partial_sums = sum(weight[:, piece].astype(jnp.float32) * x[:, piece] for piece in pieces)
    return _whole_product(jnp.ones((1, size)), partial_sums).astype(rows.dtype)


_product_of_bfloat16.defjvps(
    lambda d_rows, out, rows, weight: _whole_product(d_rows, weight),
    lambda d_weight, out, rows, weight: _whole_product(rows, d_weight),
)


def project(
    x: Float[Array, "*batch hidden"],
    weight: Float[Array, "heads head_dim hidden"] | Quantized,
    bias: Float[Array, "heads head_dim"] | None,
) -> Float[Array, "*batch heads head_dim"]:
    """Projects to a vector for each head."""
    heads, head_dim, hidden = weight.shape
    matrix = weight.reshape(heads * head_dim, hidden)
    out = linear(x, matrix).reshape(*x.shape[:-1], heads, head_dim)
    return out if bias is None else out + bias


def unproject(
    x: Float[Array, "*batch heads head_dim"],
    weight: Float[Array, "hidden heads head_dim"] | Quantized,
    bias: Float[Array, "hidden"] | None,
) -> Float[Array, "*batch hidden"]:
    """Projects all heads' vectors back to the residual stream."""
    inner = weight.shape[-2] * weight.shape[-1]
    out = linear(x.reshape(*x.shape[:-2], inner), weight.reshape(len(weight), inner))
    return out if bias is None else out + bias
