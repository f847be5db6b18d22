"""A weight of few bits, as a leaf in place of the weight itself."""

import math
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num, UInt8

T = TypeVar("T")
# The number of each dtype that stands for the largest weight of a scale.
LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0, "int4": 7.0}


class Quantized(eqx.Module):
    """`scale · numbers`, in place of a weight: numbers in int8 or float8, and a scale for each
    output of the weight's product; or in int4, two in a byte, and a scale for each group of inputs.

    Products convert the numbers to the activations' dtype, and scale the output where its inputs
    share a scale, so that an accelerator reads one byte a number. With several rows, CPUs are fast
    at nothing but int8 times int8: there, if the numbers are int8, each row of activations is
    rounded to int8, too, with a scale of its own. A row alone stays as it is.

    The axes are the weight's; a scale's have size 1 where outputs share it, or the number of
    groups. If two numbers share a byte, the first in its lower half, they are neighbours along the
    axis `packed`, counted from the end. `dtype` is that of the weight that it stands for. Gradients
    go to activations, never to a weight of few bits.
    """

    numbers: Num[Array, "..."]
    scale: Float[Array, "..."]
    dtype: Any = eqx.field(static=True)
    packed: int | None = eqx.field(static=True, default=None)

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape."""
        shape = list(self.numbers.shape)
        if self.packed is not None:
            shape[self.packed] *= 2
        return tuple(shape)

    @property
    def ndim(self) -> int:
        """The number of the weight's axes."""
        return self.numbers.ndim

    @property
    def size(self) -> int:
        """How many numbers the weight has."""
        return math.prod(self.shape)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> "Quantized":
        """Along leading axes, which no product sums over: an expert of many."""
        return Quantized(self.numbers[index], self.scale[index], self.dtype, self.packed)

    def reshape(self, outputs: int, inputs: int) -> "Quantized":
        """As a matrix of outputs and inputs."""
        inputs //= 1 if self.packed is None else 2
        numbers = self.numbers.reshape(outputs, inputs)
        return Quantized(numbers, self.scale.reshape(outputs, -1), self.dtype, self.packed)

    def transposed(self) -> "Quantized":
        """A matrix with its axes exchanged."""
        packed = None if self.packed is None else -3 - self.packed
        return Quantized(self.numbers.T, self.scale.T, self.dtype, packed)

    def scales_outputs(self, inputs: int) -> bool:
        """Whether a product over the axis `inputs` can convert the numbers and scale its output."""
        return self.packed is None and self.scale.shape[inputs] == 1

    def plain_numbers(self) -> Num[Array, "..."]:
        """The numbers, one in each place."""
        return self.numbers if self.packed is None else _unpacked(self.numbers, self.packed)

    def dequantized(self) -> Float[Array, "..."]:
        """The weight that it stands for."""
        numbers, scale = self.plain_numbers(), self.scale
        for axis, (size, groups) in enumerate(zip(self.shape, scale.shape, strict=True)):
            if 1 < groups < size:  # not jnp.repeat, a gather, which no product reads through
                shape = list(scale.shape)
                shape.insert(axis + 1, size // groups)
                scale = jnp.broadcast_to(jnp.expand_dims(scale, axis + 1), shape)
                scale = scale.reshape(*shape[:axis], size, *shape[axis + 2 :])
        return (numbers.astype(scale.dtype) * scale).astype(self.dtype)

    def by_parity(self) -> list["Quantized"]:
        """The parts whose products with every second input, from the first and from the second on,
        are summed to the weight's: TPUs read numbers that share a byte at half a byte each so."""
        if self.packed is None:
            return [self]
        if self.numbers.shape[self.packed] % self.scale.shape[self.packed]:  # a pair in two groups
            return [self]
        both = self.numbers.astype(jnp.int8)
        halves = (both << 4) >> 4, both >> 4
        return [Quantized(half, self.scale, self.dtype) for half in halves]


def quantized(
    weight: Float[Array, "..."],
    inputs: tuple[int, ...],
    dtype: DTypeLike = jnp.int8,
    group_size: int | None = None,
) -> Quantized:
    """The weight rounded to the nearest numbers of the dtype, with the largest of each output's
    weights as the largest number. `inputs` are the axes that its product sums over; with a
    `group_size`, each group of so many along the last of them has its own scale.

    Raises a `ValueError` if groups, or pairs of int4, don't divide that axis.
    """
    last = inputs[-1] % weight.ndim
    size, in_pairs = weight.shape[last], jnp.dtype(dtype) == jnp.int4
    if size % (group_size or 1) or (in_pairs and size % 2):
        raise ValueError(
            f"A weight of shape {weight.shape} has {size} inputs, which {group_size or 2} doesn't "
            "divide: choose another group_size, or exclude it by the patterns."
        )
    top = LARGEST[jnp.dtype(dtype).name]
    wide = weight.astype(jnp.float32)
    if group_size is None:
        largest = jnp.max(jnp.abs(wide), axis=inputs, keepdims=True)
    else:
        groups = (*wide.shape[:last], -1, group_size, *wide.shape[last + 1 :])
        largest = jnp.max(jnp.abs(wide.reshape(groups)), axis=last + 1)
    scale = jnp.where(largest == 0, 1, largest / top)
    repeats = 1 if group_size is None else group_size
    numbers = wide / jnp.repeat(scale, repeats, axis=last)
    numbers = jnp.round(numbers) if jnp.issubdtype(dtype, jnp.integer) else numbers
    if in_pairs:
        packed = last - weight.ndim
        return Quantized(pack_pairs(numbers.astype(jnp.int8), packed), scale, weight.dtype, packed)
    return Quantized(numbers.astype(dtype), scale, weight.dtype)


def pack_pairs(numbers: Int[Array, "..."], axis: int) -> UInt8[Array, "..."]:
    """Numbers of four bits, two neighbours of the axis in a byte, the first in its lower half."""
    axis %= numbers.ndim
    pairs = numbers.reshape(*numbers.shape[:axis], -1, 2, *numbers.shape[axis + 1 :])
    low, high = (lax.index_in_dim(pairs, i, axis + 1, keepdims=False) & 15 for i in (0, 1))
    return (low | (high << 4)).astype(jnp.uint8)


def _unpacked(pairs: UInt8[Array, "..."], axis: int) -> Int[Array, "..."]:
    axis %= pairs.ndim
    both = pairs.astype(jnp.int8)  # shifted there and back, a half has its sign
    numbers = jnp.stack([(both << 4) >> 4, both >> 4], axis=axis + 1)
    return numbers.reshape(*pairs.shape[:axis], -1, *pairs.shape[axis + 1 :])


def is_quantized(node: Any) -> bool:
    """Whether it stands for a weight."""
    return isinstance(node, Quantized)


def plain_weight(weight: Float[Array, "..."] | Quantized) -> Float[Array, "..."]:
    """The weight, dequantised if it has to be."""
    return weight.dequantized() if isinstance(weight, Quantized) else weight


def dequantized(tree: T) -> T:
    """The tree with a plain weight for each `Quantized`."""
    return jax.tree.map(
        lambda leaf: leaf.dequantized() if isinstance(leaf, Quantized) else leaf,
        tree,
        is_leaf=is_quantized,
    )


def weight_shapes(tree: T) -> T:
    """The tree with the shape of the weight in place of each `Quantized`."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_quantized(leaf) else leaf,
        tree,
        is_leaf=is_quantized,
    )
