"""The mixture of experts: each token runs through its `top_k` experts and a shared one."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.nn.initializers import normal
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from llama4_eqx.layers.across import ALONE, Across, enter, leave
from llama4_eqx.layers.dispatch import dispatched
from llama4_eqx.layers.linear import linear
from llama4_eqx.layers.mlp import MLP


class Experts(eqx.Module):
    """A SwiGLU network per expert; `gate_up_proj[:, :, 0]` are the gates, `[:, :, 1]` the ups."""

    gate_up_proj: Float[Array, "experts hidden 2 ff"]
    down_proj: Float[Array, "experts ff hidden"]

    def __init__(
        self,
        experts: int,
        hidden: int,
        ff: int,
        *,
        init_std: float,
        dtype: DTypeLike,
        key: PRNGKeyArray,
    ) -> None:
        gate_up_key, down_key = jax.random.split(key)
        init = normal(init_std)
        self.gate_up_proj = init(gate_up_key, (experts, hidden, 2, ff), dtype)
        self.down_proj = init(down_key, (experts, ff, hidden), dtype)

    def __call__(
        self,
        x: Float[Array, "*batch hidden"],
        scores: Float[Array, "*batch top_k"],
        chosen: Int[Array, "*batch top_k"],
        *,
        across: Across = ALONE,
    ) -> Float[Array, "*batch hidden"]:
        """`Σ_k expert_k(score_k · x)`, of each token's `chosen` experts."""
        rows, scores, chosen = (t.reshape(-1, t.shape[-1]) for t in (x, scores, chosen))
        out = dispatched(rows, scores, chosen, self.gate_up_proj, self.down_proj, across)
        return out.reshape(x.shape)


class MoE(eqx.Module):
    """`shared(x) + Σ_k expert_k(sigmoid(logit_k) · x)` over the `top_k` largest router logits.

    The score scales the expert's *input*, which differs from scaling its output; scores are not
    renormalised; every token reaches all its experts, none is dropped.

    A `selection_bias`, which Llama 4 doesn't have, is added to the scores for the choice alone; see
    `llama4_eqx.balance`.
    """

    router: Float[Array, "experts hidden"]
    experts: Experts
    shared_expert: MLP
    selection_bias: Float[Array, "experts"] | None
    top_k: int = eqx.field(static=True)

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
        self.selection_bias = None
        self.top_k = top_k

    def __call__(
        self, x: Float[Array, "*batch hidden"], *, across: Across = ALONE
    ) -> tuple[Float[Array, "*batch hidden"], Float[Array, "*batch experts"]]:
        """The layer's output, and the router's logits."""
        router, bias = self.router, self.selection_bias
        router = across.gathered(router, across.experts, axis=0)
        bias = None if bias is None else across.gathered(bias, across.experts, axis=0)
        logits = linear(x, router)
        top_logits, chosen = choose_experts(logits, self.top_k, bias)
        scores = jax.nn.sigmoid(top_logits.astype(jnp.float32)).astype(x.dtype)
        # Both kinds of expert may have but a part of their inner features: one sum serves for both.
        x, ff, across = enter(x, across.ff), across.ff, replace(across, ff=())
        routed = self.experts(x, scores, chosen, across=across)
        return leave(self.shared_expert(x, across=across) + routed, ff), logits


def choose_experts(
    logits: Float[Array, "*batch experts"],
    top_k: int,
    selection_bias: Float[Array, "#*batch experts"] | None,
) -> tuple[Float[Array, "*batch top_k"], Int[Array, "*batch top_k"]]:
    """The logits of each token's experts, and which they are."""
    if selection_bias is None:
        top_logits, chosen = jax.lax.top_k(logits, top_k)
        return top_logits, chosen
    biased = jax.nn.sigmoid(logits.astype(jnp.float32)) + selection_bias
    _, chosen = jax.lax.top_k(biased, top_k)
    return jnp.take_along_axis(logits, chosen, axis=-1), chosen
