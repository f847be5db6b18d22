"""Load balancing without a loss term: a bias on the choice of experts, moved against their load.

Llama 4 as released doesn't have this: it is the method of https://arxiv.org/abs/2408.15664. The
bias changes which experts a token goes to and nothing else. It has no gradient, so leave it out of
`trainable`, for `init_train_state` as for the step, or weight decay moves it. A checkpoint has no
place for it, so remove it before saving; the router must then do without.

    model = with_expert_bias(model)
    trainable = select(model, "*", "!*.expert_bias")
    step = make_train_step(
        optimizer, loss, trainable=trainable,
        after_update=lambda model, metrics: update_expert_bias(model, metrics.aux.load),
    )
"""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llama4_eqx.layers.moe import MoE
from llama4_eqx.model import Llama4


def with_expert_bias(model: Llama4) -> Llama4:
    """The model with a zero bias for each expert."""

    def zeros(moe: MoE) -> Array:
        return jnp.zeros(moe.router.shape[:-1], jnp.float32)

    return _with_biases(model, [zeros(moe) for moe in _moes(model)])


def without_expert_bias(model: Llama4) -> Llama4:
    """The model without biases, as Llama 4 is released."""
    return _with_biases(model, [None for _ in _moes(model)])


def get_expert_bias(model: Llama4) -> Float[Array, "layers experts"] | None:
    """The biases in the order of `Output.router_logits`; None for a model without them."""
    moes, cycle = _moes(model), _moes_in_cycle(model)
    biases = [moe.expert_bias for moe in moes if moe.expert_bias is not None]
    if not biases:
        return None
    in_blocks, in_tail = biases[:cycle], biases[cycle:]
    parts = [jnp.stack(in_tail)] if in_tail else []
    if in_blocks:
        stacked = jnp.stack(in_blocks, axis=1)
        parts.insert(0, stacked.reshape(-1, stacked.shape[-1]))
    return jnp.concatenate(parts)


def update_expert_bias(
    model: Llama4, load: Float[Array, "layers experts"], *, rate: float = 1e-3
) -> Llama4:
    """The model with each bias raised by `rate` if the expert's load is below the mean of its
    layer, and lowered if above.

    `load` is that of `router_report`. Raises a `ValueError` for a model without biases.
    """
    biases = get_expert_bias(model)
    if biases is None:
        raise ValueError("The model has no expert bias: make one with with_expert_bias.")
    moved = biases + rate * jnp.sign(load.mean(-1, keepdims=True) - load)
    cycle = _moes_in_cycle(model)
    in_blocks = cycle * model.decoder.depth_of_stack
    new = [moved[i:in_blocks:cycle] for i in range(cycle)] + list(moved[in_blocks:])
    return _with_biases(model, new)


def _moes_in_cycle(model: Llama4) -> int:
    blocks = model.decoder.blocks
    layers = () if blocks is None else blocks.layers
    return sum(isinstance(layer.feed_forward, MoE) for layer in layers)


def _is_moe(node: Any) -> bool:
    return isinstance(node, MoE)


def _moes(model: Llama4) -> list[MoE]:
    """The MoEs of the repeating block, whose leaves are stacked, then those of the tail."""
    return [node for node in jax.tree.leaves(model, is_leaf=_is_moe) if _is_moe(node)]


def _with_biases(model: Llama4, biases: Sequence[Array | None]) -> Llama4:
    next_biases = iter(biases)

    def put(node: Any) -> Any:
        if not _is_moe(node):
            return node
        bias = next(next_biases)
        return eqx.tree_at(
            lambda moe: moe.expert_bias, node, bias, is_leaf=lambda leaf: leaf is None
        )

    return jax.tree.map(put, model, is_leaf=_is_moe)
