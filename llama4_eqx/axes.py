"""The name of a parameter, and the words for its axes, read off the annotation that also checks its
shape."""

from typing import Any

import equinox as eqx
import jax
from jax.tree_util import KeyPath


def leaf_name(path: KeyPath) -> str:
    """A leaf's name from its path as `jax.tree_util` has it: `"decoder.norm.weight"`."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def axis_words(tree: Any) -> dict[str, tuple[str, ...]]:
    """The axes of every array leaf, by its name: `{"decoder.norm.weight": ("hidden",), …}`.

    A leaf stacked by `eqx.filter_vmap` has `layers` in front. The tree may be a module, or hold
    some in tuples and dicts, as the state of an optimiser does; it may have arrays or their shapes.

    An axis of an array that isn't a module's own is `unnamed`. Raises a `ValueError` for a module's
    array whose annotation names no axes.
    """
    found = {}

    def walk(value: Any, hint: Any, path: str) -> None:
        inside = f"{path}." if path else ""
        if isinstance(value, eqx.Module):
            for name, inner_hint in type(value).__annotations__.items():
                walk(getattr(value, name), inner_hint, inside + name)
        elif isinstance(value, tuple | list):
            for name, item in zip(getattr(value, "_fields", range(len(value))), value, strict=True):
                walk(item, None, f"{inside}{name}")
        elif isinstance(value, dict):
            for name, item in value.items():
                walk(item, None, f"{inside}{name}")
        elif isinstance(value, jax.Array | jax.ShapeDtypeStruct):
            found[path] = _words(value, hint, path)

    walk(tree, None, "")
    return found


def _words(array: Any, hint: Any, path: str) -> tuple[str, ...]:
    axes = len(array.shape)
    if axes == 0 or hint is None:
        return ("unnamed",) * axes
    options = [h for h in (hint, *getattr(hint, "__args__", ())) if hasattr(h, "dim_str")]
    if not options:
        raise ValueError(f"{path} has no annotation that names its axes.")
    words = tuple(word.lstrip("*") for word in options[0].dim_str.split() if word != "...")
    return ("layers",) * (axes - len(words)) + words
