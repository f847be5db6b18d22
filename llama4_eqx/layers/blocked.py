"""The experts' SwiGLU on CPUs: a loop over experts, and for each over blocks of its rows."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from llama4_eqx.layers.activation import Activation, gated_product
from llama4_eqx.layers.quantized import Quantized
from llama4_eqx.layers.remat import save_residual


def has_expert(rows: Array, sizes: Array) -> Array:
    """Which rows belong to an expert, as a column."""
    return (jnp.arange(rows.shape[0]) < sizes.sum())[:, None]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def blocked_mlp(
    activation: Activation, rows: Array, gate: Array, up: Array, down: Array, sizes: Array
) -> Array:
    """See `grouped.grouped_mlp`."""
    return blocked_forward(activation, rows, (gate, up, down), sizes)


def blocked_forward(
    activation: Activation, rows: Array, weights: tuple[Any, Any, Any], sizes: Array
) -> Array:
    """`blocked_mlp`, without a derivative; each of the weights may be a `ScannedWeight`."""
    return _forward(activation, rows, *weights, sizes, save_inner=False)[0]


def _forward(activation, rows, gate, up, down, sizes, save_inner=True):
    blocks = block_sizes(rows.shape[0], sizes.shape[0])
    x = widen(rows, blocks[-1])
    inner = ()
    if save_inner:
        inner = (jnp.zeros_like(x, shape=(x.shape[0], gate.shape[-1])),) * 2

    def visit(state, block, start, end, expert, weights):
        out, inner = state
        block_x = lax.dynamic_slice_in_dim(x, start, block)
        block_inner = block_x @ weights[0], block_x @ weights[1]
        # What this writes past the expert's `end` is wrong, and overwritten by the next expert.
        out = write_rows(out, gated_product(activation, *block_inner) @ weights[2], start)
        inner = tuple(map(lambda all, one: write_rows(all, one, start), inner, block_inner))
        return out, inner

    weights = gate, up, down
    out, inner = visit_blocks(visit, (jnp.zeros_like(x), inner), blocks, weights, sizes)
    inner = save_residual(inner)
    out = jnp.where(has_expert(rows, sizes), out[: rows.shape[0]], 0)
    return out.astype(rows.dtype), (x, inner, weights, sizes)


def _backward(activation, residuals, d_out):
    x, inner, weights, sizes = residuals
    blocks = block_sizes(d_out.shape[0], sizes.shape[0])
    wide_d_out = widen(d_out, blocks[-1])

    def visit(state, block, start, end, expert, block_weights):
        d_x, d_gate, d_up, d_down = state
        gate, up, down = block_weights
        of_expert = (start + jnp.arange(block) < end)[:, None]
        block_d_out = jnp.where(of_expert, lax.dynamic_slice_in_dim(wide_d_out, start, block), 0)
        block_inner = (lax.dynamic_slice_in_dim(one, start, block) for one in inner)
        act, gated_vjp = jax.vjp(partial(gated_product, activation), *block_inner)
        d_gated, d_upped = gated_vjp(block_d_out @ down.T)
        block_x = lax.dynamic_slice_in_dim(x, start, block)
        return (
            write_rows(d_x, d_gated @ gate.T + d_upped @ up.T, start),
            d_gate.at[expert].add(block_x.T @ d_gated),
            d_up.at[expert].add(block_x.T @ d_upped),
            d_down.at[expert].add(act.T @ block_d_out),
        )

    zeros = tuple(jnp.zeros_like(like, dtype=x.dtype) for like in (x, *weights))
    d_x, *d_weights = visit_blocks(visit, zeros, blocks, weights, sizes)
    d_rows = d_x[: d_out.shape[0]].astype(d_out.dtype)
    return d_rows, *(d.astype(w.dtype) for d, w in zip(d_weights, weights, strict=True)), None


blocked_mlp.defvjp(_forward, _backward)


def write_rows(buffer: Array, rows: Array, start: Int[Array, ""]) -> Array:
    """The buffer with the rows from `start` on."""
    return lax.dynamic_update_slice_in_dim(buffer, rows, start, axis=0)


def block_size(tokens: int, experts: int) -> int:
    """Rows in a block, if all have one size: the fastest on two cores. Some rows are computed in
    vain, but a block of 64 takes little longer than one of 16."""
    share = max(1, -(-tokens // experts))
    return min(64, 1 << (3 * share // 2 - 1).bit_length())  # a power of two from 1.5 times on


def block_sizes(tokens: int, experts: int) -> tuple[int, ...]:
    """Rows in blocks of several sizes, in ascending order, so that an expert with many rows gets
    large blocks, and a last one that fits.

    Products of few rows are slow, and each block costs, backward, an addition to the gradient of
    all the expert's weights.
    """
    size = block_size(tokens, experts)
    return (size,) if size < 64 else (32, 64, 128, 256)


def widen(rows: Array, spare: int) -> Array:
    """The rows in at least float32, since XLA's CPU compiler converts all of a bfloat16 buffer
    whenever a slice of it is read or written; and `spare` more, as the last block may reach past
    the end."""
    return jnp.pad(rows.astype(_wide(rows)), ((0, spare), (0, 0)))


def _wide(x: Array) -> Any:
    return jnp.float32 if x.dtype.itemsize < 4 else x.dtype


def visit_blocks(
    visit: Callable[..., Any],
    state: Any,
    blocks: tuple[int, ...],
    weights: tuple[Any, Any, Any],
    sizes: Array,
) -> Any:
    """Folds `visit(state, block, start, end, expert, weights)` over blocks of rows, in order, each
    of one of the sizes, which ascend.

    A block begins at row `start`; the rows of its expert end at `end`. Experts without rows cost
    nothing, others one copy of their weights.
    """
    ends = jnp.cumsum(sizes)
    busy = jnp.argsort(sizes == 0)  # stable: experts stay in order

    def visit_expert(i, state):
        # The barrier ties the weights to `i`: else XLA converts bfloat16 weights of all experts to
        # float32 ahead of the loop, which triples the memory.
        all_weights, expert = lax.optimization_barrier((weights, busy[i]))
        own_weights = tuple(_own(weight, expert) for weight in all_weights)
        start, end = ends[expert] - sizes[expert], ends[expert]
        rest = (end - start) % blocks[-1]
        # The rest gets one block, of the size that it fits in; a loop runs it or doesn't.
        fits = [
            ((less < rest) & (rest <= block)).astype(rest.dtype)
            for less, block in zip((0, *blocks), blocks, strict=False)
        ]
        fits[-1] += (end - start) // blocks[-1]
        for block, count in reversed(list(zip(blocks, fits, strict=True))):

            def visit_block(j, state, block=block, start=start):
                return visit(state, block, start + j * block, end, expert, own_weights)

            state = lax.fori_loop(0, count, visit_block, state)
            start += count * block
        return state

    return lax.fori_loop(0, jnp.count_nonzero(sizes), visit_expert, state)


def _own(weight: Any, expert: Int[Array, ""]) -> Any:
    own = weight[expert]
    return own if isinstance(own, Quantized) else own.astype(_wide(own))
