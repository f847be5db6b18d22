"""Products with a checkpoint's `[out, in]` weights, plain and by attention heads."""

from jax import lax
from jaxtyping import Array, Float

from llama4_eqx.layers.quantized import Quantized, quantized_product
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
        out = lax.dot_general(rows, weight, (((1,), (1,)), ((), ())))
    return save_residual(out).reshape(*x.shape[:-1], weight.shape[0])


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
