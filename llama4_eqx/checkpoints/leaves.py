"""Making a model's leaves of the tensors of a folder, which are read one by one.

A leaf is an array, or a `Quantized` weight: rounded here, or of the numbers that are stored.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Int, Num

from llama4_eqx.checkpoints.compressed import Compressed, Form
from llama4_eqx.checkpoints.safetensors_reading import DTYPES, Header, reader
from llama4_eqx.checkpoints.tensor_names import Tensor
from llama4_eqx.checkpoints.tensor_spellings import Single, Stored, singles, view
from llama4_eqx.layers.quantized import Quantized, pack_pairs
from llama4_eqx.quantization import Quantization

# What reads slices of a tensor of a file, as safetensors' `get_slice` does.
GetSlice = Callable[[Header], Any]
# Like a leaf, of shardings in place of arrays; None to keep them on one device.
Shardings = Any


@dataclass(frozen=True)
class LeafPlan:
    """What a leaf will be, in shapes, and how its tensor, or that of one of its layers, is read."""

    shapes: Any
    read: Callable[[Tensor, Stored, GetSlice, Shardings], Any]

    def put(
        self, leaf: Any, tensor: Tensor, stored: Stored, get_slice: GetSlice, shardings: Shardings
    ) -> Any:
        """The leaf with that tensor; it is None before its first."""
        layer = tensor.stack_index
        if layer is None:
            return self.read(tensor, stored, get_slice, shardings)
        if leaf is None:
            leaf = _like(self.shapes, shardings)
        value = self.read(tensor, stored, get_slice, _of_layer(shardings))
        put = jax.jit(_put, donate_argnums=0, out_shardings=shardings)
        return put(leaf, layer, value)


def plain(shape: tuple[int, ...], dtype: DTypeLike) -> LeafPlan:
    """An array."""

    def read(tensor: Tensor, stored: Stored, get_slice: GetSlice, sharding: Shardings) -> Any:
        value = _read_plain(tensor, stored, get_slice, sharding)
        # A layer is converted where it is put into its stack.
        return value if tensor.stack_index is not None else jnp.asarray(value, dtype)

    return LeafPlan(jax.ShapeDtypeStruct(shape, dtype), read)


def rounded(
    shape: tuple[int, ...], dtype: DTypeLike, inputs: tuple[int, ...], quantization: Quantization
) -> LeafPlan:
    """A weight that is rounded when it is read. `inputs` are the axes its product sums over."""

    def read(tensor: Tensor, stored: Stored, get_slice: GetSlice, shardings: Shardings) -> Any:
        layered = tensor.stack_index is not None
        axes = tuple(axis - 1 for axis in inputs) if layered else inputs
        sharding = None if shardings is None else shardings.numbers
        value = _read_plain(tensor, stored, get_slice, sharding)
        return quantization.of(jnp.asarray(value, dtype), axes, shardings)

    shapes = jax.eval_shape(
        partial(quantization.of, inputs=inputs), jax.ShapeDtypeStruct(shape, dtype)
    )
    return LeafPlan(shapes, read)


def as_stored(
    shape: tuple[int, ...], dtype: DTypeLike, tensors: Sequence[tuple[Tensor, Stored]]
) -> LeafPlan | None:
    """A weight of the numbers and scales of its tensors; None where it can't be kept so, or where
    they differ in how they are quantised."""
    forms = {
        one.form if isinstance(one, Compressed) else None
        for _, stored in tensors
        for one in singles(stored)
    }
    form = forms.pop() if len(forms) == 1 else None
    if form is None:
        return None
    tensor, stored = tensors[0]
    groups = _groups_by_axis(form, tensor)
    if groups is None:
        return None
    packed = 1 - len(tensor.axes) if form.dtype == "int4" and tensor.axes[1][-1] % 2 == 0 else None
    number_dtype = jnp.dtype("int8" if form.dtype == "int4" else form.dtype)
    scale_dtype = DTYPES[stored.dtype]
    scale_axes = (tensor.axes[0], groups, *tensor.axes[2:])
    depth = shape[: len(shape) - len(tensor.shape_in_leaf)]

    def read(tensor: Tensor, stored: Stored, _: GetSlice, shardings: Shardings) -> Any:
        of_numbers, of_scale = (None, None) if shardings is None else jax.tree.leaves(shardings)
        numbers = view(stored, partial(_part, name="numbers"))
        scale = view(stored, partial(_part, name="scales"))
        stand_in = jax.jit(_stand_in, static_argnums=(2, 3), out_shardings=shardings)
        return stand_in(
            _read(numbers, tensor.axes, tensor.offset, of_numbers, number_dtype),
            _read(scale, scale_axes, tensor.offset, of_scale, scale_dtype),
            dtype,
            packed,
        )

    shapes = jax.eval_shape(
        partial(_stand_in, dtype=dtype, packed=packed),
        jax.ShapeDtypeStruct(shape, number_dtype),
        jax.ShapeDtypeStruct((*depth, *_sizes(scale_axes)), scale_dtype),
    )
    return LeafPlan(shapes, read)


def _stand_in(
    numbers: Num[Array, "..."], scale: Num[Array, "..."], dtype: DTypeLike, packed: int | None
) -> Quantized:
    numbers = numbers if packed is None else pack_pairs(numbers, packed)
    return Quantized(numbers, scale, dtype, packed)


def _part(one: Single, name: str) -> Any:
    return getattr(one, name)


def _groups_by_axis(form: Form, tensor: Tensor) -> tuple[int, ...] | None:
    """How many groups of inputs there are along each of the leaf's axes that hold them; None if
    they don't follow those axes."""
    found, rest = [], form.groups
    for size in tensor.axes[1]:
        here = size if rest % size == 0 else rest
        if size % here:
            return None
        found.append(here)
        rest //= here
    return tuple(found)


def plain_view(stored: Stored, get_slice: GetSlice) -> Any:
    """What reads slices of a tensor, dequantised if it has to be."""

    def slices(one: Single) -> Any:
        return get_slice(one) if isinstance(one, Header) else one

    return view(stored, slices)


def _read_plain(
    tensor: Tensor, stored: Stored, get_slice: GetSlice, sharding: NamedSharding | None
) -> Any:
    whole = plain_view(stored, get_slice)
    return _read(whole, tensor.axes, tensor.offset, sharding, DTYPES[stored.dtype])


def _read(
    view: Any,
    axes: Sequence[tuple[int, ...]],
    offset: int,
    sharding: NamedSharding | None,
    dtype: DTypeLike,
) -> Any:
    """The leaf, or its layer, sharded; on the host without a sharding."""
    read, shape = reader(view, axes, offset), _sizes(axes)
    if sharding is None:
        return read((slice(None),) * len(shape))
    return jax.make_array_from_callback(shape, sharding, read, dtype=dtype)


def _sizes(axes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(size for joined in axes for size in joined)


def _of_layer(shardings: Shardings) -> Shardings:
    def without_first(sharding: NamedSharding) -> NamedSharding:
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))

    return jax.tree.map(without_first, shardings)


def _like(shapes: Any, shardings: Shardings) -> Any:
    def zeros(leaf: Any, sharding: NamedSharding | None = None) -> Array:
        return jnp.zeros(leaf.shape, leaf.dtype, device=sharding)

    return jax.tree.map(zeros, shapes, *([] if shardings is None else [shardings]))


def _put(stack: Any, layer: Int[Array, ""], value: Any) -> Any:
    # `stack.at[layer].set(…)` would copy a bfloat16 stack on CPUs.
    return jax.tree.map(
        lambda old, new: lax.dynamic_update_index_in_dim(old, new.astype(old.dtype), layer, axis=0),
        stack,
        value,
    )
