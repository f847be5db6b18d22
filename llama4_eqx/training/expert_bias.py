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

from llama4_eqx.argument_checks import check_type
from llama4_eqx.decoder_block import DecoderBlock
from llama4_eqx.layers.moe import MoE
from llama4_eqx.model import Llama4


def with_expert_bias(model: Llama4) -> Llama4:
    """The model with a zero bias for each expert."""
    check_type("model", model, Llama4)

    def zeros(moe: MoE) -> Array:
        return jnp.zeros(moe.router.shape[:-1], jnp.float32)

    return _with_biases(model, [zeros(moe) for moe in _moes(model)])


def without_expert_bias(model: Llama4) -> Llama4:
    """The model without biases, as Llama 4 is released."""
    check_type("model", model, Llama4)
    return _with_biases(model, [None for _ in _moes(model)])


def get_expert_bias(model: Llama4) -> Float[Array, "layers experts"] | None:
    """The biases in the order of `Output.router_logits`; None for a model without them."""
    check_type("model", model, Llama4)
    parts = []
    for block in model.decoder.blocks:
        biases = [moe.expert_bias for moe in _moes(block) if moe.expert_bias is not None]
        if biases:
            by_layer = jnp.stack(biases, axis=-2)
            parts.append(by_layer.reshape(-1, by_layer.shape[-1]))
    return jnp.concatenate(parts) if parts else None


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
    if load.shape != biases.shape:
        raise ValueError(
            f"load must have the shape {biases.shape}, layers and experts, but has {load.shape}."
        )
    moved = biases + rate * jnp.sign(load.mean(-1, keepdims=True) - load)
    new = []
    for block in model.decoder.blocks:
        cycle = len(_moes(block))
        count = cycle * (block.repeats or 1)
        of_block, moved = moved[:count], moved[count:]
        new += [of_block[i] if block.repeats is None else of_block[i::cycle] for i in range(cycle)]
    return _with_biases(model, new)


def _is_moe(node: Any) -> bool:
    return isinstance(node, MoE)


def _moes(module: Llama4 | DecoderBlock) -> list[MoE]:
    """The MoEs of each block in order; those of a stacked block stand for all its repeats."""
    return [node for node in jax.tree.leaves(module, is_leaf=_is_moe) if _is_moe(node)]


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
