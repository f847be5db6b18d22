"""Checks of what a user passes to a forward call: before tracing where that is possible, else at
run time."""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int

from llama4_eqx.run_time_checks import refuse_if

LAST_POSITION = 2**31 - 2
"""The largest position: one more is still a 32-bit integer."""


@runtime_checkable
class SupportsArray(Protocol):
    """An array of another library, such as torch."""

    def __array__(self) -> np.ndarray: ...


TokenIds = Int[Array, "*batch seq"] | Int[np.ndarray, "*batch seq"] | list | tuple | SupportsArray
"""Token ids as JAX's, NumPy's or torch's integers, or as (nested) lists of numbers."""


def token_ids(tokens: Any, vocab: int) -> Int[Array, "*batch seq"]:
    """The tokens as an int32 array, each checked to be an id of the vocabulary.

    Raises a `ValueError` for anything but integers, and for an id outside the vocabulary: at once
    where the values are known, at run time under `jit`.
    """
    if not isinstance(tokens, jax.Array):
        kind = type(tokens).__name__
        try:
            tokens = np.asarray(tokens)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"tokens must be an array of ids, or lists of equal lengths, but are a {kind} that "
                f"is none ({error}): pad rows of different lengths and pass a mask."
            ) from error
        if tokens.size == 0 and tokens.dtype == np.float64:  # an empty list
            tokens = tokens.astype(np.int32)
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"tokens must be integers, but are {tokens.dtype}: pass ids, such as a tokenizer's."
        )
    if tokens.ndim == 0:
        raise ValueError("tokens must have an axis, but are one number: pass [number].")
    sentence = f"A token id is outside the vocabulary: ids go from 0 to {vocab - 1}."
    if isinstance(tokens, np.ndarray) or _is_known(tokens):
        ids = np.asarray(tokens)
        if ids.size and (ids.min() < 0 or ids.max() >= vocab):
            raise ValueError(sentence)
        return jnp.asarray(tokens, jnp.int32)
    # In a small dtype the bound itself could wrap around.
    top = min(vocab - 1, int(jnp.iinfo(tokens.dtype).max))
    wrong = jnp.any((tokens < 0) | (tokens > jnp.asarray(top, tokens.dtype)))
    return tokens.astype(jnp.int32) + refuse_if(wrong, sentence)


def check_shape(name: str, given: Any, shape: tuple[int, ...]) -> None:
    """Raises a `ValueError` unless an array that goes with the tokens has their shape."""
    if given is not None and tuple(given.shape) != shape:
        raise ValueError(
            f"{name} must have the tokens' shape {shape}, but has {tuple(given.shape)}."
        )


def check_mask(name: str, mask: Any, shape: tuple[int, ...]) -> None:
    """Raises a `ValueError` unless a mask is boolean and of the tokens' shape."""
    check_shape(name, mask, shape)
    if mask is not None and mask.dtype != jnp.bool_:
        raise ValueError(
            f"{name} must be boolean, True at the tokens that count, but is {mask.dtype}: pass "
            f"{name} == 1, or {name} == 0 where it holds what is added to scores."
        )


def check_pixels(pixel_values: Any) -> None:
    """Raises a `ValueError` for pixels that aren't normalised floats."""
    if not jnp.issubdtype(pixel_values.dtype, jnp.floating):
        raise ValueError(
            f"pixel_values must be normalised floats, but are {pixel_values.dtype}: make them with "
            "llama4_eqx.processing.process."
        )
    if pixel_values.ndim != 4:
        raise ValueError(
            "pixel_values must be (tiles, channels, height, width), the tiles of all rows' images "
            f"in reading order, but have the shape {tuple(pixel_values.shape)}."
        )


def check_positions(positions: Int[Array, "*batch seq"]) -> Int[Array, ""]:
    """0, or an error for positions that are negative or too large for their arithmetic."""
    wrong = jnp.any((positions < 0) | (positions > LAST_POSITION))
    return refuse_if(wrong, f"A position is negative or above {LAST_POSITION}.")


def check_image_tokens(wanted: Int[Array, ""], given: int) -> Int[Array, ""]:
    """0, or an error that names both numbers."""
    sentence = (
        f"The tokens have {{detail}} image tokens, but the images give {given} features: tokens "
        "and pixel_values must come from the same call of process()."
    )
    return refuse_if(wanted != given, sentence, wanted)


def _is_known(x: jax.Array) -> bool:
    return not isinstance(x, Tracer) and x.is_fully_addressable
