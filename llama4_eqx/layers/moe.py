"""The mixture of experts: each token runs through its `top_k` experts and a shared one."""

from dataclasses import replace
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from llama4_eqx.layers.activation import Activation, silu
from llama4_eqx.layers.context import PLAIN, Execution
from llama4_eqx.layers.dispatch import routed_experts
from llama4_eqx.layers.initializers import normal
from llama4_eqx.layers.interfaces import FeedForward
from llama4_eqx.layers.linear import linear
from llama4_eqx.layers.mlp import MLP
from llama4_eqx.layers.unstacked import unstacked_weight
from llama4_eqx.run_time_checks import refuse_if


class Experts(eqx.Module):
    """A gated network for each expert; a checkpoint joins gate and up into one tensor."""

    gate_proj: Float[Array, "experts hidden ff"]
    up_proj: Float[Array, "experts hidden ff"]
    down_proj: Float[Array, "experts ff hidden"]
    activation: Activation = eqx.field(static=True)

    def __init__(
        self,
        experts: int,
        hidden: int,
        ff: int,
        *,
        activation: Activation = silu,
        init_std: float,
        dtype: DTypeLike,
        key: PRNGKeyArray,
    ) -> None:
        gate_key, up_key, down_key = jax.random.split(key, 3)
        init = normal(init_std)
        self.gate_proj = init(gate_key, (experts, hidden, ff), dtype)
        self.up_proj = init(up_key, (experts, hidden, ff), dtype)
        self.down_proj = init(down_key, (experts, ff, hidden), dtype)
        self.activation = activation

    def __call__(
        self,
        x: Float[Array, "*batch hidden"],
        router_weights: Float[Array, "*batch top_k"],
        expert_ids: Int[Array, "*batch top_k"],
        *,
        execution: Execution = PLAIN,
    ) -> Float[Array, "*batch hidden"]:
        """`Σ_k expert_k(router_weight_k · x)` over each token's experts."""
        tokens, router_weights, expert_ids = (
            t.reshape(-1, t.shape[-1]) for t in (x, router_weights, expert_ids)
        )
        out = routed_experts(
            tokens,
            router_weights,
            expert_ids,
            self.gate_proj,
            self.up_proj,
            self.down_proj,
            execution.mesh_axes,
            execution.backends.experts,
            self.activation,
        )
        return out.reshape(x.shape)

    def unstacked(self) -> "Experts":
        """The same experts with each one's weights as separate arrays; see `UnstackedWeight`."""
        return eqx.tree_at(_weights, self, tuple(map(unstacked_weight, _weights(self))))


class MoE(FeedForward):
    """`shared(x) + Σ_k expert_k(score(logits)_k · x)` over the `top_k` largest router logits.

    The router's weight scales the expert's *input*, which differs from scaling its output; weights
    are not renormalised; every token reaches all its experts, none is dropped.

    `score` is the sigmoid; another function of all experts' logits, such as `jax.nn.softmax`, may
    take its place. `expert_bias`, which Llama 4 doesn't have, is added to the scores for the choice
    of experts alone; see `llama4_eqx.training.expert_bias`.
    """

    router: Float[Array, "experts hidden"]
    experts: Experts
    shared_expert: MLP
    expert_bias: Float[Array, "experts"] | None
    top_k: int = eqx.field(static=True)
    score: Activation = eqx.field(static=True)
    takes_row_shards: ClassVar[bool] = True
    sites: ClassVar[dict[str, str]] = {
        "router_logits": "*batch seq experts",
        "expert_ids": "*batch seq top_k",
        "router_weights": "*batch seq top_k",
        "expert_out": "*batch seq hidden",
    }

    def __init__(
        self,
        experts: int,
        hidden: int,
        ff: int,
        *,
        top_k: int,
        init_std: float,
        dtype: DTypeLike,
        key: PRNGKeyArray,
    ) -> None:
        router_key, experts_key, shared_key = jax.random.split(key, 3)
        self.router = normal(init_std)(router_key, (experts, hidden), dtype)
        self.experts = Experts(experts, hidden, ff, init_std=init_std, dtype=dtype, key=experts_key)
        self.shared_expert = MLP(hidden, ff, init_std=init_std, dtype=dtype, key=shared_key)
        self.expert_bias = None
        self.top_k = top_k
        self.score = jax.nn.sigmoid

    def __call__(
        self, x: Float[Array, "*batch hidden"], *, execution: Execution = PLAIN
    ) -> tuple[Float[Array, "*batch hidden"], Float[Array, "*batch experts"]]:
        mesh_axes, sites = execution.mesh_axes, execution.sites
        router, bias = self.router, self.expert_bias
        router = mesh_axes.all_gather(router, mesh_axes.experts, axis=0)
        bias = None if bias is None else mesh_axes.all_gather(bias, mesh_axes.experts, axis=0)
        router_logits = sites("router_logits", linear(x, router))
        scores = self.score(router_logits.astype(jnp.float32))
        expert_ids = sites("expert_ids", top_k_experts(router_logits, self.top_k, bias, self.score))
        if sites.probe.edits("expert_ids"):
            expert_ids += refuse_if(
                jnp.any((expert_ids < 0) | (expert_ids >= len(router))),
                f"An edit chose an expert that isn't there: the layer has 0 to {len(router) - 1}.",
            )
        router_weights = jnp.take_along_axis(scores, expert_ids, axis=-1).astype(x.dtype)
        router_weights = sites("router_weights", router_weights)
        # Under tensor parallelism routed and shared experts both produce partial sums: all-reduce
        # them together.
        x, router_weights, expert_ids = (
            mesh_axes.gather_rows(rows, mesh_axes.ff) for rows in (x, router_weights, expert_ids)
        )
        partial_sums = Execution(replace(mesh_axes, ff=()), execution.backends)
        routed = self.experts(x, router_weights, expert_ids, execution=partial_sums)
        shared, _ = self.shared_expert(x, execution=partial_sums)
        if sites.probe.visits("expert_out"):
            routed = sites("expert_out", mesh_axes.sum_rows(routed, mesh_axes.ff))
            return mesh_axes.sum_rows(shared, mesh_axes.ff) + routed, router_logits
        return mesh_axes.sum_rows(shared + routed, mesh_axes.ff), router_logits


def top_k_experts(
    router_logits: Float[Array, "*batch experts"],
    top_k: int,
    expert_bias: Float[Array, "#*batch experts"] | None,
    score: Activation = jax.nn.sigmoid,
) -> Int[Array, "*batch top_k"]:
    """Each token's experts: those of the largest logits, or of the largest biased scores."""
    ranked = router_logits
    if expert_bias is not None:
        ranked = score(router_logits.astype(jnp.float32)) + expert_bias
    return jax.lax.top_k(ranked, top_k)[1]


def experts_weights(tree: PyTree) -> PyTree:
    """True at the arrays of experts that nothing but `Experts` uses, False at all others."""

    def is_moe(node: PyTree) -> bool:
        return isinstance(node, MoE)

    def mark(node: PyTree) -> PyTree:
        nowhere = jax.tree.map(lambda _: False, node)
        if type(node) is not MoE or type(node.experts) is not Experts:
            return nowhere
        if not all(map(eqx.is_array, _weights(node.experts))):
            return nowhere
        return eqx.tree_at(lambda moe: _weights(moe.experts), nowhere, (True,) * 3)

    return jax.tree.map(mark, tree, is_leaf=is_moe)


def _weights(experts: Experts) -> tuple[PyTree, PyTree, PyTree]:
    return experts.gate_proj, experts.up_proj, experts.down_proj
