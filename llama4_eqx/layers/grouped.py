"""The experts' SwiGLU over rows sorted by expert: one function, several ways to compute it."""

from functools import partial
from typing import Any, cast, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from llama4_eqx.layers.activation import Activation, gated_product, silu
from llama4_eqx.layers.backends import ExpertsBackend, check_backend
from llama4_eqx.layers.blocked import block_size, blocked_forward, blocked_mlp
from llama4_eqx.layers.grouped_products import HOPPER, MEGABLOX, RAGGED, mlp_by_products
from llama4_eqx.layers.grouped_quantized import (
    MOST_DENSE_ROWS,
    QuantizedWeights,
    quantized_block,
    quantized_blocked_mlp,
    quantized_dense_mlp,
    quantized_ragged_mlp,
)
from llama4_eqx.layers.hopper import fits_hopper, may_run_on_hopper
from llama4_eqx.layers.megablox import fits_megablox
from llama4_eqx.layers.platforms import by_platform, may_run_on
from llama4_eqx.layers.quantized import Quantized, is_quantized, plain_weight
from llama4_eqx.layers.scanned import ScannedWeight
from llama4_eqx.layers.unstacked import UnstackedWeight, unstacked_mlp


def grouped_mlp(
    rows: Float[Array, "tokens hidden"],
    gate_proj: Float[Array, "experts hidden ff"] | Quantized | UnstackedWeight | ScannedWeight,
    up_proj: Float[Array, "experts hidden ff"] | Quantized | UnstackedWeight | ScannedWeight,
    down_proj: Float[Array, "experts ff hidden"] | Quantized | UnstackedWeight | ScannedWeight,
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
    or the mesh has such GPUs; megablox, likewise, for TPUs; and ragged everywhere else.

    Quantised weights go through a loop of their own on CPUs, through a ragged product of the
    converted numbers on TPUs, through products of all experts for some rows on GPUs, and are
    dequantised for many there, or with a `backend`.
    Unstacked weights, and those of a scan, are used as they are on CPUs, and each layer's are
    stacked elsewhere or with a `backend`.
    """
    check_backend(backend, get_args(ExpertsBackend), "experts")
    weights = gate_proj, up_proj, down_proj
    if all(isinstance(weight, UnstackedWeight | ScannedWeight) for weight in weights):
        parts = cast(_Parts, weights)
        if backend is None:
            return _of_parts(activation, rows, parts, group_sizes)
        weights = tuple(part.stacked() for part in parts)
    if backend is None and all(isinstance(weight, Quantized) for weight in weights):
        return _of_quantized(activation, rows, cast(QuantizedWeights, weights), group_sizes)
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
    elif may_run_on_hopper() and fits_hopper(rows, gate):
        on_gpu = _hopper
    else:
        on_gpu = _ragged
    forms = {"cpu": blocked_mlp, "cuda": on_gpu, "default": _ragged}
    if may_run_on("tpu") and fits_megablox(rows, gate):
        forms["tpu"] = _megablox
    return by_platform(
        *operands, **{name: partial(form, activation) for name, form in forms.items()}
    )


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
        if not own.scales_outputs(0):
            return x @ own.dequantized().astype(x.dtype)
        out = (x @ own.numbers.astype(x.dtype)).astype(jnp.float32)
        return (out * own.scale[0].astype(out.dtype)).astype(x.dtype)

    def one(operand):
        row, expert = operand
        gate, up, down = weights
        gated, upped = (product(row, weight, expert) for weight in (gate, up))
        return product(gated_product(activation, gated, upped), down, expert)

    out = lax.map(one, (rows, jnp.minimum(expert_of_row, len(weights[0]) - 1)))
    return jnp.where((expert_of_row < len(weights[0]))[:, None], out, 0)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _of_quantized(
    activation: Activation, rows: Array, weights: QuantizedWeights, sizes: Array
) -> Array:
    dense = quantized_dense_mlp if len(rows) <= MOST_DENSE_ROWS else _with_plain_weights
    on_gpu = _row_by_row if 4 * len(rows) <= len(sizes) else dense
    scaled = all(weight.scales_outputs(1) for weight in weights)
    elsewhere = quantized_ragged_mlp if scaled else dense
    forms = {"cpu": quantized_blocked_mlp, "cuda": on_gpu, "default": elsewhere}
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
    activation: Activation, rows: Array, weights: QuantizedWeights, sizes: Array
) -> Array:
    gate, up, down = (weight.dequantized() for weight in weights)
    return grouped_mlp(rows, gate, up, down, sizes, activation=activation)


_Part = UnstackedWeight | ScannedWeight
_Parts = tuple[_Part, _Part, _Part]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _of_parts(activation: Activation, rows: Array, weights: _Parts, sizes: Array) -> Array:
    if any(map(is_quantized, jax.tree.leaves(weights, is_leaf=is_quantized))):
        block = quantized_block(len(rows), len(sizes))
    else:
        block = block_size(len(rows), len(sizes))
    unstacked = all(isinstance(weight, UnstackedWeight) for weight in weights)
    on_cpu = partial(unstacked_mlp, activation, block)
    forms = {
        "cpu": on_cpu if unstacked else partial(blocked_forward, activation),
        "default": partial(_of_stacked, activation),
    }
    return by_platform(rows, weights, sizes, **forms)


def _of_stacked(activation: Activation, rows: Array, weights: _Parts, sizes: Array) -> Array:
    gate, up, down = (weight.stacked() for weight in weights)
    return grouped_mlp(rows, gate, up, down, sizes, activation=activation)


def _parts_forward(activation, rows, weights, sizes):
    return _of_parts(activation, rows, weights, sizes), (rows, weights, sizes)


def _parts_backward(activation, residuals, d_out):
    rows, weights, sizes = residuals
    run = partial(_of_stacked, activation)
    if any(map(is_quantized, jax.tree.leaves(weights, is_leaf=is_quantized))):
        _, vjp = jax.vjp(lambda rows: run(rows, weights, sizes), rows)
        return *vjp(d_out), None, None
    differentiated, rest = eqx.partition(weights, eqx.is_inexact_array)
    _, vjp = jax.vjp(
        lambda rows, weights: run(rows, eqx.combine(weights, rest), sizes), rows, differentiated
    )
    return *vjp(d_out), None


_of_parts.defvjp(_parts_forward, _parts_backward)

_ragged = partial(mlp_by_products, RAGGED)
_hopper = partial(mlp_by_products, HOPPER)
_megablox = partial(mlp_by_products, MEGABLOX)
_BACKENDS = {
    "dense": _dense,
    "ragged": _ragged,
    "blocked": blocked_mlp,
    "hopper": _hopper,
    "megablox": _megablox,
    "rows": _row_by_row,
}
