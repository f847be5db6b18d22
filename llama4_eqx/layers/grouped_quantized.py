"""The experts' SwiGLU with weights of few bits, as accelerators and as CPUs compute it fast."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from llama4_eqx.layers.activation import Activation, gated_product
from llama4_eqx.layers.blocked import block_size, has_expert, visit_blocks, widen, write_rows
from llama4_eqx.layers.quantized import Quantized
from llama4_eqx.layers.quantized_products import LEAST_ROWS, int8_product, products_in_groups

# Above so many rows, the work in vain of a dense product costs more than reading wide weights.
MOST_DENSE_ROWS = 128
QuantizedWeights = tuple[Quantized, Quantized, Quantized]


def quantized_ragged_mlp(
    activation: Activation, rows: Array, weights: QuantizedWeights, sizes: Array
) -> Array:
    """By ragged products of the converted numbers, with a scale for each output."""
    expert = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(len(rows)), side="right")
    expert = jnp.minimum(expert, len(sizes) - 1)

    def product(x: Array, weight: Quantized) -> Array:
        out = lax.ragged_dot(x, weight.numbers.astype(x.dtype), sizes)
        return (out.astype(jnp.float32) * weight.scale[expert, 0].astype(jnp.float32)).astype(
            x.dtype
        )

    gate, up, down = weights
    x = jnp.where(has_expert(rows, sizes), rows, 0)
    inner = gated_product(activation, product(x, gate), product(x, up))
    return jnp.where(has_expert(rows, sizes), product(inner, down), 0)


def quantized_dense_mlp(
    activation: Activation, rows: Array, weights: QuantizedWeights, sizes: Array
) -> Array:
    """By products of all rows with all experts, for few rows: they read numbers of few bits as
    such, which ragged ones don't on GPUs, and on TPUs not with scales of groups."""

    def product(x: Array, weight: Quantized) -> Array:
        if not weight.scales_outputs(1):
            return products_in_groups(x, weight, 1).astype(x.dtype)
        numbers = weight.numbers.astype(x.dtype)
        out = jnp.einsum("etd,edf->etf", x, numbers, preferred_element_type=jnp.float32)
        return (out * weight.scale.astype(jnp.float32)).astype(x.dtype)

    gate, up, down = weights
    # Rows for each expert: for a product with the same ones, GPUs would transpose the weights.
    x = jnp.broadcast_to(rows, (len(sizes), *rows.shape))
    inner = gated_product(activation, product(x, gate), product(x, up))
    row, ends = jnp.arange(len(rows)), jnp.cumsum(sizes)[:, None]
    of_expert = (ends - sizes[:, None] <= row) & (row < ends)
    return jnp.where(of_expert[..., None], product(inner, down), 0).sum(0)


def quantized_blocked_mlp(
    activation: Activation, rows: Array, weights: QuantizedWeights, sizes: Array
) -> Array:
    """A loop for CPUs; of several rows, activations are rounded to int8 where the weights are."""
    block = quantized_block(len(rows), len(sizes))
    in_int8 = all(
        weight.numbers.dtype == jnp.int8 and weight.scales_outputs(1) for weight in weights
    )

    def product(x: Array, weight: Quantized) -> Array:
        if in_int8:
            return int8_product(x, weight.numbers, 0) * weight.scale.astype(jnp.float32)
        return x @ weight.dequantized().astype(x.dtype)

    x = widen(rows, block)

    def visit(out, block, start, end, expert, own):
        block_x = lax.dynamic_slice_in_dim(x, start, block)
        gate, up, down = own
        inner = gated_product(activation, product(block_x, gate), product(block_x, up))
        return write_rows(out, product(inner, down), start)

    out = visit_blocks(visit, jnp.zeros_like(x), (block,), weights, sizes)[: len(rows)]
    return jnp.where(has_expert(rows, sizes), out, 0).astype(rows.dtype)


def quantized_block(rows: int, experts: int) -> int:
    """Rows in a block, on CPUs: one of a single row, and else no fewer than are fast in int8."""
    return 1 if rows == 1 else max(block_size(rows, experts), LEAST_ROWS)
