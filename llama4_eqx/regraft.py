"""The config is the truth about a model: comparing the two, and giving a model another config."""

from collections.abc import Iterable, Sequence
from typing import Any
from zlib import crc32

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from llama4_eqx.axes import axis_words, leaf_name
from llama4_eqx.config import Llama4Config
from llama4_eqx.decoder_block import DecoderBlock
from llama4_eqx.decoder_layer import DecoderLayer
from llama4_eqx.layers.foreign import foreign_parts, part_at
from llama4_eqx.layers.initializers import normal
from llama4_eqx.model import Llama4

# Axes that may grow: their new entries are drawn at random.
_GROWING = ("experts", "vocab")


def difference(model: Llama4) -> str | None:
    """The first thing in which a model isn't what its config describes, as a phrase; None if there
    is none. How layers are stacked, dtypes and devices aren't compared, nor are layers' parts of
    classes that aren't this package's."""
    ours, theirs = _shapes(model), _described(model.config)
    pairs: list[tuple[str, Any, Any]] = [("", _without_layers(ours), _without_layers(theirs))]
    our_layers, their_layers = _layers(ours), _layers(theirs)
    if len(our_layers) != len(their_layers):
        return f"it has {len(our_layers)} layers, where the config says {len(their_layers)}"
    for i, (our, their) in enumerate(zip(our_layers, their_layers, strict=True)):
        foreign = foreign_parts(our)
        if "" not in foreign:
            pairs.append((f"layer {i}'s ", _without(our, foreign), _without(their, foreign)))
    for prefix, our, their in pairs:
        found = _difference(our, their)
        if found is not None:
            return prefix + found
    return None


def with_config(
    model: Llama4,
    config: Llama4Config,
    *,
    layers: Sequence[int] | None = None,
    key: PRNGKeyArray | None = None,
) -> Llama4:
    """The model's parameters in a model of another config.

    Settings without parameters (chunk size, RoPE, NoPE pattern, …) take effect. `layers` are the
    numbers of the layers to keep, in their new order; the first ones by default. More experts or a
    wider vocabulary get random entries after the old ones, for which a `key` is needed.

    Raises a `ValueError` that names the parameter that doesn't fit.
    """
    target = _described(config)
    new_layers = _layers(target)
    numbers = range(len(new_layers)) if layers is None else layers
    if len(numbers) != len(new_layers):
        raise ValueError(
            f"The config has {len(new_layers)} layers, but layers= names {len(numbers)}."
        )
    old_layers = model.decoder.layers()
    missing = [n for n in numbers if not 0 <= n < len(old_layers)]
    if missing:
        raise ValueError(
            f"The model has no layer {missing[0]}, only 0 to {len(old_layers) - 1}: name with "
            "layers= which of them each layer of the new config should be."
        )
    keys = [None] * (len(numbers) + 1) if key is None else jax.random.split(key, len(numbers) + 1)
    std = config.text_config.initializer_range
    grafted = [
        _grafted(old_layers[number], new, f"layer {number}'s ", std, layer_key)
        for number, new, layer_key in zip(numbers, new_layers, keys[1:], strict=True)
    ]
    rest = _grafted(_without_layers(model), _without_layers(target), "", std, keys[0])
    blocks, first = [], 0
    for block in target.decoder.blocks:
        blocks.append(_block(block, grafted[first : first + block.depth]))
        first += block.depth
    new = eqx.tree_at(lambda m: m.decoder.blocks, rest, tuple(blocks))
    return eqx.tree_at(lambda m: m.parallel, new, model.parallel)


def _block(like: DecoderBlock, layers: list[DecoderLayer]) -> DecoderBlock:
    if like.repeats is None:
        return DecoderBlock(tuple(layers))
    cycle = len(like.layers)
    stacks = (jax.tree.map(lambda *x: jnp.stack(x), *layers[i::cycle]) for i in range(cycle))
    return DecoderBlock(tuple(stacks), like.repeats)


def _described(config: Llama4Config) -> Llama4:
    return eqx.filter_eval_shape(Llama4, config, key=jax.random.key(0))


def _shapes(model: Llama4) -> Llama4:
    return eqx.filter_eval_shape(lambda: model)


def _layers(shapes: Llama4) -> list[DecoderLayer]:
    return eqx.filter_eval_shape(lambda model: model.decoder.layers(), shapes)


def _without_layers(model: Llama4) -> Llama4:
    return eqx.tree_at(lambda m: m.decoder.blocks, model, ())


def _without(layer: DecoderLayer, parts: Iterable[str]) -> DecoderLayer:
    for path in parts:
        layer = eqx.tree_at(part_at(path), layer, None)
    return layer


def _by_name(tree: Any) -> dict[str, Any]:
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _difference(ours: Any, theirs: Any) -> str | None:
    our_leaves, their_leaves = _by_name(ours), _by_name(theirs)
    for name in dict.fromkeys((*their_leaves, *our_leaves)):
        if name not in their_leaves:
            return f"{name} isn't a parameter of the config's model"
        if name not in our_leaves:
            return f"{name} is missing"
        our, their = our_leaves[name].shape, their_leaves[name].shape
        if our != their:
            return f"{name} has the shape {our}, where the config says {their}"
    return _other_module(ours, theirs, "")


def _other_module(ours: Any, theirs: Any, path: str) -> str | None:
    """The first module of another kind or with other settings."""
    if not isinstance(theirs, eqx.Module):
        same = type(ours) is type(theirs) and (
            isinstance(ours, jax.ShapeDtypeStruct) or bool(ours == theirs)
        )
        return None if same else f"{path} is {ours!r}, where the config says {theirs!r}"
    if type(ours) is not type(theirs):
        name = path or "class"
        return f"{name} is {type(ours).__name__}, where the config says {type(theirs).__name__}"
    for field, their in vars(theirs).items():
        if field not in ("parallel", "config"):
            inner = f"{path}.{field}".removeprefix(".")
            found = _other_module(getattr(ours, field), their, inner)
            if found is not None:
                return found
    return None


def _grafted(old: Any, new: Any, prefix: str, std: float, key: PRNGKeyArray | None) -> Any:
    """The tree `new` of shapes, with the arrays of `old`."""
    olds, words = _by_name(old), axis_words(new)
    names = set(_by_name(new))
    left_over = next((name for name in olds if name not in names), None)
    if left_over is not None:
        raise ValueError(f"The new config has no place for {prefix}{left_over}.")

    def graft(path: Any, like: jax.ShapeDtypeStruct) -> Array:
        name = leaf_name(path)
        if name not in olds:
            raise ValueError(f"The new config wants {prefix}{name}, which the model doesn't have.")
        leaf = olds[name]
        axes = list(zip(leaf.shape, like.shape, words[name], strict=False))
        grows = [old < new and word in _GROWING for old, new, word in axes]
        fits = all(old == new or grow for (old, new, _), grow in zip(axes, grows, strict=True))
        if leaf.ndim != len(like.shape) or not fits:
            raise ValueError(
                f"{prefix}{name} has the shape {leaf.shape}, but the new config wants {like.shape}."
            )
        if not any(grows):
            return leaf
        if key is None:
            raise ValueError(
                f"{prefix}{name} grows from {leaf.shape} to {like.shape}: pass key= to draw what "
                "is new."
            )
        leaf_key = jax.random.fold_in(key, crc32(name.encode()))
        fresh = normal(std)(leaf_key, like.shape, leaf.dtype)
        return fresh.at[tuple(slice(size) for size in leaf.shape)].set(leaf)

    return jax.tree_util.tree_map_with_path(graft, new)
