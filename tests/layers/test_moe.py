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
    top, ids = top_k_experts(logits, 2, None)
    np.testing.assert_array_equal(ids, [[0, 1]])
    top, ids = top_k_experts(logits, 2, jnp.array([0.0, -5.0, 5.0, 0.0]))
    np.testing.assert_array_equal(ids, [[2, 0]])
    np.testing.assert_array_equal(top, [[-1.0, 2.0]])


def test_a_dense_network_has_no_router():
    mlp = MLP(8, 16, init_std=0.3, dtype=jnp.float32, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (3, 8))
    out, router_logits = mlp(x)
    gate, up, down = (as_torch(w) for w in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    truth = (torch.nn.functional.silu(as_torch(x) @ gate.T) * (as_torch(x) @ up.T)) @ down.T
    assert relative_error(out, truth) < 1e-5
    assert router_logits is None
