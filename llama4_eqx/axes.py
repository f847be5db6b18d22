"""Names of a model's leaves and words for their axes, read off the annotations that check shapes.

The annotation `Float[Array, "experts hidden ff"]` is the only place that names an axis. Sharding
rules, optimisers, LoRA and the checkpoint tables all follow from it.
"""

import dataclasses
import inspect
import sys
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.tree_util import GetAttrKey, KeyPath
from jaxtyping import PyTree

GLOSSARY: dict[str, tuple[str, tuple[int, ...]]] = {
    "layers": ("layers stacked in one leaf and scanned", (12, 34)),
    "vocab": ("token ids", (202048,)),
    "hidden": ("features of the residual stream", (5120,)),
    "heads": ("query heads", (40, 16)),
    "kv_heads": ("key and value heads, each shared by a group of query heads", (8,)),
    "head_dim": ("features of one head", (128, 88)),
    "ff": ("inner features of a feed-forward network", (8192,)),
    "experts": ("routed experts of a layer", (16,)),
    "channels": ("colours of a pixel", (3,)),
    "patch": ("pixels along a side of a patch", (14,)),
    "patches": ("patches of a tile and the class token", (577,)),
    "vision_hidden": ("features of the vision encoder's residual stream", (1408,)),
    "vision_ff": ("inner features of the encoder's MLP, and inputs of the adapter's", (5632,)),
    "vision_mid": ("inner features of the adapter's MLP", (4096,)),
    "vision_out": ("features of an image token before the projector", (4096,)),
    "batch": ("rows of a batch; any number of axes", ()),
    "seq": ("tokens of a row", ()),
    "q_seq": ("queries, where keys are counted apart", ()),
    "kv_seq": ("keys, where queries are counted apart", ()),
    "slots": ("tokens that a layer's cache can hold", ()),
    "tokens": ("tokens of all rows, or rows sorted by expert", ()),
    "top_k": ("experts that a token is routed to: 1 in the releases", ()),
    "tiles": ("square parts of images", ()),
    "height": ("pixels from top to bottom", ()),
    "width": ("pixels from left to right", ()),
    "image_tokens": ("tokens that stand for a tile: 144 in the releases", ()),
    "pairs": ("pairs of features that RoPE rotates: half of head_dim", ()),
    "rank": ("inner features of a low-rank update", ()),
    "rows": ("output side of a weight seen as a matrix, or input side of an expert's", ()),
    "columns": ("the other side of that matrix", ()),
}
"""Every axis word of a parameter or of the model's interfaces: its meaning, and its sizes in Scout
(first the text decoder's, then the vision encoder's) where a parameter has it."""

# Neighbouring axes that are one axis of the matrix that a checkpoint holds.
_JOINED = (("heads", "head_dim"), ("kv_heads", "head_dim"), ("channels", "patch", "patch"))


def leaf_name(path: KeyPath) -> str:
    """A leaf's name from its path as `jax.tree_util` has it: `"decoder.norm.weight"`."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def axis_words(tree: PyTree) -> dict[str, tuple[str, ...]]:
    """The axis words of every array leaf, by leaf name: `{"decoder.norm.weight": ("hidden",), …}`.

    Leading axes that the annotation doesn't name are `layers`, as `eqx.filter_vmap` stacks them.
    The tree may be any pytree of modules, arrays or `jax.ShapeDtypeStruct`s, such as an optimiser's
    state. The axes of an array that isn't a module's own field are `unnamed`.

    Raises a `ValueError` for a module's array whose annotation names no axes.
    """
    found = {}

    def walk(value: Any, hint: Any, path: KeyPath) -> None:
        if isinstance(value, jax.Array | jax.ShapeDtypeStruct):
            found[leaf_name(path)] = _words(value, hint, leaf_name(path))
        elif hasattr(value, "numbers") and hasattr(value, "scale"):  # a `Quantized` weight
            words = _words(value.numbers, hint, leaf_name(path))
            found[f"{leaf_name(path)}.numbers"] = words
            found[f"{leaf_name(path)}.scale"] = tuple(
                "unnamed" if size == 1 else word
                for word, size in zip(words, value.scale.shape, strict=True)
            )
        elif isinstance(value, eqx.Module):
            hints = field_hints(type(value))
            for field in dataclasses.fields(value):
                inner = getattr(value, field.name, None)
                walk(inner, hints.get(field.name), (*path, GetAttrKey(field.name)))
        else:
            children = jax.tree_util.tree_leaves_with_path(
                value, is_leaf=lambda node: node is not value
            )
            for key, child in children:
                if child is not value:
                    walk(child, None, (*path, *key))

    walk(tree, None, ())
    return found


class MatrixAxes(NamedTuple):
    """How a parameter is a matrix, or a stack of matrices: the numbers of its axes by their role.

    Several neighbouring axes may count as the matrix's rows or columns.
    """

    stack: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]


def matrix_axes(tree: PyTree) -> dict[str, MatrixAxes | None]:
    """How each array leaf is a matrix, by leaf name; None for vectors, such as norms and biases.

    Layers are stacked, and so are experts, except in the router, whose rows they are. A leaf of any
    other number of axes than a matrix has (heads and their features count as one) is None, too.
    """
    return {name: _matrix(words) for name, words in axis_words(tree).items()}


def select(model: PyTree, *patterns: str) -> PyTree:
    """A filter that is True at the floating-point leaves whose names match one of the patterns.

    Patterns are the shell's: `*` matches anything, dots too, as in `"vision_model.*"` or
    `"*.norm.weight"`. A pattern that begins with `!` removes what it matches. The result serves as
    `eqx.partition`'s filter or as `trainable` of a training step. It belongs to the very model that
    it was made from: shard a model first, then select.

    Raises a `ValueError` for no pattern, and for one that matches no leaf.
    """
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(
            f"select takes one pattern of names or several, such as '*_proj', not {patterns}."
        )
    leaves, structure = jax.tree_util.tree_flatten_with_path(model)
    names = [leaf_name(path) if _is_floating(leaf) else "" for path, leaf in leaves]
    selected = [False] * len(names)
    for pattern in patterns:
        matches = [bool(name) and fnmatchcase(name, pattern.removeprefix("!")) for name in names]
        if not any(matches):
            raise ValueError(
                f"The pattern {pattern!r} fits no leaf. Paths look like "
                f"{next(filter(None, names), None)!r}; "
                "jax.tree_util.tree_leaves_with_path(model) lists them."
            )
        selected = [
            not pattern.startswith("!") if match else old
            for match, old in zip(matches, selected, strict=True)
        ]
    return jax.tree.unflatten(structure, selected)


def _is_floating(leaf: Any) -> bool:
    is_array = isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) or eqx.is_array(leaf)
    return is_array and jnp.issubdtype(leaf.dtype, jnp.inexact)


@cache
def field_hints(cls: type) -> dict[str, Any]:
    """The annotations of a class and its bases, with those written as strings evaluated."""
    hints = {}
    for base in reversed(cls.__mro__):
        names = {**vars(sys.modules[base.__module__]), **vars(base)}
        for name, hint in inspect.get_annotations(base).items():
            if isinstance(hint, str):
                try:
                    hint = eval(hint, names)
                except NameError:  # a class that is local to a function; its fields have their own
                    hint = None
            hints[name] = hint
    return hints


def _words(array: Any, hint: Any, name: str) -> tuple[str, ...]:
    axes = len(array.shape)
    if axes == 0 or hint is None:
        return ("unnamed",) * axes
    options = [h for h in (hint, *getattr(hint, "__args__", ())) if hasattr(h, "dim_str")]
    if not options:
        raise ValueError(f"{name} has no annotation that names its axes.")
    words = tuple(word.lstrip("*") for word in options[0].dim_str.split() if word != "...")
    return ("layers",) * (axes - len(words)) + words


def _matrix(words: tuple[str, ...]) -> MatrixAxes | None:
    groups, axis = [], 0
    while axis < len(words):
        joined = next((len(j) for j in _JOINED if words[axis : axis + len(j)] == j), 1)
        groups.append((words[axis], tuple(range(axis, axis + joined))))
        axis += joined
    stack = [axes for word, axes in groups if word == "layers"]
    sides = [axes for word, axes in groups if word != "layers"]
    if len(sides) == 3 and words[sides[0][0]] == "experts":
        stack.append(sides.pop(0))
    if len(sides) != 2:
        return None
    return MatrixAxes(sum(stack, ()), *sides)
