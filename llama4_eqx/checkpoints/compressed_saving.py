"""Writing quantised weights in the layout of `compressed-tensors`: 8-bit numbers of each linear
module beside a scale for each of its outputs, experts one by one."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
    def of(array: Any, shape: tuple[int, ...]) -> Callable[[], np.ndarray]:
        def make() -> np.ndarray:
            one = np.asarray(array[index])
            return np.ascontiguousarray(one.T if swap else one.reshape(shape))

        return make

    if not isinstance(leaf, Quantized):
        yield MadeTensor(name, shape, jnp.dtype(leaf.dtype), of(leaf, shape))
        return
    scale, column = f"{name.removesuffix('.weight')}.weight_scale", (shape[0], 1)
    yield MadeTensor(name, shape, jnp.dtype(leaf.numbers.dtype), of(leaf.numbers, shape))
    yield MadeTensor(scale, column, jnp.dtype(leaf.scale.dtype), of(leaf.scale, column))


def quantization_config(tensors: list[Tensor], leaves: list[Any]) -> dict[str, Any]:
    """The config's account of the weights, for `transformers`.

    Raises a `ValueError` for a model whose weights have both int8 and float8 numbers.
    """
    dtypes = {jnp.dtype(leaf.numbers.dtype) for leaf in leaves if isinstance(leaf, Quantized)}
    if len(dtypes) > 1:
        raise ValueError(
            "The model has weights in int8 and in float8: quantise all of them to one of the two."
        )
    kind = "int" if jnp.issubdtype(dtypes.pop(), jnp.integer) else "float"
    plain = [
        name.removesuffix(".weight")
        for tensor in tensors
        if not is_quantized(leaves[tensor.leaf])
        for name in _module_names(tensor)
    ]
    weights = {
        "num_bits": 8,
        "type": kind,
        "strategy": "channel",
        "symmetric": True,
        "dynamic": False,
    }
    form = f"{kind}-quantized"  # without it in the group, the library takes int8 to be packed
    group = {"targets": ["Linear"], "weights": weights, "format": form}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": plain,
    }


def _module_names(tensor: Tensor) -> list[str]:
    """The names of the weights of linear modules that a tensor is, or holds."""
    if _EXPERTS in tensor.name:
        return [one.name for one in made_tensors(tensor, jax.ShapeDtypeStruct((), jnp.float32))]
    return [tensor.name] if tensor.name.endswith(".weight") and len(tensor.shape) == 2 else []
