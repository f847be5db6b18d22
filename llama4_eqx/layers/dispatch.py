"""Tokens to their experts and back, wherever the experts are."""

from math import ceil

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from llama4_eqx.layers.across import Across, Axes, alike, leave
from llama4_eqx.layers.grouped import grouped_mlp
from llama4_eqx.layers.remat import kept

# How much more room a round of the exchange has than evenly spread tokens need.
SLACK = 1.5


def dispatched(
    x: Float[Array, "tokens hidden"],
    scores: Float[Array, "tokens top_k"],
    chosen: Int[Array, "tokens top_k"],
    gate_up_proj: Float[Array, "experts hidden 2 ff"],
    down_proj: Float[Array, "experts ff hidden"],
    across: Across,
) -> Float[Array, "tokens hidden"]:
    """`Σ_k expert_k(score_k · x)`. Whatever the choices, no token is dropped.

    Inside `jax.shard_map` a device may have a part of the experts. If it has tokens of its own,
    they are exchanged (all-to-all); if all devices have the same tokens, each computes what falls
    to its experts, and the results are summed. Of a part of each expert's inner features, a part of
    each result comes out.
    """
    exchange = bool(across.experts) and set(across.experts) <= set(across.tokens)
    x, scores, chosen, gate_up_proj, down_proj = alike(x, scores, chosen, gate_up_proj, down_proj)
    rows = (x[:, None] * scores[..., None]).reshape(-1, x.shape[-1])
    expert_of_row = chosen.reshape(-1)
    if exchange:
        out = _exchanged(rows, expert_of_row, gate_up_proj, down_proj, across.experts)
    else:
        if across.experts:
            experts = len(gate_up_proj)
            expert_of_row -= lax.axis_index(across.experts) * experts
            here = (expert_of_row >= 0) & (expert_of_row < experts)
            expert_of_row = jnp.where(here, expert_of_row, experts)
        out = _through_experts(rows, expert_of_row, gate_up_proj, down_proj)
    out = out.reshape(*chosen.shape, -1).sum(-2)
    return leave(out, () if exchange else across.experts)


def _through_experts(
    rows: Float[Array, "tokens hidden"],
    expert_of_row: Int[Array, "tokens"],
    gate_up_proj: Float[Array, "experts hidden 2 ff"],
    down_proj: Float[Array, "experts ff hidden"],
) -> Float[Array, "tokens hidden"]:
    """Each row through its expert; zeros where that is past the last one."""
    order = jnp.argsort(expert_of_row)
    group_sizes = jnp.bincount(expert_of_row, length=len(gate_up_proj))
    rows, order, group_sizes = alike(rows, order, group_sizes)
    in_order = rows.at[order].get(unique_indices=True)
    out = grouped_mlp(in_order, gate_up_proj, down_proj, group_sizes)
    return jnp.zeros_like(out).at[order].set(out, unique_indices=True)


def _exchanged(
    rows: Float[Array, "tokens hidden"],
    expert_of_row: Int[Array, "tokens"],
    gate_up_proj: Float[Array, "experts hidden 2 ff"],
    down_proj: Float[Array, "experts ff hidden"],
    axes: Axes,
) -> Float[Array, "tokens hidden"]:
    """Each row through its expert, on whichever device along the mesh axes that is.

    Shapes are static, and how many rows one device has for another isn't: so they go in rounds,
    each with the same room for every pair of devices. Where routing is balanced one is enough.
    """
    devices = lax.axis_size(axes)
    room = min(ceil(SLACK * len(rows) / devices), len(rows))
    owner = expert_of_row // len(gate_up_proj)
    counts = jnp.bincount(owner, length=devices)
    route = _Route(
        order=jnp.argsort(owner),
        expert=expert_of_row % len(gate_up_proj),
        start=jnp.cumsum(counts) - counts,
        count=counts,
        axes=axes,
        room=room,
    )
    route, rows = alike(route, rows)
    rounds = lax.pmax(jnp.max(-(-counts // room)), axes)
    first = _round(jnp.int32(0), rows, gate_up_proj, down_proj, route)
    return first + _later_rounds(rounds, rows, gate_up_proj, down_proj, route)


class _Route(eqx.Module):
    """Which rows go where: sorted by device, its rows begin at `start` of `order`, `count` in all;
    `expert` is each row's, counted on its device. A round has `room` for each device."""

    order: Int[Array, "tokens"]
    expert: Int[Array, "tokens"]
    start: Int[Array, "devices"]
    count: Int[Array, "devices"]
    axes: Axes = eqx.field(static=True)
    room: int = eqx.field(static=True)


def _round(number, rows, gate_up_proj, down_proj, route):
    """What the rows of a round get back, and zeros for all others."""
    nth = number * route.room + jnp.arange(route.room)  # of the rows for a device
    real = nth < route.count[:, None]
    row = route.order.at[route.start[:, None] + nth].get(mode="clip")
    sent = jnp.where(real[..., None], rows[row], 0)
    expert = jnp.where(real, route.expert[row], len(gate_up_proj))

    def swap(x):
        return lax.all_to_all(x, route.axes, split_axis=0, concat_axis=0, tiled=True)

    received, expert = kept(swap(sent)), swap(expert)
    out = _through_experts(
        received.reshape(-1, rows.shape[-1]), expert.reshape(-1), gate_up_proj, down_proj
    )
    back = swap(out.reshape(sent.shape))
    return jnp.zeros_like(rows).at[row].add(jnp.where(real[..., None], back, 0))


# How many rounds are needed is known at run time only: such a loop has no derivative of its own.
@jax.custom_vjp
def _later_rounds(rounds, rows, gate_up_proj, down_proj, route):
    def visit(number, out):
        return out + _round(number, rows, gate_up_proj, down_proj, route)

    return lax.fori_loop(1, rounds, visit, jnp.zeros_like(rows))


def _later_rounds_forward(rounds, *inputs):
    return _later_rounds(rounds, *inputs), (rounds, *inputs)


def _later_rounds_backward(residuals, d_out):
    rounds, *inputs, route = residuals

    def visit(number, gradients):
        _, vjp = jax.vjp(lambda *x: _round(number, *x, route=route), *inputs)
        return jax.tree.map(jnp.add, gradients, vjp(d_out))

    gradients = lax.fori_loop(1, rounds, visit, tuple(jnp.zeros_like(x) for x in inputs))
    return None, *gradients, None


_later_rounds.defvjp(_later_rounds_forward, _later_rounds_backward)
