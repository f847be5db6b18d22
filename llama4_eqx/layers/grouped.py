"""The experts' SwiGLU over rows sorted by expert: one meaning, three ways to compute it."""

from collections.abc import Callable
from math import isqrt
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from llama4_eqx.layers.remat import kept

Backend = Literal["dense", "ragged", "blocked"]


def grouped_mlp(
    rows: Float[Array, "tokens hidden"],
    gate_up_proj: Float[Array, "experts hidden 2 ff"],
    down_proj: Float[Array, "experts ff hidden"],
    group_sizes: Int[Array, "experts"],
    *,
    backend: Backend | None = None,
) -> Float[Array, "tokens hidden"]:
    """`(silu(x · gate) * (x · up)) · down` of each row x, with the weights of the row's expert.

    The first `group_sizes[0]` rows belong to expert 0, the next `group_sizes[1]` to expert 1, and
    so on, whatever the sizes. Rows past the last group belong to nobody: they give zeros and get
    zero gradients.

    `backend` says how. `"dense"` runs every expert on every row, and is what the others must equal.
    `"ragged"` is `lax.ragged_dot`, which on CPUs costs as much as dense. `"blocked"` is a loop for
    CPUs, for one row as for thousands; it has no forward-mode derivative, and under `shard_map`
    its arguments must vary over the same mesh axes (`lax.pcast`). None takes blocked on CPUs and
    ragged elsewhere.
    """
    if backend is None:
        backend = "blocked" if jax.default_backend() == "cpu" else "ragged"
    if backend not in _BACKENDS:
        raise ValueError(f"backend must be None or one of {get_args(Backend)}, got {backend!r}")
    return _BACKENDS[backend](rows, gate_up_proj, down_proj, group_sizes)


def _swiglu(gate_up: Array) -> Array:
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate) * up


def _side_by_side(gate_up: Array) -> Array:
    """`[…, 2, ff]` to `[…, 2 · ff]`."""
    return gate_up.reshape(*gate_up.shape[:-2], -1)


def _owned(rows: Array, sizes: Array) -> Array:
    return (jnp.arange(rows.shape[0]) < sizes.sum())[:, None]


def _dense(rows: Array, gate_up: Array, down: Array, sizes: Array) -> Array:
    gate_up = _side_by_side(gate_up)
    row, ends = jnp.arange(rows.shape[0]), jnp.cumsum(sizes)[:, None]
    mine = (ends - sizes[:, None] <= row) & (row < ends)
    out = jnp.einsum("etf,efd->etd", _swiglu(jnp.einsum("td,edf->etf", rows, gate_up)), down)
    return jnp.where(mine[..., None], out, 0).sum(0)


def _ragged(rows: Array, gate_up: Array, down: Array, sizes: Array) -> Array:
    gate_up = _side_by_side(gate_up)
    # What ragged_dot and its derivatives leave in the rows of nobody is up to the platform.
    owned = _owned(rows, sizes)
    hidden = kept(lax.ragged_dot(jnp.where(owned, rows, 0), gate_up, sizes))
    out = lax.ragged_dot(_swiglu(jnp.where(owned, hidden, 0)), down, sizes)
    return jnp.where(owned, out, 0)


@jax.custom_vjp
def _blocked(rows: Array, gate_up: Array, down: Array, sizes: Array) -> Array:
    return _forward(rows, gate_up, down, sizes, keep_hidden=False)[0]


def _forward(rows, gate_up, down, sizes, keep_hidden=True):
    block, spare = _block_sizes(rows.shape[0], sizes.shape[0])
    x = _widen(rows, spare)
    hidden = jnp.zeros_like(x, shape=(x.shape[0], 2 * gate_up.shape[-1])) if keep_hidden else None

    def visit(state, start, end, expert, w_gate_up, w_down):
        out, hidden = state
        block_hidden = lax.dynamic_slice_in_dim(x, start, block) @ w_gate_up
        # What this writes past the expert's `end` is wrong, and overwritten by the next expert.
        out = lax.dynamic_update_slice_in_dim(out, _swiglu(block_hidden) @ w_down, start, axis=0)
        if keep_hidden:
            hidden = lax.dynamic_update_slice_in_dim(hidden, block_hidden, start, axis=0)
        return out, hidden

    out, hidden = _visit_blocks(visit, (jnp.zeros_like(x), hidden), block, gate_up, down, sizes)
    hidden = kept(hidden)
    out = jnp.where(_owned(rows, sizes), out[: rows.shape[0]], 0)
    return out.astype(rows.dtype), (x, hidden, gate_up, down, sizes)


def _backward(residuals, d_out):
    x, hidden, gate_up, down, sizes = residuals
    _, block = _block_sizes(d_out.shape[0], sizes.shape[0])
    wide_d_out = _widen(d_out, block)

    def visit(state, start, end, expert, w_gate_up, w_down):
        d_x, d_gate_up, d_down = state
        mine = (start + jnp.arange(block) < end)[:, None]
        block_d_out = jnp.where(mine, lax.dynamic_slice_in_dim(wide_d_out, start, block), 0)
        act, swiglu_vjp = jax.vjp(_swiglu, lax.dynamic_slice_in_dim(hidden, start, block))
        (d_hidden,) = swiglu_vjp(block_d_out @ w_down.T)
        block_x = lax.dynamic_slice_in_dim(x, start, block)
        return (
            lax.dynamic_update_slice_in_dim(d_x, d_hidden @ w_gate_up.T, start, axis=0),
            d_gate_up.at[expert].add((block_x.T @ d_hidden).reshape(gate_up.shape[1:])),
            d_down.at[expert].add(act.T @ block_d_out),
        )

    zeros = tuple(jnp.zeros_like(like, dtype=x.dtype) for like in (x, gate_up, down))
    d_x, d_gate_up, d_down = _visit_blocks(visit, zeros, block, gate_up, down, sizes)
    d_rows = d_x[: d_out.shape[0]].astype(d_out.dtype)
    return d_rows, d_gate_up.astype(gate_up.dtype), d_down.astype(down.dtype), None


_blocked.defvjp(_forward, _backward)


def _block_sizes(tokens: int, experts: int) -> tuple[int, int]:
    """Rows in a block, forward and backward: the fastest on two cores.

    Forward, small blocks compute few rows in vain. Backward, each block costs an addition to the
    gradient of all the expert's weights, so one should hold what most experts get.
    """
    share = max(1, -(-tokens // experts))
    return min((share + 1) // 2, 16), min(share + 2 * isqrt(share), 256)


def _widen(rows: Array, spare: int) -> Array:
    """The rows in at least float32, for whenever a slice of a bfloat16 buffer is read or written
    XLA's CPU compiler converts all of it; and `spare` more, as the last block may reach past the
    end."""
    return jnp.pad(rows.astype(_wide(rows)), ((0, spare), (0, 0)))


def _wide(x: Array) -> Any:
    return jnp.float32 if x.dtype.itemsize < 4 else x.dtype


def _visit_blocks(
    visit: Callable[..., Any], state: Any, block: int, gate_up: Array, down: Array, sizes: Array
) -> Any:
    """Folds `visit(state, start, end, expert, *weights)` over the blocks of rows, in order.

    A block begins at row `start`; the rows of its expert end at `end`. Experts without rows cost
    nothing, others one copy of their weights.
    """
    ends = jnp.cumsum(sizes)
    busy = jnp.argsort(sizes == 0)  # stable: experts stay in order

    def visit_expert(i, state):
        # The barrier ties the weights to `i`: else XLA converts bfloat16 weights of all experts to
        # float32 ahead of the loop, which triples the memory.
        gate_ups, downs, expert = lax.optimization_barrier((gate_up, down, busy[i]))
        weights = (
            _side_by_side(gate_ups[expert]).astype(_wide(gate_up)),
            downs[expert].astype(_wide(down)),
        )
        end, size = ends[expert], sizes[expert]

        def visit_block(j, state):
            return visit(state, end - size + j * block, end, expert, *weights)

        return lax.fori_loop(0, (size + block - 1) // block, visit_block, state)

    return lax.fori_loop(0, jnp.count_nonzero(sizes), visit_expert, state)


_BACKENDS = {"dense": _dense, "ragged": _ragged, "blocked": _blocked}
