"""Routing tokens to their experts and back, on one device or among many."""

from collections.abc import Callable
from math import ceil
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from llama4_eqx.layers.activation import Activation, silu
from llama4_eqx.layers.backends import ExpertsBackend
from llama4_eqx.layers.collectives import AxisNames, MeshAxes, match_vma, psum_over
from llama4_eqx.layers.grouped import grouped_mlp
from llama4_eqx.layers.quantized import Quantized, is_quantized
from llama4_eqx.layers.remat import save_residual
from llama4_eqx.layers.scanned import ScannedWeight
from llama4_eqx.layers.unstacked import UnstackedWeight

CAPACITY_FACTOR = 1.5
"""Room in a round of the all-to-all, relative to what evenly routed tokens need."""


def routed_experts(
    x: Float[Array, "tokens hidden"],
    router_weights: Float[Array, "tokens top_k"],
    expert_ids: Int[Array, "tokens top_k"],
    gate_proj: Float[Array, "experts hidden ff"] | Quantized | UnstackedWeight | ScannedWeight,
    up_proj: Float[Array, "experts hidden ff"] | Quantized | UnstackedWeight | ScannedWeight,
    down_proj: Float[Array, "experts ff hidden"] | Quantized | UnstackedWeight | ScannedWeight,
    mesh_axes: MeshAxes,
    backend: ExpertsBackend | None = None,
    activation: Activation = silu,
) -> Float[Array, "tokens hidden"]:
    """`Σ_k expert_k(router_weight_k · x)`. Dropless: however uneven the routing, no token is lost.

    Inside `jax.shard_map` the experts may be sharded. If their mesh axes shard the tokens, too,
    tokens are exchanged by all-to-all; otherwise devices along the axes hold the same tokens, and
    their experts' outputs are all-reduced. If `ff` is sharded the result is a partial sum, which
    the caller reduces.
    """
    form = _Form(backend, activation)
    all_to_all = bool(mesh_axes.experts) and set(mesh_axes.experts) <= set(mesh_axes.tokens)
    x, router_weights, expert_ids, *weights = match_vma(
        x, router_weights, expert_ids, gate_proj, up_proj, down_proj
    )
    rows = (x[:, None] * router_weights[..., None]).reshape(-1, x.shape[-1])
    expert_of_row = expert_ids.reshape(-1)
    if all_to_all:
        out = _through_all_to_all(rows, expert_of_row, tuple(weights), mesh_axes.experts, form)
    else:
        if mesh_axes.experts:
            local_experts = len(gate_proj)
            expert_of_row -= lax.axis_index(mesh_axes.experts) * local_experts
            here = (expert_of_row >= 0) & (expert_of_row < local_experts)
            expert_of_row = jnp.where(here, expert_of_row, local_experts)
        out = _through_local_experts(rows, expert_of_row, tuple(weights), form)
    out = out.reshape(*expert_ids.shape, x.shape[-1]).sum(-2)
    return psum_over(out, () if all_to_all else mesh_axes.experts)


class _Form(NamedTuple):
    """How the experts are computed."""

    backend: ExpertsBackend | None
    activation: Activation


# The experts' gate, up and down projections.
_Weight = Array | Quantized | UnstackedWeight | ScannedWeight
_Weights = tuple[_Weight, _Weight, _Weight]


def _through_local_experts(
    rows: Float[Array, "tokens hidden"],
    expert_of_row: Int[Array, "tokens"],
    weights: _Weights,
    form: _Form,
) -> Float[Array, "tokens hidden"]:
    """Each row through its expert; zeros for a row whose expert is past the last one."""
    order = jnp.argsort(expert_of_row)
    group_sizes = jnp.bincount(expert_of_row, length=len(weights[0]))
    rows, order, group_sizes = match_vma(rows, order, group_sizes)
    sorted_rows = rows.at[order].get(unique_indices=True)
    out = grouped_mlp(sorted_rows, *weights, group_sizes, **form._asdict())
    return jnp.zeros_like(out).at[order].set(out, unique_indices=True)


def _through_all_to_all(
    rows: Float[Array, "tokens hidden"],
    expert_of_row: Int[Array, "tokens"],
    weights: _Weights,
    axis_names: AxisNames,
    form: _Form,
) -> Float[Array, "tokens hidden"]:
    """Each row through its expert, on whichever device along the mesh axes that is.

    Shapes are static, but how many rows one device has for another isn't: they are sent in rounds,
    each with the same capacity for every pair of devices. Balanced routing needs one round.
    """
    devices, local_experts = lax.axis_size(axis_names), len(weights[0])
    capacity = min(ceil(CAPACITY_FACTOR * len(rows) / devices), len(rows))
    device_of_row = expert_of_row // local_experts
    counts = jnp.bincount(device_of_row, length=devices)
    route = _Route(
        order=jnp.argsort(device_of_row),
        local_expert=expert_of_row % local_experts,
        start=jnp.cumsum(counts) - counts,
        count=counts,
        axis_names=axis_names,
        capacity=capacity,
        form=form,
    )
    route, rows = match_vma(route, rows)
    rounds = lax.pmax(jnp.max(-(-counts // capacity)), axis_names)
    return _rounds(rounds, rows, weights, route)


class _Route(eqx.Module):
    """Which rows go to which device.

    Rows sorted by device are `order`; those for a device begin at `start` and are `count` many;
    `local_expert` is each row's expert, counted on its device.
    """

    order: Int[Array, "tokens"]
    local_expert: Int[Array, "tokens"]
    start: Int[Array, "devices"]
    count: Int[Array, "devices"]
    axis_names: AxisNames = eqx.field(static=True)
    capacity: int = eqx.field(static=True)
    form: _Form = eqx.field(static=True)


def _round(
    number: Int[Array, ""], rows: Float[Array, "tokens hidden"], weights: _Weights, route: _Route
) -> Float[Array, "tokens hidden"]:
    """The experts' outputs for the rows of one round, and zeros for all others."""
    row, real = _rows_of_round(number, route)
    # What fills a round's capacity has no expert, so it gives zeros.
    sent = rows[row]
    expert = jnp.where(real, route.local_expert[row], len(weights[0]))
    received, expert = save_residual(_dispatch(sent, route)), _dispatch(expert, route)
    received = received.reshape(-1, rows.shape[-1])
    out = _through_local_experts(received, expert.reshape(-1), weights, route.form)
    returned = _combine(out.reshape(sent.shape), route)
    return jnp.zeros_like(rows).at[row].add(returned)


def _rows_of_round(number: Int[Array, ""], route: _Route) -> tuple[Array, Array]:
    """Which rows a round sends to each device, and which of them are real."""
    nth = number * route.capacity + jnp.arange(route.capacity)
    real = nth < route.count[:, None]
    return route.order.at[route.start[:, None] + nth].get(mode="clip"), real


def _dispatch(x: Array, route: _Route) -> Array:
    """Sends `x[i]` to device `i`; what comes back is by the device that it comes from."""
    return lax.all_to_all(x, route.axis_names, split_axis=0, concat_axis=0, tiled=True)


# Sending the results back is the same exchange.
_combine = _dispatch


# How many rounds there are is known only at run time, and such a loop has no reverse derivative.
# Both loops go on from the first round's results, so that they cost nothing where that is enough.
@jax.custom_vjp
def _rounds(
    rounds: Int[Array, ""], rows: Float[Array, "tokens hidden"], weights: _Weights, route: _Route
) -> Float[Array, "tokens hidden"]:
    first = _round(jnp.int32(0), rows, weights, route)
    return _with_later_rounds(first, rounds, rows, weights, route)


def _with_later_rounds(
    first: Array, rounds: Array, rows: Array, weights: _Weights, route: _Route
) -> Array:
    def visit(number, out):
        return out + _round(number, rows, weights, route)

    return lax.fori_loop(1, rounds, visit, first)


def _rounds_forward(rounds, rows, weights, route):
    first, vjp = _round_vjp(jnp.int32(0), rows, weights, route)
    out = _with_later_rounds(first, rounds, rows, weights, route)
    return out, (vjp, rounds, rows, weights, route)


def _rounds_backward(residuals, d_out):
    first_vjp, rounds, rows, weights, route = residuals

    def visit(number, gradients):
        _, vjp = _round_vjp(number, rows, weights, route)
        return jax.tree.map(jnp.add, gradients, vjp(d_out))

    d_rows, *d_weights = lax.fori_loop(1, rounds, visit, first_vjp(d_out))
    return None, d_rows, *(d_weights or (None,)), None


def _round_vjp(
    number: Array, rows: Array, weights: _Weights, route: _Route
) -> tuple[Array, Callable[[Array], tuple[Any, ...]]]:
    """A round, and its derivative by the rows and by the weights, unless these are of few bits."""
    if any(map(is_quantized, weights)):
        return jax.vjp(lambda rows: _round(number, rows, weights, route), rows)
    return jax.vjp(lambda rows, weights: _round(number, rows, weights, route), rows, weights)


_rounds.defvjp(_rounds_forward, _rounds_backward)
