"""Parts of a layer that users have written."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx

_PACKAGE = __name__.partition(".")[0]


def foreign_parts(layer: eqx.Module) -> dict[str, str]:
    """The modules of a layer whose classes aren't this package's: path and name of the class, such
    as `{"self_attn": "LinearAttention"}`. The path of the layer itself is empty."""
    found = {}

    def walk(value: Any, path: str) -> None:
        if not isinstance(value, eqx.Module):
            return
        if type(value).__module__.partition(".")[0] != _PACKAGE:
            found[path] = type(value).__name__
            return
        for field in dataclasses.fields(value):
            walk(getattr(value, field.name, None), f"{path}.{field.name}".removeprefix("."))

    walk(layer, "")
    return found


def part_at(path: str) -> Callable[[Any], Any]:
    """A function that gives a module's part: `part_at("feed_forward.experts")(layer)`."""

    def part(module: Any) -> Any:
        for name in path.split("."):
            module = getattr(module, name)
        return module

    return part
