"""The norms: RMS with a weight (`RMSNorm`) and without (`rms_normalize`), and `LayerNorm`."""

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def rms_normalize(x: Float[Array, "*batch size"], eps: float) -> Float[Array, "*batch size"]:
    """`x / sqrt(mean(x²) + eps)` over the last axis, in float32, returned in x's dtype."""
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    return (x32 * lax.rsqrt(mean_square + eps)).astype(x.dtype)


class RMSNorm(eqx.Module):
    """`rms_normalize(x) * weight`, multiplied *after* the cast to the activation dtype, as the
    released bf16 weights expect."""

    weight: Float[Array, "hidden"]
    eps: float = eqx.field(static=True)

    def __init__(self, hidden: int, *, eps: float, dtype: DTypeLike) -> None:
        self.weight = jnp.ones(hidden, dtype)
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch hidden"]) -> Float[Array, "*batch hidden"]:
        return rms_normalize(x, self.eps) * self.weight


class LayerNorm(eqx.Module):
    """`(x - mean) / sqrt(variance + eps) * weight + bias`, all of it in float32."""

    weight: Float[Array, "vision_hidden"]
    bias: Float[Array, "vision_hidden"]
    eps: float = eqx.field(static=True)

    def __init__(self, vision_hidden: int, *, eps: float, dtype: DTypeLike) -> None:
        self.weight = jnp.ones(vision_hidden, dtype)
        self.bias = jnp.zeros(vision_hidden, dtype)
        self.eps = eps

    def __call__(
        self, x: Float[Array, "*batch vision_hidden"]
    ) -> Float[Array, "*batch vision_hidden"]:
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        scaled = centred * lax.rsqrt(variance + self.eps) * self.weight.astype(jnp.float32)
        return (scaled + self.bias.astype(jnp.float32)).astype(x.dtype)
