"""Writing quantised weights in the layout of `compressed-tensors`: the numbers of each linear
module beside the scales of its outputs, experts one by one."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from llama4_eqx.checkpoints.compressed import packed_words
from llama4_eqx.checkpoints.tensor_names import Tensor
from llama4_eqx.layers.quantized import Quantized, is_quantized

_EXPERTS = ".experts."


@dataclass(frozen=True)
class MadeTensor:
    """A tensor of the folder that isn't (part of) a leaf as it is."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]


def made_tensors(tensor: Tensor, leaf: Any) -> list[MadeTensor]:
    """What takes the place of a tensor in a folder of quantised weights: numbers and scales, and a
    matrix for each expert; nothing if the tensor stays as it is."""
    layer = () if tensor.stack_index is None else (tensor.stack_index,)
    if _EXPERTS in tensor.name:
        prefix, _, kind = tensor.name.rpartition(".")
        if tensor.half is not None:
            kind = ("gate_proj", "up_proj")[tensor.half]
        found = []
        for expert in range(tensor.shape_in_leaf[0]):
            name = f"{prefix}.{expert}.{kind}.weight"
            found += _parts(name, leaf, (*layer, expert), tensor.shape_in_leaf[:0:-1], swap=True)
        return found
    if is_quantized(leaf):
        return list(_parts(tensor.name, leaf, layer, tensor.shape, swap=False))
    return []


def _parts(
    name: str, leaf: Any, index: tuple[int, ...], shape: tuple[int, ...], *, swap: bool
) -> Iterator[MadeTensor]:
    def matrix() -> Any:
        one = leaf[index] if index else leaf
        if isinstance(one, Quantized):
            return one.transposed() if swap else one.reshape(*shape)
        return one.T if swap else one.reshape(shape)

    if not isinstance(leaf, Quantized):
        yield _made(name, matrix, shape, leaf.dtype)
        return
    module, groups = name.removesuffix(".weight"), _groups(leaf, index, shape, swap)
    scale = (shape[0], groups)
    yield _made(f"{module}.weight_scale", lambda: matrix().scale, scale, leaf.scale.dtype)
    if leaf.packed is None:
        yield _made(name, lambda: matrix().numbers, shape, leaf.numbers.dtype)
        return
    words = (shape[0], -(-shape[1] // 8))
    yield _made(
        f"{module}.weight_packed",
        lambda: packed_words(np.asarray(matrix().plain_numbers())),
        words,
        np.int32,
    )
    yield _made(f"{module}.weight_shape", lambda: np.array(shape), (2,), np.int64)


def _made(
    name: str, make: Callable[[], Any], shape: tuple[int, ...], dtype: DTypeLike
) -> MadeTensor:
    dtype = jnp.dtype(dtype)
    return MadeTensor(name, shape, dtype, lambda: np.ascontiguousarray(make(), dtype))


def _groups(leaf: Quantized, index: tuple[int, ...], shape: tuple[int, ...], swap: bool) -> int:
    """How many scales each output has."""
    return leaf.scale.shape[-2] if swap else math.prod(leaf.scale.shape[len(index) :]) // shape[0]


def quantization_config(tensors: list[Tensor], leaves: list[Any]) -> dict[str, Any]:
    """The config's account of the weights, for `transformers`.

    Raises a `ValueError` for a model whose weights are quantised in several ways.
    """
    found = (_way(tensor, leaves[tensor.leaf]) for tensor in tensors)
    ways = {way for way in found if way is not None}
    if len(ways) > 1:
        raise ValueError(
            "The model's weights are quantised in several ways, and a folder has one: quantise all "
            "of them to one dtype, with one group_size."
        )
    (dtype, group_size) = ways.pop()
    kind = "float" if dtype.startswith("float") else "int"
    form = "pack-quantized" if dtype == "int4" else f"{kind}-quantized"
    plain = [
        name.removesuffix(".weight")
        for tensor in tensors
        if not is_quantized(leaves[tensor.leaf])
        for name in _module_names(tensor)
    ]
    weights = {
        "num_bits": 4 if dtype == "int4" else 8,
        "type": kind,
        "strategy": "channel" if group_size is None else "group",
        "group_size": group_size,
        "symmetric": True,
        "dynamic": False,
    }
    # Without a format in the group, the library takes int8 to be packed.
    group = {"targets": ["Linear"], "weights": weights, "format": form}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": plain,
    }


def _way(tensor: Tensor, leaf: Any) -> tuple[str, int | None] | None:
    """The dtype of a quantised weight's numbers, and how many inputs share a scale, None if all."""
    if not isinstance(leaf, Quantized):
        return None
    layer = () if tensor.stack_index is None else (tensor.stack_index,)
    of_experts = _EXPERTS in tensor.name
    groups = _groups(leaf, layer, tensor.shape, of_experts)
    inputs = tensor.shape_in_leaf[1] if of_experts else tensor.shape[1]
    dtype = "int4" if leaf.packed is not None else jnp.dtype(leaf.numbers.dtype).name
    return dtype, None if groups == 1 else inputs // groups


def _module_names(tensor: Tensor) -> list[str]:
    """The names of the weights of linear modules that a tensor is, or holds."""
    if _EXPERTS in tensor.name:
        return [one.name for one in made_tensors(tensor, jax.ShapeDtypeStruct((), jnp.float32))]
    return [tensor.name] if tensor.name.endswith(".weight") and len(tensor.shape) == 2 else []
