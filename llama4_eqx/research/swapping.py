"""Taking a model's layers apart: one layer, or another module in place of a part of some."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import numpy as np
from jaxtyping import Int

from llama4_eqx.argument_checks import check_type, whole_number
from llama4_eqx.decoder_block import DecoderBlock, stacked
from llama4_eqx.decoder_layer import DecoderLayer
from llama4_eqx.input_checks import Number
from llama4_eqx.layers.foreign import part_at
from llama4_eqx.model import Llama4

# Of one layer or several.
LayerNumbers = Number | Sequence[Number] | Int[np.ndarray, "n"]


def layer(model: Llama4, number: Number) -> DecoderLayer:
    """One layer of the decoder, with arrays of its own."""
    (number,) = _as_numbers(number, model)
    every = [(block, i) for block in model.decoder.blocks for i in range(block.depth)]
    block, i = every[number]
    return block.layer(i)


def separated(model: Llama4, layers: LayerNumbers) -> Llama4:
    """The same model with these layers as blocks of their own, for what concerns them alone:

        model = separated(model, [20])
        lora = LoRA(model, *in_layers(model, [20], "*_proj"), rank=8, key=key)

    The layers between them stay stacked and scanned, if they were.
    """
    numbers, every = _as_numbers(layers, model), model.decoder.layers()
    was_stacked = any(block.repeats is not None for block in model.decoder.blocks)
    blocks: list[DecoderBlock] = []
    start = 0
    for number in [*sorted(set(numbers)), len(every)]:
        between = every[start:number]
        if between:
            blocks += stacked(between) if was_stacked else [DecoderBlock(tuple(between))]
        blocks += [DecoderBlock((one,)) for one in every[number : number + 1]]
        start = number + 1
    return eqx.tree_at(lambda model: model.decoder.blocks, model, tuple(blocks))


def in_layers(model: Llama4, layers: LayerNumbers, *patterns: str) -> tuple[str, ...]:
    """Patterns of `select` that match in these layers alone, from patterns within a layer:
    `in_layers(model, [20], "self_attn.*")`.

    Raises a `ValueError` for a layer that shares its arrays with others: see `separated`.
    """
    paths = {}
    for b, block in enumerate(model.decoder.blocks):
        for i in range(block.depth):
            alone = block.repeats in (None, 1)
            paths[len(paths)] = f"decoder.blocks.{b}.layers.{i}" if alone else None
    numbers = _as_numbers(layers, model)
    shared = [number for number in numbers if paths[number] is None]
    if shared:
        raise ValueError(
            f"Layer {shared[0]} is stacked with others: take separated(model, {numbers})."
        )
    return tuple(f"{paths[number]}.{pattern}" for number in numbers for pattern in patterns)


def replaced(
    model: Llama4,
    part: str | None,
    make: Callable[[Any], Any],
    layers: LayerNumbers | None = None,
) -> Llama4:
    """The model with `make(old)` in place of a part of some layers, or of all.

        replaced(model, "self_attn", lambda old: LinearAttention(…), layers=[20])

    `part` is a field of a `DecoderLayer`, such as `"self_attn"`, `"feed_forward"` or a norm, or a
    path below it (`"feed_forward.shared_expert"`), settings too (`"feed_forward.score"`, or
    `"feed_forward.experts.activation"` with `lambda old: jax.nn.gelu`); None stands for the layer
    itself. If the layers were stacked, those of one kind are stacked again, so that an odd one
    costs the compile time of a few layers, not of all.

    `save_checkpoint` stores the parameters of classes of your own under their own paths, and
    `load_checkpoint(folder, make=lambda model: replaced(model, …))` reads them.
    """
    check_type("model", model, Llama4)
    if not callable(make):
        raise TypeError(f"make must be a function of the old part, but is a {type(make).__name__}.")
    if part is not None:
        check_type("part", part, str, "None stands for the whole layer")
    every = model.decoder.layers()
    numbers = range(len(every)) if layers is None else _as_numbers(layers, model)
    for number in numbers:
        every[number] = _with_part(every[number], part, make, number)
    was_stacked = any(block.repeats is not None for block in model.decoder.blocks)
    new = stacked(every) if was_stacked else (DecoderBlock(tuple(every)),)
    return eqx.tree_at(lambda model: model.decoder.blocks, model, new)


def _as_numbers(layers: Any, model: Llama4) -> list[int]:
    check_type("model", model, Llama4)
    depth = sum(block.depth for block in model.decoder.blocks)
    given = [layers] if np.ndim(layers) == 0 else layers
    numbers = [whole_number("A layer's number", number, least=None) for number in given]
    beyond = [number for number in numbers if not 0 <= number < depth]
    if beyond:
        raise ValueError(f"The model has no layer {beyond[0]}, only 0 to {depth - 1}.")
    return numbers


def _with_part(
    old: DecoderLayer, part: str | None, make: Callable[[Any], Any], number: int
) -> DecoderLayer:
    if part is None:
        return _as_module(make(old), "the whole", number)
    find = part_at(part)
    try:
        old_part = find(old)
    except AttributeError as error:
        raise ValueError(
            f"Layer {number} has no part {part!r}: a DecoderLayer has {', '.join(vars(old))}."
        ) from error
    new = make(old_part)
    *path, name = part.split(".")
    owner = part_at(".".join(path))(old) if path else old
    static = {field.name: bool(field.metadata.get("static")) for field in dataclasses.fields(owner)}
    if static[name]:
        return eqx.tree_at(part_at(".".join(path)), old, _with_setting(owner, name, new))
    if not path:
        new = _as_module(new, part, number)
    return eqx.tree_at(find, old, new, is_leaf=lambda node: node is None)


def _as_module(new: Any, part: str, number: int) -> Any:
    if not isinstance(new, eqx.Module):
        raise TypeError(
            f"make must return an eqx.Module in place of {part} of layer {number}, but returned a "
            f"{type(new).__name__}."
        )
    return new


def _with_setting(module: Any, name: str, value: Any) -> Any:
    """The module with another value of a static field, which isn't part of the tree."""
    new = object.__new__(type(module))
    for field, own in vars(module).items():
        object.__setattr__(new, field, value if field == name else own)
    return new
