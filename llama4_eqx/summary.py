"""A model at a glance: its repr, and a table of its parameters."""

import dataclasses
import math
from collections import Counter
from typing import Any

import equinox as eqx
import jax
from jaxtyping import PyTree

from llama4_eqx.axes import axis_words, leaf_name

_UNITS = {"GB": 10**9, "MB": 10**6, "kB": 10**3, "bytes": 1}


def parameter_table(tree: PyTree) -> str:
    """A table of a model's arrays, to print: name, axis words, shape, dtype, bytes, and how the
    array is sharded. `tree` may be any pytree of modules, with arrays or shapes as leaves."""
    words = axis_words(tree)
    arrays = _arrays(tree)
    rows = [("parameter", "axes", "shape", "dtype", "bytes", "sharding")]
    rows += [
        (
            name,
            " ".join(words[name]),
            " × ".join(map(str, array.shape)) or "scalar",
            array.dtype.name,
            f"{_bytes(array):,}",
            _sharding(array),
        )
        for name, array in arrays
    ]
    number, size = sum(math.prod(a.shape) for _, a in arrays), sum(_bytes(a) for _, a in arrays)
    rows.append((f"{len(arrays)} arrays", "", f"{number:,} numbers", "", f"{size:,}", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if i == 4 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def model_repr(model: Any) -> str:
    """A `Llama4` in a few lines, whatever its depth: what its layers are, and how large it is."""
    dtypes = sorted({array.dtype.name for _, array in _arrays(model)})
    lines = [", ".join([f"{type(model).__name__}: {_size(model)}", *dtypes])]
    if model.vision_model is not None:
        lines.append(f"  {_module(model.vision_model)}: {_size(model.vision_model)}")
    # From the config, since the leaves may be masks, or None where a filter took them out.
    text = model.config.text_config
    head = "tied" if text.tie_word_embeddings else "untied"
    lines.append(f"  vocab {text.vocab_size:,}, hidden {text.hidden_size:,}, {head} head")
    first = 0
    for block in model.decoder.blocks:
        last = first + block.depth - 1
        how = "" if block.repeats is None else f", stacked and scanned {block.repeats} times"
        lines.append(f"  layers {first} to {last}{how}: {_size(block)}")
        kinds = Counter(map(_layer, block.layers))
        lines += [f"    {number} × {kind}" for kind, number in kinds.items()]
        first = last + 1
    lines.append(f"  {model.parallel!r}")
    return "\n".join(lines)


def _arrays(tree: PyTree) -> list[tuple[str, Any]]:
    return [
        (leaf_name(path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)
    ]


def _bytes(array: Any) -> int:
    return math.prod(array.shape) * array.dtype.itemsize


def _size(tree: PyTree) -> str:
    arrays = [array for _, array in _arrays(tree)]
    size = sum(map(_bytes, arrays))
    unit = next(unit for unit, step in _UNITS.items() if size >= step or step == 1)
    shown = f"{size / _UNITS[unit]:.3g}"
    return f"{sum(math.prod(array.shape) for array in arrays):,} parameters, {shown} {unit}"


def _layer(layer: Any) -> str:
    parts = [getattr(layer, name) for name in ("self_attn", "feed_forward") if hasattr(layer, name)]
    return f"{type(layer).__name__}({', '.join(map(_module, parts))})"


def _module(module: Any) -> str:
    """The class, and the settings that aren't off."""
    fields = dataclasses.fields(module) if isinstance(module, eqx.Module) else ()
    settings = [
        f"{field.name}={value!r}"
        for field in fields
        if isinstance(value := getattr(module, field.name, None), bool | int | float | str)
        and value
    ]
    return type(module).__name__ + (f"({', '.join(settings)})" if settings else "")


def _sharding(array: Any) -> str:
    sharding = getattr(array, "sharding", None)
    if sharding is None:
        return ""
    spec = getattr(sharding, "spec", None)
    if spec is not None:
        return str(spec).replace("PartitionSpec", "P")
    return ", ".join(sorted(map(str, sharding.device_set)))
