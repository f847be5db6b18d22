"""Experts that stay in the stack that a scan runs over."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama4_eqx as l4
from llama4_eqx.layers.backends import Backends
from llama4_eqx.layers.grouped import grouped_mlp
from llama4_eqx.layers.moe import MoE, experts_weights
from llama4_eqx.layers.scanned import ScannedWeight
from tests.toys import MAVERICK, TOYS, random_tokens, relative_error

pytestmark = pytest.mark.slow

EXPERTS, HIDDEN, FF, LAYERS = 8, 16, 24, 3


def stacks(dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (HIDDEN, FF), (HIDDEN, FF), (FF, HIDDEN)
    return [
        jax.random.normal(key, (LAYERS, EXPERTS, *shape), dtype) / 4
        for key, shape in zip(keys, shapes, strict=True)
    ]


def run(stacks, rows, sizes, layer, backend=None):
    weights = [ScannedWeight(stack, layer) for stack in stacks]
    return grouped_mlp(rows, *weights, sizes, backend=backend)


@pytest.mark.parametrize("backend", [None, "dense"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", [(1,), (0, 5, 0, 2, 9), (40, 0, 0, 0, 0, 0, 0, 3)])
def test_one_layer_of_a_stack(sizes, dtype, backend):
    sizes = jnp.array(sizes + (0,) * (EXPERTS - len(sizes)))
    rows = jax.random.normal(jax.random.key(1), (int(sizes.sum()) + 2, HIDDEN), dtype)
    layer, weights = jnp.asarray(1), stacks(jnp.dtype(dtype))
    own = [stack[1] for stack in weights]
    truth = grouped_mlp(rows, *own, sizes, backend="dense")
    tolerance = 1e-5 if dtype == "float32" else 4e-2  # sums of numbers of 8 bits
    out = jax.jit(run, static_argnums=4)(weights, rows, sizes, layer, backend)
    assert relative_error(out, truth) < tolerance

    def loss(weights, rows):
        return jnp.sum(jnp.sin(run(weights, rows, sizes, layer, backend).astype(jnp.float32)))

    def true_loss(own, rows):
        out = grouped_mlp(rows, *own, sizes, backend="dense")
        return jnp.sum(jnp.sin(out.astype(jnp.float32)))

    d_stacks, d_rows = jax.grad(loss, (0, 1))(weights, rows)
    d_own, d_rows_truth = jax.grad(true_loss, (0, 1))(own, rows)
    assert relative_error(d_rows, d_rows_truth) < tolerance
    for ours, theirs in zip(d_stacks, d_own, strict=True):
        assert relative_error(ours[1], theirs) < tolerance
        assert not np.asarray(ours[0]).any()


@pytest.mark.parametrize("name", ["scout", "maverick", "top-2"])
def test_decoding_is_that_of_layers_apart(name):
    model = l4.Llama4(l4.Llama4Config(TOYS[name]), key=jax.random.key(0))
    tokens = random_tokens(3, 12)
    for backends in (Backends(), Backends(experts="dense")):
        out = model(tokens, cache=model.empty_cache((3,), 20), backends=backends)
        apart = model.unstacked()
        truth = apart(tokens, cache=apart.empty_cache((3,), 20), backends=backends)
        assert relative_error(out.logits, truth.logits) < 1e-5


def test_gradients_through_a_cache():
    model = l4.Llama4(l4.Llama4Config(MAVERICK), key=jax.random.key(0))
    tokens = random_tokens(2, 9)

    def loss(model, cached):
        cache = model.empty_cache((2,), 12) if cached else None
        return jnp.mean(jnp.sin(model(tokens, cache=cache).logits))

    ours, truth = (eqx.filter_grad(loss)(model, cached) for cached in (True, False))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(truth), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max() + 1e-6))


def test_forward_mode_through_a_cache():
    """With a backend that has it, as without a cache."""
    model = l4.Llama4(l4.Llama4Config(MAVERICK), key=jax.random.key(0))
    tokens, backends = random_tokens(1, 5), Backends("dense", "dense")

    def logits(scale, cached):
        cache = model.empty_cache((1,), 8) if cached else None
        scaled = eqx.tree_at(lambda m: m.embed_tokens, model, model.embed_tokens * scale)
        return scaled(tokens, cache=cache, backends=backends).logits

    ours, truth = (
        jax.jvp(lambda scale, c=cached: logits(scale, c), (1.0,), (1.0,))[1]
        for cached in (True, False)
    )
    assert relative_error(ours, truth) < 1e-5


def test_a_step_copies_no_layers_experts():
    config = dataclasses.replace(
        TOYS["scout"], intermediate_size=256, num_local_experts=32, num_hidden_layers=12
    )
    model = l4.Llama4(l4.Llama4Config(config), key=jax.random.key(0))
    cache = model.empty_cache((1,), 16)
    step = eqx.filter_jit(lambda model, token, cache: model(token, cache=cache).logits)
    lowered = step.lower(model, random_tokens(1, 1), cache)
    experts = 3 * 32 * config.hidden_size * 256 * 4
    assert lowered.compile().compiled.memory_analysis().temp_size_in_bytes < experts / 4


def test_parts_of_a_users_own_get_arrays():
    class Mine(MoE):
        pass

    plain = MoE(4, 8, 16, top_k=1, init_std=0.1, dtype=jnp.float32, key=jax.random.key(0))
    mine = Mine(4, 8, 16, top_k=1, init_std=0.1, dtype=jnp.float32, key=jax.random.key(0))
    assert sum(jax.tree.leaves(experts_weights((plain, mine)))) == 3
    assert sum(jax.tree.leaves(experts_weights(mine))) == 0
