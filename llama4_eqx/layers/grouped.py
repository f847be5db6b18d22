"""The experts' SwiGLU over rows sorted by expert: one function, several ways to compute it."""

from collections.abc import Callable
from functools import partial
from math import isqrt
from typing import Any, cast, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from llama4_eqx.layers.activation import Activation, gated_product, silu
from llama4_eqx.layers.backends import ExpertsBackend, check_backend
from llama4_eqx.layers.grouped_products import HOPPER, MEGABLOX, RAGGED, mlp_by_products
from llama4_eqx.layers.hopper import fits_hopper, has_hopper
from llama4_eqx.layers.megablox import fits_megablox
from llama4_eqx.layers.platforms import by_platform, may_run_on
from llama4_eqx.layers.quantized import (
    LEAST_ROWS,
    Quantized,
    int8_dot,
    int8_rows,
    is_quantized,
    plain_weight,
)
from llama4_eqx.layers.remat import save_residual
from llama4_eqx.layers.unstacked import UnstackedWeight, Weights, any_quantized, unstacked_mlp

_QuantizedWeights = tuple[Quantized, Quantized, Quantized]


def grouped_mlp(
    rows: Float[Array, "tokens hidden"],
    gate_proj: Float[Array, "experts hidden ff"] | Quantized | UnstackedWeight,
    up_proj: Float[Array, "experts hidden ff"] | Quantized | UnstackedWeight,
    down_proj: Float[Array, "experts ff hidden"] | Quantized | UnstackedWeight,
    group_sizes: Int[Array, "experts"],
    *,
    activation: Activation = silu,
    backend: ExpertsBackend | None = None,
) -> Float[Array, "tokens hidden"]:
    """`(activation(x · gate) * (x · up)) · down` of each row x, with the weights of its expert.

    The first `group_sizes[0]` rows belong to expert 0, the next `group_sizes[1]` to expert 1, and
    so on, whatever the sizes. Rows past the last group belong to no expert: they give zeros and get
    zero gradients.

    `backend` is `"dense"`, which runs every expert on every row and is the oracle of the others;
    `"ragged"`, `lax.ragged_dot`, as costly as dense on CPUs and GPUs, and on TPUs for the gradients
    of weights; `"megablox"`, for TPUs, which has a kernel for these;
    `"blocked"`, a loop for CPUs, for one row as for thousands, which has no forward-mode derivative
    and under `shard_map` needs arguments that vary over the same mesh axes (`lax.pcast`);
    `"hopper"`, kernels for H100 and H200, for 16-bit numbers and sizes that are multiples of 128;
    or `"rows"`, one row after another. None chooses by the platform that the program is lowered
    for: blocked on CPUs; on GPUs rows for a few of them, else hopper where it fits and this machine
    has such a GPU; megablox if this machine or the mesh has TPUs; and ragged everywhere else.

    Quantised weights go through a loop of their own on CPUs, through a ragged product of the
    converted numbers on TPUs, and are dequantised for many rows on GPUs or with a `backend`.
    Unstacked weights are used as they are on CPUs, and stacked elsewhere or with a `backend`.
    """
    check_backend(backend, get_args(ExpertsBackend), "experts")
    weights = gate_proj, up_proj, down_proj
    if all(isinstance(weight, UnstackedWeight) for weight in weights):
        of_weights = partial(_of_unstacked, activation, backend)
        return of_weights(rows, cast(Weights, weights), group_sizes)
    if backend is None and all(isinstance(weight, Quantized) for weight in weights):
        return _of_quantized(activation, rows, cast(_QuantizedWeights, weights), group_sizes)
    gate, up, down = (plain_weight(cast(Array | Quantized, weight)) for weight in weights)
    operands = rows, gate, up, down, group_sizes
    if backend == "hopper" and not fits_hopper(rows, gate):
        raise ValueError(
            'backend="hopper" takes 16-bit numbers and sizes that are multiples of 128, but got '
            f"{rows.dtype} and weights of {gate.shape}: pass None."
        )
    if backend == "megablox" and not fits_megablox(rows, gate):
        raise ValueError(
            f'backend="megablox" takes bfloat16 or float32, the same for all, but got {rows.dtype} '
            f"and weights of {gate.dtype}: pass None."
        )
    if backend is not None:
        return _BACKENDS[backend](activation, *operands)
    if 4 * len(rows) <= len(gate):  # measured on an H100: reads less than all experts do
        on_gpu = _row_by_row
    elif has_hopper() and fits_hopper(rows, gate):
        on_gpu = _hopper
    else:
        on_gpu = _ragged
    forms = {"cpu": _blocked, "cuda": on_gpu, "default": _ragged}
    if may_run_on("tpu") and fits_megablox(rows, gate):
        forms["tpu"] = _megablox
    return by_platform(
        *operands, **{name: partial(form, activation) for name, form in forms.items()}
    )


def _has_expert(rows: Array, sizes: Array) -> Array:
    return (jnp.arange(rows.shape[0]) < sizes.sum())[:, None]


def _dense(
    activation: Activation, rows: Array, gate: Array, up: Array, down: Array, sizes: Array
) -> Array:
    row, ends = jnp.arange(rows.shape[0]), jnp.cumsum(sizes)[:, None]
    of_expert = (ends - sizes[:, None] <= row) & (row < ends)
    gated, upped = (jnp.einsum("td,edf->etf", rows, weight) for weight in (gate, up))
    out = jnp.einsum("etf,efd->etd", gated_product(activation, gated, upped), down)
    return jnp.where(of_expert[..., None], out, 0).sum(0)


def _row_by_row(activation: Activation, rows: Array, *weights_and_sizes: Any) -> Array:
    *weights, sizes = jax.tree.leaves(weights_and_sizes, is_leaf=is_quantized)
    expert_of_row = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(len(rows)), side="right")

    def product(x: Array, weight: Any, expert: Array) -> Array:
        own = jax.tree.map(lambda w: lax.dynamic_index_in_dim(w, expert, keepdims=False), weight)
        if not isinstance(own, Quantized):
            return x @ own
        if own.scale.shape[0] > 1:
            return x @ own.dequantized().astype(x.dtype)
        out = (x @ own.numbers.astype(x.dtype)).astype(jnp.float32)
        return (out * own.scale[0]).astype(x.dtype)

    def one(operand):
        row, expert = operand
        gate, up, down = weights
        gated, upped = (product(row, weight, expert) for weight in (gate, up))
        return product(gated_product(activation, gated, upped), down, expert)

    out = lax.map(one, (rows, jnp.minimum(expert_of_row, len(weights[0]) - 1)))
    return jnp.where((expert_of_row < len(weights[0]))[:, None], out, 0)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocked(
    activation: Activation, rows: Array, gate: Array, up: Array, down: Array, sizes: Array
) -> Array:
    return _forward(activation, rows, gate, up, down, sizes, save_inner=False)[0]


def _forward(activation, rows, gate, up, down, sizes, save_inner=True):
    block, spare = _block_sizes(rows.shape[0], sizes.shape[0])
    x = _widen(rows, spare)
    inner = jnp.zeros_like(x, shape=(x.shape[0], gate.shape[-1]))
    inner = (inner, inner) if save_inner else ()

    def visit(state, start, end, expert, weights):
        out, inner = state
        block_x = lax.dynamic_slice_in_dim(x, start, block)
        block_inner = block_x @ weights[0], block_x @ weights[1]
        # What this writes past the expert's `end` is wrong, and overwritten by the next expert.
        out = _write(out, gated_product(activation, *block_inner) @ weights[2], start)
        inner = tuple(map(lambda all, one: _write(all, one, start), inner, block_inner))
        return out, inner

    weights = gate, up, down
    out, inner = _visit_blocks(visit, (jnp.zeros_like(x), inner), block, weights, sizes)
    inner = save_residual(inner)
    out = jnp.where(_has_expert(rows, sizes), out[: rows.shape[0]], 0)
    return out.astype(rows.dtype), (x, inner, weights, sizes)


def _backward(activation, residuals, d_out):
    x, inner, weights, sizes = residuals
    _, block = _block_sizes(d_out.shape[0], sizes.shape[0])
    wide_d_out = _widen(d_out, block)

    def visit(state, start, end, expert, block_weights):
        d_x, d_gate, d_up, d_down = state
        gate, up, down = block_weights
        of_expert = (start + jnp.arange(block) < end)[:, None]
        block_d_out = jnp.where(of_expert, lax.dynamic_slice_in_dim(wide_d_out, start, block), 0)
        block_inner = (lax.dynamic_slice_in_dim(one, start, block) for one in inner)
        act, gated_vjp = jax.vjp(partial(gated_product, activation), *block_inner)
        d_gated, d_upped = gated_vjp(block_d_out @ down.T)
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
    weights: tuple[Any, Any, Any],
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
        own_weights = tuple(_own(weight, expert) for weight in all_weights)
        end, size = ends[expert], sizes[expert]

        def visit_block(j, state):
            return visit(state, end - size + j * block, end, expert, own_weights)

        return lax.fori_loop(0, (size + block - 1) // block, visit_block, state)

    return lax.fori_loop(0, jnp.count_nonzero(sizes), visit_expert, state)


def _own(weight: Any, expert: Int[Array, ""]) -> Any:
    return weight[expert] if isinstance(weight, Quantized) else weight[expert].astype(_wide(weight))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _of_quantized(
    activation: Activation, rows: Array, weights: _QuantizedWeights, sizes: Array
) -> Array:
    few = 4 * len(rows) <= len(sizes)
    on_gpu = _row_by_row if few else _with_plain_weights
    in_groups = any(weight.scale.shape[1] > 1 for weight in weights)
    elsewhere = _with_plain_weights if in_groups else _quantized_ragged
    forms = {"cpu": _quantized_blocked, "cuda": on_gpu, "default": elsewhere}
    return by_platform(
        rows, weights, sizes, **{name: partial(form, activation) for name, form in forms.items()}
    )


def _quantized_forward(activation, rows, weights, sizes):
    return _of_quantized(activation, rows, weights, sizes), (rows, weights, sizes)


def _quantized_backward(activation, residuals, d_out):
    rows, weights, sizes = residuals
    _, vjp = jax.vjp(lambda rows: _with_plain_weights(activation, rows, weights, sizes), rows)
    return *vjp(d_out), None, None


_of_quantized.defvjp(_quantized_forward, _quantized_backward)


def _with_plain_weights(
    activation: Activation, rows: Array, weights: _QuantizedWeights, sizes: Array
) -> Array:
    gate, up, down = (weight.dequantized() for weight in weights)
    return grouped_mlp(rows, gate, up, down, sizes, activation=activation)


def _quantized_ragged(
    activation: Activation, rows: Array, weights: _QuantizedWeights, sizes: Array
) -> Array:
    expert = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(len(rows)), side="right")
    expert = jnp.minimum(expert, len(sizes) - 1)

    def product(x: Array, weight: Quantized) -> Array:
        out = lax.ragged_dot(x, weight.numbers.astype(x.dtype), sizes)
        return (out.astype(jnp.float32) * weight.scale[expert, 0]).astype(x.dtype)

    gate, up, down = weights
    x = jnp.where(_has_expert(rows, sizes), rows, 0)
    inner = gated_product(activation, product(x, gate), product(x, up))
    return jnp.where(_has_expert(rows, sizes), product(inner, down), 0)


def _quantized_blocked(
    activation: Activation, rows: Array, weights: _QuantizedWeights, sizes: Array
) -> Array:
    block, _ = _block_sizes(len(rows), len(sizes))
    block = max(block, LEAST_ROWS)
    in_int8 = all(
        weight.numbers.dtype == jnp.int8 and weight.scale.shape[1] == 1 for weight in weights
    )
    wide = _widen(rows, block)
    x, x_scale = int8_rows(wide) if in_int8 else (wide, jnp.ones_like(wide[:, :1]))

    def product(x: Array, scale: Array, weight: Quantized) -> Array:
        if in_int8:
            return int8_dot(x, weight.numbers, 0) * scale * weight.scale
        return x @ weight.dequantized().astype(x.dtype)

    def visit(out, start, end, expert, own):
        block_x, scale = (lax.dynamic_slice_in_dim(a, start, block) for a in (x, x_scale))
        gate, up, down = own
        gated, upped = (product(block_x, scale, weight) for weight in (gate, up))
        inner = gated_product(activation, gated, upped)
        inner, inner_scale = int8_rows(inner) if in_int8 else (inner, scale)
        return _write(out, product(inner, inner_scale, down), start)

    out = _visit_blocks(visit, jnp.zeros_like(wide), block, weights, sizes)[: len(rows)]
    return jnp.where(_has_expert(rows, sizes), out, 0).astype(rows.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _of_unstacked(
    activation: Activation,
    backend: ExpertsBackend | None,
    rows: Array,
    weights: Weights,
    sizes: Array,
) -> Array:
    forms = {"default": partial(_of_stacked, activation, backend)}
    if backend is None:
        block, _ = _block_sizes(len(rows), len(sizes))
        forms["cpu"] = partial(unstacked_mlp, activation, block)
    return by_platform(rows, weights, sizes, **forms)


def _of_stacked(
    activation: Activation,
    backend: ExpertsBackend | None,
    rows: Array,
    weights: Weights,
    sizes: Array,
) -> Array:
    gate, up, down = (weight.stacked() for weight in weights)
    return grouped_mlp(rows, gate, up, down, sizes, activation=activation, backend=backend)


def _unstacked_forward(activation, backend, rows, weights, sizes):
    return _of_unstacked(activation, backend, rows, weights, sizes), (rows, weights, sizes)


def _unstacked_backward(activation, backend, residuals, d_out):
    rows, weights, sizes = residuals
    run = partial(_of_stacked, activation, backend)
    if any_quantized(weights):
        _, vjp = jax.vjp(lambda rows: run(rows, weights, sizes), rows)
        return *vjp(d_out), None, None
    _, vjp = jax.vjp(lambda rows, weights: run(rows, weights, sizes), rows, weights)
    return *vjp(d_out), None


_of_unstacked.defvjp(_unstacked_forward, _unstacked_backward)

_ragged = partial(mlp_by_products, RAGGED)
_hopper = partial(mlp_by_products, HOPPER)
_megablox = partial(mlp_by_products, MEGABLOX)
_BACKENDS = {
    "dense": _dense,
    "ragged": _ragged,
    "blocked": _blocked,
    "hopper": _hopper,
    "megablox": _megablox,
    "rows": _row_by_row,
}
