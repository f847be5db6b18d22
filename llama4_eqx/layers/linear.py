"""Products with a checkpoint's `[out, in]` weights, plain and by attention heads."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from llama4_eqx.layers.platforms import by_platform
from llama4_eqx.layers.quantized import Quantized, quantized_product
from llama4_eqx.layers.remat import save_residual

# XLA's CPU compiler runs a product with a matrix of fewer numbers in one thread.
_ONE_THREAD = 2**20


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


def _product(
    rows: Float[Array, "rows in_features"], weight: Float[Array, "out_features in_features"]
) -> Float[Array, "rows out_features"]:
    if len(rows) == 1 and weight.size < _ONE_THREAD and len(weight) % 2 == 0:
        return by_platform(rows, weight, cpu=_product_in_halves, default=_whole_product)
    return _whole_product(rows, weight)


def _whole_product(rows: Array, weight: Array) -> Array:
    return lax.dot_general(rows, weight, (((1,), (1,)), ((), ())))


def _product_in_halves(rows: Array, weight: Array) -> Array:
    """That of one row, as a batch of two, each of half the outputs.

    XLA runs a product with so few numbers in one thread, and a batch in several: decoding on CPUs
    reads a matrix of 2 MB in 0.55 of the time.
    """
    halves = weight.reshape(2, -1, weight.shape[1])
    both = jnp.broadcast_to(rows, (2, *rows.shape))
    return lax.dot_general(both, halves, (((2,), (2,)), ((0,), (0,)))).reshape(1, -1)


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
