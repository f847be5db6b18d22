"""The experts' SwiGLU over rows sorted by expert: one function, three ways to compute it."""

from collections.abc import Callable
from math import isqrt
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from llama4_eqx.layers.remat import save_residual

Backend = Literal["dense", "ragged", "blocked"]


def grouped_mlp(
    rows: Float[Array, "tokens hidden"],
    gate_proj: Float[Array, "experts hidden ff"],
    up_proj: Float[Array, "experts hidden ff"],
    down_proj: Float[Array, "experts ff hidden"],
    group_sizes: Int[Array, "experts"],
    *,
    backend: Backend | None = None,
) -> Float[Array, "tokens hidden"]:
    """`(silu(x · gate) * (x · up)) · down` of each row x, with the weights of the row's expert.

    The first `group_sizes[0]` rows belong to expert 0, the next `group_sizes[1]` to expert 1, and
    so on, whatever the sizes. Rows past the last group belong to no expert: they give zeros and get
    zero gradients.

    `backend` is `"dense"`, which runs every expert on every row and is the oracle of the others;
    `"ragged"`, `lax.ragged_dot`, which on CPUs costs as much as dense; or `"blocked"`, a loop for
    CPUs, for one row as for thousands, which has no forward-mode derivative and under `shard_map`
    needs arguments that vary over the same mesh axes (`lax.pcast`). None takes blocked on CPUs and
    ragged elsewhere.
    """
    if backend is None:
        backend = "blocked" if jax.default_backend() == "cpu" else "ragged"
    if backend not in _BACKENDS:
        raise ValueError(f"backend must be None or one of {get_args(Backend)}, got {backend!r}")
    return _BACKENDS[backend](rows, gate_proj, up_proj, down_proj, group_sizes)


def _swiglu(gate: Array, up: Array) -> Array:
    return jax.nn.silu(gate) * up


def _has_expert(rows: Array, sizes: Array) -> Array:
    return (jnp.arange(rows.shape[0]) < sizes.sum())[:, None]


def _dense(rows: Array, gate: Array, up: Array, down: Array, sizes: Array) -> Array:
    row, ends = jnp.arange(rows.shape[0]), jnp.cumsum(sizes)[:, None]
    of_expert = (ends - sizes[:, None] <= row) & (row < ends)
    gated, upped = (jnp.einsum("td,edf->etf", rows, weight) for weight in (gate, up))
    out = jnp.einsum("etf,efd->etd", _swiglu(gated, upped), down)
    return jnp.where(of_expert[..., None], out, 0).sum(0)


def _ragged(rows: Array, gate: Array, up: Array, down: Array, sizes: Array) -> Array:
    # What ragged_dot and its derivatives leave in rows of no expert depends on the platform.
    has_expert = _has_expert(rows, sizes)
    rows = jnp.where(has_expert, rows, 0)
    gated, upped = (
        jnp.where(has_expert, save_residual(lax.ragged_dot(rows, weight, sizes)), 0)
        for weight in (gate, up)
    )
    out = lax.ragged_dot(_swiglu(gated, upped), down, sizes)
    return jnp.where(has_expert, out, 0)


@jax.custom_vjp
def _blocked(rows: Array, gate: Array, up: Array, down: Array, sizes: Array) -> Array:
    return _forward(rows, gate, up, down, sizes, save_inner=False)[0]


def _forward(rows, gate, up, down, sizes, save_inner=True):
    block, spare = _block_sizes(rows.shape[0], sizes.shape[0])
    x = _widen(rows, spare)
    inner = jnp.zeros_like(x, shape=(x.shape[0], gate.shape[-1]))
    inner = (inner, inner) if save_inner else ()

    def visit(state, start, end, expert, weights):
        out, inner = state
        block_x = lax.dynamic_slice_in_dim(x, start, block)
        block_inner = block_x @ weights[0], block_x @ weights[1]
        # What this writes past the expert's `end` is wrong, and overwritten by the next expert.
        out = _write(out, _swiglu(*block_inner) @ weights[2], start)
        inner = tuple(map(lambda all, one: _write(all, one, start), inner, block_inner))
        return out, inner

    weights = gate, up, down
    out, inner = _visit_blocks(visit, (jnp.zeros_like(x), inner), block, weights, sizes)
    inner = save_residual(inner)
    out = jnp.where(_has_expert(rows, sizes), out[: rows.shape[0]], 0)
    return out.astype(rows.dtype), (x, inner, weights, sizes)


def _backward(residuals, d_out):
    x, inner, weights, sizes = residuals
    _, block = _block_sizes(d_out.shape[0], sizes.shape[0])
    wide_d_out = _widen(d_out, block)

    def visit(state, start, end, expert, block_weights):
        d_x, d_gate, d_up, d_down = state
        gate, up, down = block_weights
        of_expert = (start + jnp.arange(block) < end)[:, None]
        block_d_out = jnp.where(of_expert, lax.dynamic_slice_in_dim(wide_d_out, start, block), 0)
        block_inner = (lax.dynamic_slice_in_dim(one, start, block) for one in inner)
        act, swiglu_vjp = jax.vjp(_swiglu, *block_inner)
        d_gated, d_upped = swiglu_vjp(block_d_out @ down.T)
        block_x = lax.dynamic_slice_in_dim(x, start, block)
        return (
            _write(d_x, d_gated @ gate.T + d_upped @ up.T, start),
            d_gate.at[expert].add(block_x.T @ d_gated),
            d_up.at[expert].add(block_x.T @ d_upped),
            d_down.at[expert].add(act.T @ block_d_out),
        )

    zeros = tuple(jnp.zeros_like(like, dtype=x.dtype) for like in (x, *weights))
    d_x, *d_weights = _visit_blocks(visit, zeros, block, weights, sizes)
    d_rows = d_x[: d_out.shape[0]].astype(d_out.dtype)
    return d_rows, *(d.astype(w.dtype) for d, w in zip(d_weights, weights, strict=True)), None


_blocked.defvjp(_forward, _backward)


def _write(buffer: Array, rows: Array, start: Int[Array, ""]) -> Array:
    return lax.dynamic_update_slice_in_dim(buffer, rows, start, axis=0)


def _block_sizes(tokens: int, experts: int) -> tuple[int, int]:
    """Rows in a block, forward and backward: the fastest on two cores.

    Forward, small blocks compute few rows in vain. Backward, each block costs an addition to the
    gradient of all the expert's weights, so one should hold what most experts get.
    """
    share = max(1, -(-tokens // experts))
    return min((share + 1) // 2, 16), min(share + 2 * isqrt(share), 256)


def _widen(rows: Array, spare: int) -> Array:
    """The rows in at least float32, since XLA's CPU compiler converts all of a bfloat16 buffer
    whenever a slice of it is read or written; and `spare` more, as the last block may reach past
    the end."""
    return jnp.pad(rows.astype(_wide(rows)), ((0, spare), (0, 0)))


def _wide(x: Array) -> Any:
    return jnp.float32 if x.dtype.itemsize < 4 else x.dtype


def _visit_blocks(
    visit: Callable[..., Any],
    state: Any,
    block: int,
    weights: tuple[Array, Array, Array],
    sizes: Array,
) -> Any:
    """Folds `visit(state, start, end, expert, weights)` over the blocks of rows, in order.

    A block begins at row `start`; the rows of its expert end at `end`. Experts without rows cost
    nothing, others one copy of their weights.
    """
    ends = jnp.cumsum(sizes)
    busy = jnp.argsort(sizes == 0)  # stable: experts stay in order

    def visit_expert(i, state):
        # The barrier ties the weights to `i`: else XLA converts bfloat16 weights of all experts to
        # float32 ahead of the loop, which triples the memory.
        all_weights, expert = lax.optimization_barrier((weights, busy[i]))
        own_weights = tuple(weight[expert].astype(_wide(weight)) for weight in all_weights)
        end, size = ends[expert], sizes[expert]

        def visit_block(j, state):
            return visit(state, end - size + j * block, end, expert, own_weights)

        return lax.fori_loop(0, (size + block - 1) // block, visit_block, state)

    return lax.fori_loop(0, jnp.count_nonzero(sizes), visit_expert, state)


_BACKENDS = {"dense": _dense, "ragged": _ragged, "blocked": _blocked}
