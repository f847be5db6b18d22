"""Experts' weights as separate arrays, for decoding on CPUs."""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from llama4_eqx.layers.activation import Activation, gated_product
from llama4_eqx.layers.linear import linear
from llama4_eqx.layers.quantized import Quantized


class UnstackedWeight(eqx.Module):
    """Each expert's matrix, `[out, in]`, as an array of its own, in place of a stack of them.

    On CPUs, one expert of a stack is copied before it is used, which takes several times as long as
    the product with one row.
    """

    experts: tuple[Float[Array, "rows columns"] | Quantized, ...]

    def __len__(self) -> int:
        return len(self.experts)

    def stacked(self) -> Float[Array, "experts rows columns"] | Quantized:
        """The stack, each matrix `[in, out]` again."""
        transposed = map(_transposed, self.experts)
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *transposed)


def unstacked_weight(weight: Float[Array, "experts rows columns"] | Quantized) -> UnstackedWeight:
    """The weights of a stack of experts, one by one."""
    return UnstackedWeight(tuple(_transposed(weight[i]) for i in range(len(weight))))


def _transposed(matrix: Any) -> Any:
    return matrix.transposed() if isinstance(matrix, Quantized) else matrix.T


def is_unstacked(node: Any) -> bool:
    """Whether it stands for a stack of weights."""
    return isinstance(node, UnstackedWeight)


Weights = tuple[UnstackedWeight, UnstackedWeight, UnstackedWeight]


def unstacked_mlp(
    activation: Activation,
    block: int,
    rows: Float[Array, "tokens hidden"],
    weights: Weights,
    sizes: Int[Array, "experts"],
) -> Float[Array, "tokens hidden"]:
    """See `grouped.grouped_mlp`: runs each expert that has rows on `block` of them at a time."""
    matrices = tuple(zip(*(weight.experts for weight in weights), strict=True))
    if len(rows) == 1:
        branches = [partial(_mlp, activation, each) for each in matrices]
        return jnp.where(sizes.sum() > 0, lax.switch(jnp.argmax(sizes), branches, rows), 0)
    x = jnp.pad(rows, ((0, block), (0, 0)))  # the last block may reach past the end

    def run_expert(own: _Matrices, out: Array, start: Array, end: Array) -> Array:
        def run_block(i, out):
            here = start + i * block
            block_x = lax.dynamic_slice_in_dim(x, here, block)
            # What this writes past the expert's end is wrong, and overwritten by the next expert.
            block_out = _mlp(activation, own, block_x)
            return lax.dynamic_update_slice_in_dim(out, block_out, here, axis=0)

        return lax.fori_loop(0, (end - start + block - 1) // block, run_block, out)

    branches = [partial(run_expert, own) for own in matrices]
    ends, busy = jnp.cumsum(sizes), jnp.argsort(sizes == 0)  # stable: experts stay in order

    def visit(i, out):
        expert = busy[i]
        end = ends[expert]
        return lax.switch(expert, branches, out, end - sizes[expert], end)

    out = lax.fori_loop(0, jnp.count_nonzero(sizes), visit, jnp.zeros_like(x))[: len(rows)]
    return jnp.where((jnp.arange(len(rows)) < sizes.sum())[:, None], out, 0)


_Matrices = tuple[Any, Any, Any]


def _mlp(activation: Activation, own: _Matrices, x: Array) -> Array:
    gate, up, down = own
    return linear(gated_product(activation, linear(x, gate), linear(x, up)), down)
