"""The words for a parameter's axes, read off the annotation that also checks its shape."""

from typing import Any

import equinox as eqx
import jax


def axis_words(module: eqx.Module) -> dict[str, tuple[str, ...]]:
    """The axes of every array leaf, by its path: `{"decoder.norm.weight": ("hidden",), …}`.

    A leaf stacked by `eqx.filter_vmap` has `layers` in front. The module may hold arrays or their
    shapes.
    """
    found = {}

    def walk(value: Any, hint: Any, path: str) -> None:
        if isinstance(value, eqx.Module):
            for name, inner_hint in type(value).__annotations__.items():
                inner = getattr(value, name)
                walk(inner, inner_hint, f"{path}.{name}" if path else name)
        elif isinstance(value, tuple):
            for i, item in enumerate(value):
                walk(item, None, f"{path}.{i}")
        elif isinstance(value, jax.Array | jax.ShapeDtypeStruct):
            options = (hint, *getattr(hint, "__args__", ()))
            words = next(tuple(h.dim_str.split()) for h in options if hasattr(h, "dim_str"))
            found[path] = ("layers",) * (len(value.shape) - len(words)) + words

    walk(module, None, "")
    return found
