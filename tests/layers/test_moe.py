"""The mixture of experts against `transformers`' block, and its rules one by one."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

from llama4_eqx.layers import MLP, MoE
from llama4_eqx.layers.moe import top_k_experts
from tests.toys import TOYS, as_torch, relative_error


def pair(config):
    """`transformers`' block with random weights, and ours with the same."""
    torch.manual_seed(0)
    theirs = Llama4TextMoe(transformers.Llama4TextConfig(**config.to_hf()))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
    ours = MoE(
        config.num_local_experts,
        config.hidden_size,
        config.intermediate_size,
        top_k=config.num_experts_per_tok,
        init_std=0.1,
        dtype=jnp.float32,
        key=jax.random.key(0),
    )
    weights = {name: jnp.asarray(p.detach().numpy()) for name, p in theirs.named_parameters()}
    gate, up = jnp.split(weights["experts.gate_up_proj"], 2, -1)
    shared = (
        weights[f"shared_expert.{name}.weight"] for name in ("gate_proj", "up_proj", "down_proj")
    )
    ours = eqx.tree_at(
        lambda m: (m.router, *jax.tree.leaves(m.experts), *jax.tree.leaves(m.shared_expert)),
        ours,
        (weights["router.weight"], gate, up, weights["experts.down_proj"], *shared),
    )
    return theirs, ours


@pytest.mark.parametrize("name", ["scout", "top-2"])
def test_output_and_logits_are_transformers(name):
    config = TOYS[name]
    theirs, ours = pair(config)
    x = jax.random.normal(jax.random.key(1), (2, 9, config.hidden_size))
    with torch.no_grad():
        truth, logits = theirs(as_torch(x))
    out, router_logits = jax.jit(lambda m, x: m(x))(ours, x)
    assert relative_error(out.reshape(truth.shape), truth) < 1e-5
    assert relative_error(router_logits.reshape(logits.shape), logits) < 1e-5


def test_a_bias_changes_the_choice_and_not_the_weights():
    logits = jnp.array([[2.0, 1.0, -1.0, 0.0]])
    ids = top_k_experts(logits, 2, None)
    np.testing.assert_array_equal(ids, [[0, 1]])
    ids = top_k_experts(logits, 2, jnp.array([0.0, -5.0, 5.0, 0.0]))
    np.testing.assert_array_equal(ids, [[2, 0]])


@pytest.mark.parametrize("biased", [False, True])
def test_another_activation_and_score(biased):
    """GELU, and softmax over all experts, against a loop over the tokens; and their gradients."""
    moe = MoE(4, 16, 24, top_k=2, init_std=0.4, dtype=jnp.float32, key=jax.random.key(0))
    for module in (moe.experts, moe.shared_expert):
        object.__setattr__(module, "activation", jax.nn.gelu)
    object.__setattr__(moe, "score", jax.nn.softmax)
    bias = jnp.array([0.0, 0.9, 0.0, -0.9]) if biased else None
    moe = eqx.tree_at(lambda m: m.expert_bias, moe, bias, is_leaf=lambda node: node is None)
    x = jax.random.normal(jax.random.key(1), (7, 16))

    def by_hand(moe, x):
        rows = []
        for row in x:
            scores = jax.nn.softmax(moe.router @ row)
            ranked = scores if bias is None else scores + bias
            shared = moe.shared_expert
            inner = jax.nn.gelu(shared.gate_proj @ row) * (shared.up_proj @ row)
            out = shared.down_proj @ inner
            for expert in jax.lax.top_k(ranked, 2)[1]:
                scaled, all = row * scores[expert], moe.experts
                inner = jax.nn.gelu(scaled @ all.gate_proj[expert])
                out += (inner * (scaled @ all.up_proj[expert])) @ all.down_proj[expert]
            rows.append(out)
        return jnp.stack(rows)

    def ours(moe, x):
        return moe(x)[0]

    assert relative_error(ours(moe, x), by_hand(moe, x)) < 1e-5
    gradients = [
        eqx.filter_grad(lambda both, f=f: jnp.sum(f(*both) ** 2))((moe, x)) for f in (ours, by_hand)
    ]
    for a, b in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()))


def test_a_dense_network_has_no_router():
    mlp = MLP(8, 16, init_std=0.3, dtype=jnp.float32, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (3, 8))
    out, router_logits = mlp(x)
    gate, up, down = (as_torch(w) for w in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    truth = (torch.nn.functional.silu(as_torch(x) @ gate.T) * (as_torch(x) @ up.T)) @ down.T
    assert relative_error(out, truth) < 1e-5
    assert router_logits is None
