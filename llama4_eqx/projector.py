"""From the vision encoder's patches to image tokens in the decoder's width."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from llama4_eqx.layers.dropout import dropout
from llama4_eqx.layers.initializers import normal
from llama4_eqx.layers.linear import linear


def pixel_shuffle(
    patches: Float[Array, "*batch patches channels"], ratio: float, *, rows: int | None = None
) -> Float[Array, "*batch image_tokens shuffled"]:
    """Merges each square of `1 / ratio` by `1 / ratio` neighbouring patches into one token, whose
    features are theirs concatenated in row-major order.

    The patches fill `rows` rows in row-major order, a square if None. Raises a `ValueError` if the
    merged squares don't cover them exactly. Source: `pixel_shuffle` of `transformers`' Llama 4.
    """
    *batch, count, channels = patches.shape
    side = round(1 / ratio)
    if rows is None:
        rows = columns = math.isqrt(count)
    else:
        columns = count // rows
    if rows * columns != count:
        raise ValueError(
            f"{count} patches don't fill {rows} rows of {columns}: pass rows= for an image that "
            "isn't square."
        )
    if side < 1 or abs(side * ratio - 1) > 1e-6 or rows % side or columns % side:
        raise ValueError(
            f"Squares of 1 / {ratio} patches don't cover {rows} x {columns} patches: the ratio "
            "must be 1 over a number that divides both."
        )
    squares = patches.reshape(*batch, rows // side, side, columns // side, side * channels)
    tokens = jnp.swapaxes(squares, -3, -2)
    return tokens.reshape(*batch, count // side**2, channels * side**2)


class VisionMLP2(eqx.Module):
    """`gelu(fc2(dropout(gelu(fc1(x)))))` with the exact GELU, also at the output."""

    fc1: Float[Array, "vision_mid vision_ff"]
    fc2: Float[Array, "vision_out vision_mid"]
    dropout: float = eqx.field(static=True)

    def __init__(
        self,
        vision_ff: int,
        vision_mid: int,
        vision_out: int,
        *,
        dropout: float,
        init_std: float,
        dtype: DTypeLike,
        key: PRNGKeyArray,
    ) -> None:
        fc1_key, fc2_key = jax.random.split(key)
        self.fc1 = normal(init_std)(fc1_key, (vision_mid, vision_ff), dtype)
        self.fc2 = normal(init_std)(fc2_key, (vision_out, vision_mid), dtype)
        self.dropout = dropout

    def __call__(
        self, x: Float[Array, "*batch vision_ff"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*batch vision_out"]:
        mid = jax.nn.gelu(linear(x, self.fc1), approximate=False)
        return jax.nn.gelu(linear(dropout(mid, self.dropout, key), self.fc2), approximate=False)


class PixelShuffleMLP(eqx.Module):
    """Merges each square of neighbouring patches into one token, then maps it to the projector's
    width."""

    mlp: VisionMLP2
    ratio: float = eqx.field(static=True)

    def __call__(
        self,
        patches: Float[Array, "*batch patches vision_hidden"],
        *,
        rows: int | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*batch image_tokens vision_out"]:
        return self.mlp(pixel_shuffle(patches, self.ratio, rows=rows), key=key)


class MultiModalProjector(eqx.Module):
    """A bias-free linear map to the decoder's width."""

    linear_1: Float[Array, "hidden vision_out"]

    def __init__(
        self,
        vision_out: int,
        hidden: int,
        *,
        init_std: float,
        dtype: DTypeLike,
        key: PRNGKeyArray,
    ) -> None:
        self.linear_1 = normal(init_std)(key, (hidden, vision_out), dtype)

    def __call__(self, x: Float[Array, "*batch vision_out"]) -> Float[Array, "*batch hidden"]:
        return linear(x, self.linear_1)
