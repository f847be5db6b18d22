"""Rotary position embeddings (RoPE): interleaved pairs (x0, x1), (x2, x3), … rotated in float32."""

import math

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llama4_eqx.layers.platforms import by_platform, may_run_on


class Rotation(eqx.Module):
    """Cosine and sine of the rotation angle of each feature pair of each token."""

    cos: Float[Array, "*batch seq pairs"]
    sin: Float[Array, "*batch seq pairs"]

    def __call__(
        self, x: Float[Array, "*batch seq heads head_dim"]
    ) -> Float[Array, "*batch seq heads head_dim"]:
        forms = {"default": _rotate_pairs}
        if may_run_on("tpu"):
            forms["tpu"] = _rotate_by_product
        return by_platform(x, self.cos[..., None, :], self.sin[..., None, :], **forms)


def _rotate_pairs(x: Array, cos: Array, sin: Array) -> Array:
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)


def _rotate_by_product(x: Array, cos: Array, sin: Array) -> Array:
    """With an exact product that maps each pair (a, b) to (-b, a): an axis of two features would be
    padded to a TPU's 128 lanes."""
    turn = np.kron(np.eye(x.shape[-1] // 2), [[0, 1], [-1, 0]]).astype(x.dtype)
    turned = jnp.matmul(x, turn, precision="highest").astype(jnp.float32)
    cos, sin = (jnp.repeat(part, 2, axis=-1) for part in (cos, sin))
    return (x.astype(jnp.float32) * cos + turned * sin).astype(x.dtype)


def rope_frequencies(size: int, theta: float) -> np.ndarray:
    """`theta^(-2i / size)` for each pair `i`, in float32.

    The power is exact and rounded where the reference rounds: at position 10⁶ one bit of a
    frequency is a tenth of a radian.
    """
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    return 1 / (theta ** exponents.astype(np.float64)).astype(np.float32)


class RotaryEmbedding(eqx.Module):
    """Rotates pair `i` of a token at position `p` by `p · theta^(-2i / head_dim)`, or more slowly
    where Llama 3's scaling stretches slow pairs by `factor` for contexts beyond the trained one.

    Stores no array: angles are computed from positions, in float32 as in the reference.
    """

    head_dim: int = eqx.field(static=True)
    theta: float = eqx.field(static=True)
    factor: float = eqx.field(static=True, default=1.0)
    low_freq_factor: float = eqx.field(static=True, default=1.0)
    high_freq_factor: float = eqx.field(static=True, default=1.0)
    original_max_positions: int = eqx.field(static=True, default=1)

    def frequencies(self) -> np.ndarray:
        """Radians per position of each pair."""
        frequencies = rope_frequencies(self.head_dim, self.theta)
        # How many turns a pair makes within the original context decides how far it is stretched.
        turns = self.original_max_positions * frequencies / np.float32(2 * math.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        if low == high:  # as in Scout: no band between, so nothing to blend (and no 0 / 0)
            unscaled = (turns >= low).astype(np.float32)
        else:
            unscaled = np.clip((turns - low) / (high - low), 0, 1).astype(np.float32)
        return frequencies * unscaled + frequencies * (1 - unscaled) / np.float32(self.factor)

    def __call__(self, positions: Int[Array, "*batch seq"]) -> Rotation:
        angles = positions[..., None].astype(jnp.float32) * self.frequencies()
        return Rotation(jnp.cos(angles), jnp.sin(angles))
