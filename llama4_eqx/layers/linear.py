"""Products with a checkpoint's `[out, in]` weights, plain and by attention heads; embeddings."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama4_eqx.layers.cpu_products import (
    ONE_THREAD,
    bfloat16_product,
    in_turn,
    product,
    product_in_halves,
)
from llama4_eqx.layers.platforms import by_platform
from llama4_eqx.layers.quantized import Quantized
from llama4_eqx.layers.quantized_products import quantized_product
from llama4_eqx.layers.remat import save_residual


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

    def rows(table: Array, tokens: Array) -> Array:
        return table[tokens]

    if table.dtype != jnp.bfloat16:
        return rows(table, tokens)
    return by_platform(table, tokens, cpu=lambda *both: rows(*in_turn(*both)), default=rows)


def _product(
    rows: Float[Array, "rows in_features"], weight: Float[Array, "out_features in_features"]
) -> Float[Array, "rows out_features"]:
    if rows.dtype == weight.dtype == jnp.bfloat16:
        return by_platform(rows, weight, cpu=bfloat16_product, default=product)
    if len(rows) == 1 and weight.size < ONE_THREAD and len(weight) % 2 == 0:
        return by_platform(rows, weight, cpu=product_in_halves, default=product)
    return product(rows, weight)


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
