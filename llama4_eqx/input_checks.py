"""Checks of what a user passes to a forward call: before tracing where that is possible, else at
run time."""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from llama4_eqx.run_time_checks import refuse_if

LAST_POSITION = 2**31 - 2
"""The largest position: one more is still a 32-bit integer."""


@runtime_checkable
class SupportsArray(Protocol):
    """An array of another library, such as torch."""

    def __array__(self) -> np.ndarray: ...


_Other = list | tuple | SupportsArray
TokenIds = Int[Array, "*batch seq"] | Int[np.ndarray, "*batch seq"] | _Other
"""Token ids, positions or segment ids as JAX's, NumPy's or torch's integers, or as (nested) lists
of numbers."""
Number = int | np.integer
"""A whole number, Python's or NumPy's."""
Mask = Bool[Array, "*batch seq"] | Bool[np.ndarray, "*batch seq"] | _Other
"""A mask in any of these forms."""
Pixels = (
    Float[Array, "tiles channels height width"]
    | Float[np.ndarray, "tiles channels height width"]
    | SupportsArray
)
"""Tiles as JAX's, NumPy's or torch's floats."""


PAD_ROWS = "pad rows of different lengths and pass a mask"


def token_ids(tokens: Any, vocab: int) -> Int[Array, "*batch seq"]:
    """The tokens as an int32 array, each checked to be an id of the vocabulary.

    Raises a `ValueError` for anything but integers, and for an id outside the vocabulary: at once
    where the values are known, at run time under `jit`.
    """
    tokens = as_array("tokens", tokens, "ids", PAD_ROWS)
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
            wrong = ids[(ids < 0) | (ids >= vocab)].flat[0]
            raise ValueError(f"{sentence} The first such id is {wrong}.")
        return jnp.asarray(tokens, jnp.int32)
    # In a small dtype the bound itself could wrap around.
    top = min(vocab - 1, int(jnp.iinfo(tokens.dtype).max))
    wrong = jnp.any((tokens < 0) | (tokens > jnp.asarray(top, tokens.dtype)))
    return tokens.astype(jnp.int32) + refuse_if(wrong, sentence)


def mask_of(name: str, mask: Any, shape: tuple[int, ...]) -> Bool[Array, "*batch seq"] | None:
    """The mask as an array. Raises a `ValueError` unless it is boolean and of the tokens' shape."""
    if mask is None:
        return None
    mask = _of_shape(name, mask, shape)
    if mask.dtype != jnp.bool_:
        raise ValueError(
            f"{name} must be boolean, True at the tokens that count, but is {mask.dtype}: pass "
            f"{name} == 1, or {name} == 0 where it holds what is added to scores."
        )
    return jnp.asarray(mask)


def integers_of(name: str, given: Any, shape: tuple[int, ...]) -> Int[Array, "*batch seq"] | None:
    """Integers that go with the tokens, as an array. Raises a `ValueError` for another shape, for
    other numbers, and for those of more than 32 bits."""
    if given is None:
        return None
    given = _of_shape(name, given, shape)
    if not jnp.issubdtype(given.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers, but are {given.dtype}.")
    if isinstance(given, np.ndarray) and given.size:
        limits = np.iinfo(np.int32)
        if given.min() < limits.min or given.max() > limits.max:
            raise ValueError(f"{name} must be integers of 32 bits, but go up to {given.max()}.")
    return jnp.asarray(given)


def pixels_of(pixel_values: Any) -> Float[Array, "tiles channels height width"]:
    """The pixels as an array. Raises a `ValueError` unless they are normalised floats."""
    pixels = as_array("pixel_values", pixel_values, "tiles", "make them with processing.process")
    if not jnp.issubdtype(pixels.dtype, jnp.floating):
        raise ValueError(
            f"pixel_values must be normalised floats, but are {pixels.dtype}: make them with "
            "llama4_eqx.processing.process."
        )
    if pixels.ndim != 4:
        raise ValueError(
            "pixel_values must be (tiles, channels, height, width), the tiles of all rows' images "
            f"in reading order, but have the shape {tuple(pixels.shape)}."
        )
    return jnp.asarray(pixels)


def _of_shape(name: str, given: Any, shape: tuple[int, ...]) -> Any:
    given = as_array(name, given, "the tokens' shape", "pad its rows like the tokens'")
    if given.shape != shape:
        raise ValueError(f"{name} must have the tokens' shape {shape}, but has {given.shape}.")
    return given


def as_array(name: str, given: Any, content: str, mend: str) -> Any:
    """JAX's array, or NumPy's of anything else."""
    if isinstance(given, jax.Array):
        return given
    kind = type(given).__name__
    try:
        array = np.asarray(given)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name} must be an array of {content}, or lists of equal lengths, but are a {kind} "
            f"that is none ({error}): {mend}."
        ) from error
    # An empty list says nothing of its kind.
    return array.astype(np.int32) if array.size == 0 and array.dtype == np.float64 else array


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
