"""Products with weights of few bits, in forms that each platform computes fast."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from llama4_eqx.layers.cpu_products import product, product_in_blocks
from llama4_eqx.layers.platforms import by_platform, may_run_on
from llama4_eqx.layers.quantized import LARGEST, Quantized

# XLA's CPU compiler has a fast product of int8 matrices, but none of a matrix and few rows.
LEAST_ROWS = 4
# Blocks of the inputs, in a product of one row with int8.
_BLOCKS = 16
# Numbers of a block of a weight in groups, whose scales a TPU keeps on the chip.
_BLOCK_SIZE = 2**22


@jax.custom_vjp
def quantized_product(
    rows: Float[Array, "rows in_features"], weight: Quantized
) -> Float[Array, "rows out_features"]:
    """`rows · weightᵀ`, of a weight `[out_features, in_features]`."""

    def by_cast(rows: Array, numbers: Array, scale: Array) -> Array:
        out = product(rows, numbers.astype(rows.dtype))
        return (out.astype(jnp.float32) * scale).astype(rows.dtype)

    def by_int8(rows: Array, numbers: Array, scale: Array) -> Array:
        return (int8_product(rows, numbers, 1) * scale).astype(rows.dtype)

    if not weight.scales_outputs(1):
        one = jax.tree.map(lambda leaf: leaf[None], weight)
        return products_in_groups(rows[None], one, 2)[0].astype(rows.dtype)
    operands = rows, weight.numbers, weight.scale.T.astype(jnp.float32)
    if weight.numbers.dtype != jnp.int8:
        return by_cast(*operands)
    return lax.platform_dependent(*operands, cpu=by_int8, default=by_cast)


def _product_forward(rows: Array, weight: Quantized) -> tuple[Array, Any]:
    return quantized_product(rows, weight), (rows[:0], weight)


def _product_backward(residuals: Any, d_out: Array) -> tuple[Array, None]:
    like, weight = residuals
    if not weight.scales_outputs(1):
        return product(d_out, weight.dequantized().astype(like.dtype), axis=0), None
    scale = weight.scale.T.astype(jnp.float32)
    scaled = (d_out.astype(jnp.float32) * scale).astype(like.dtype)
    return product(scaled, weight.numbers.astype(like.dtype), axis=0), None


quantized_product.defvjp(_product_forward, _product_backward)


def int8_product(
    rows: Float[Array, "rows in_features"], numbers: Int[Array, "..."], axis: int
) -> Float[Array, "rows out_features"]:
    """The product of rows with a matrix of int8, whose inputs are along that axis, as CPUs compute
    it fast: of one row exactly, of several with each row rounded to int8."""
    if len(rows) == 1 and rows.shape[1] % _BLOCKS == 0:
        return product_in_blocks(rows, numbers, _BLOCKS, axis)
    x = rows.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / LARGEST["int8"]
    scale = jnp.where(scale == 0, 1, scale)
    x = jnp.round(x / scale).astype(jnp.int8)
    few = max(0, LEAST_ROWS - len(x))
    out = product(jnp.pad(x, ((0, few), (0, 0))), numbers, jnp.int32, axis)
    return out[: len(x)].astype(jnp.float32) * scale


def products_in_groups(
    rows: Float[Array, "experts rows in_features"], weights: Quantized, inputs: int
) -> Float[Array, "experts rows out_features"]:
    """Products in float32 with matrices whose groups of inputs, along that axis, have scales of
    their own.

    Of a large matrix a TPU would write a scale for each number to HBM, and read it again. So there
    it computes blocks of the outputs, one after another: what a block needs stays on the chip.
    """
    outputs = 3 - inputs
    each_has_scales = weights.scale.shape[outputs] == weights.shape[outputs]
    if weights.size <= _BLOCK_SIZE or not each_has_scales or not may_run_on("tpu"):
        return _products(rows, weights, inputs)
    return by_platform(
        rows,
        weights,
        tpu=partial(_products_in_blocks, inputs=inputs),
        default=partial(_products, inputs=inputs),
    )


def _products(rows: Array, weights: Quantized, inputs: int) -> Array:
    numbers = (((2,), (inputs,)), ((0,), (0,)))
    parts = weights.by_parity()
    products = (
        lax.dot_general(
            rows[..., i :: len(parts)],
            part.dequantized().astype(rows.dtype),
            numbers,
            preferred_element_type=jnp.float32,
        )
        for i, part in enumerate(parts)
    )
    return sum(products, start=jnp.zeros((), jnp.float32))


def _products_in_blocks(
    rows: Array, weights: Quantized, inputs: int, block_size: int = _BLOCK_SIZE
) -> Array:
    outputs = 3 - inputs
    experts, size = len(weights), weights.shape[outputs]
    fewest = -(-size // max(128, block_size // weights.shape[inputs]))
    # A TPU has 128 outputs side by side, so that is what the size of a block is a multiple of.
    block = min(size, -(-size // fewest // 128) * 128)
    blocks = -(-size // block)

    def run(i: Array) -> Array:
        # The last block begins where it ends with the outputs.
        expert, start = i // blocks, jnp.minimum(i % blocks * block, size - block)

        def own_part(leaf: Array) -> Array:
            leaf = lax.dynamic_slice_in_dim(leaf, expert, 1)
            return lax.dynamic_slice_in_dim(leaf, start, block, outputs)

        own_rows = lax.dynamic_slice_in_dim(rows, expert, 1)
        return _products(own_rows, jax.tree.map(own_part, weights), inputs)[0]

    out = lax.map(run, jnp.arange(experts * blocks)).reshape(experts, blocks, -1, block)
    out = jnp.moveaxis(out, 1, 2)
    first, last = out[..., :-1, :], out[..., -1, blocks * block - size :]
    return jnp.concatenate([first.reshape(*last.shape[:2], -1), last], axis=-1)
