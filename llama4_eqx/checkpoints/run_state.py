"""The leaves of a run's state, and its position in the data, in the form that is stored."""

import base64
import json
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np


def named_leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    """The leaves of a state with their paths."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield jax.tree_util.keystr(path), leaf


def is_array(leaf: Any) -> bool:
    """Whether a leaf of `like` is an array or its shape."""
    return eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def dtype_and_shape(leaf: Any) -> str:
    """As `float32[3,4]`."""
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def stored_form(leaf: Any) -> Any:
    """The leaf as an array of numbers: random keys as their data."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def restored(value: Any, like: Any) -> jax.Array:
    """The leaf from its stored form, with the dtype and weak type of `like`."""
    if value is None:  # an empty array, which isn't stored
        return jnp.empty(like.shape, like.dtype, device=like.sharding)
    if isinstance(value, np.ndarray):
        # Weak types come from Python's numbers. They decide what a product with bfloat16 is.
        weak = getattr(like, "weak_type", False) and value.ndim == 0
        value = jnp.asarray(value.item()) if weak else jnp.array(value)
    if not _is_key(like):
        return value
    return jax.random.wrap_key_data(value, impl=jax.random.key_impl(jnp.empty((), like.dtype)))


def encoded_position(state: Any) -> dict[str, Any]:
    """A position in the data as JSON.

    Raises a `TypeError` for what isn't bytes and doesn't come back from JSON as it was.
    """
    if isinstance(state, bytes):
        return {"base64": base64.b64encode(state).decode()}
    try:
        same = json.loads(json.dumps(state)) == state
    except TypeError:
        same = False
    if not same:
        raise TypeError(
            "The data's state must be bytes, or what comes back from JSON as it was: numbers, "
            f"strings, lists, and dicts with strings as keys. It is {state!r}."
        )
    return {"json": state}


def decoded_position(state: dict[str, Any]) -> Any:
    """Undoes `encoded_position`."""
    return base64.b64decode(state["base64"]) if "base64" in state else state["json"]
