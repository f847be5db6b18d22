"""Sharded = whole, on eight fake devices, for every preset; and rules that don't fit."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

import llama4_eqx as l4
from llama4_eqx.losses import next_token_loss
from llama4_eqx.sharding import DATA, EXPERT, FSDP, TENSOR, batch_sharding, shard, shardings
from llama4_eqx.train import init_train_state, make_train_step
from tests.toys import MULTIMODAL, SCOUT, random_tokens, relative_error

TOLERANCE = 1e-5
# A scanned cycle of a chunk-local and a global layer: quick to compile.
SMALL = replace(SCOUT, num_hidden_layers=4, no_rope_layers=(1, 0, 1, 0))
PRESETS = {
    "data": ({"data": 8}, DATA),
    "fsdp-expert": ({"fsdp": 2, "expert": 4}, FSDP | EXPERT),
    "fsdp-tensor": ({"fsdp": 4, "tensor": 2}, FSDP | TENSOR),
    "data-fsdp": ({"data": 2, "fsdp": 4}, FSDP | {"batch": ("data", "fsdp")}),
}


def make_mesh(sizes):
    names = tuple(sizes)
    return jax.make_mesh(tuple(sizes.values()), names, axis_types=(AxisType.Auto,) * len(names))


def loss_function(model, tokens, key):
    loss = next_token_loss(model, tokens, key=key).token
    return loss.total, loss.tokens, None


def largest_difference(a, b) -> float:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(relative_error(x, y) for x, y in pairs)


@pytest.fixture(scope="module")
def truth():
    """Logits, and two training steps, on one device."""
    model, tokens = l4.Llama4(l4.Llama4Config(SMALL), key=jax.random.key(0)), random_tokens(8, 40)
    logits = eqx.filter_jit(lambda model, tokens: model(tokens).logits)(model, tokens)
    optimizer = optax.sgd(0.1, momentum=0.9)
    step = make_train_step(optimizer, loss_function, clip_norm=1.0)
    state = init_train_state(model, optimizer, key=jax.random.key(1))
    for _ in range(2):
        state, report = step(state, tokens)
    return logits, state.model, report.loss


@pytest.mark.parametrize(("sizes", "rules"), PRESETS.values(), ids=list(PRESETS))
def test_sharded_is_whole(truth, sizes, rules):
    """Logits, losses and weights after two steps; and every array stays where it was put."""
    mesh = make_mesh(sizes)
    model = l4.Llama4(l4.Llama4Config(SMALL), key=jax.random.key(0))
    tokens = jax.device_put(random_tokens(8, 40), batch_sharding(mesh, rules))
    sharded = shard(model, mesh, rules)
    logits = eqx.filter_jit(lambda model, tokens: model(tokens).logits)(sharded, tokens)
    assert relative_error(logits, truth[0]) < TOLERANCE

    optimizer = optax.sgd(0.1, momentum=0.9)
    step = make_train_step(optimizer, loss_function, clip_norm=1.0)
    state = init_train_state(model, optimizer, key=jax.random.key(1))
    state = shard(state, mesh, rules)
    places = shardings(state, mesh, rules)
    for _ in range(2):
        state, report = step(state, tokens)
    assert relative_error(report.loss, truth[2]) < TOLERANCE
    assert largest_difference(state.model, truth[1]) < TOLERANCE
    kept = jax.tree.map(
        lambda leaf, place: leaf.sharding.is_equivalent_to(place, leaf.ndim),
        eqx.filter(state, eqx.is_array),
        places,
    )
    assert all(jax.tree.leaves(kept))


def test_each_device_has_its_share():
    """Of full-size Scout, by its shapes."""
    model = eqx.filter_eval_shape(l4.Llama4, l4.Llama4Config.scout(), key=jax.random.key(0))
    mesh = make_mesh({"fsdp": 2, "expert": 4})
    places = shardings(model, mesh, FSDP | EXPERT)
    whole = share = 0
    for leaf, place in zip(jax.tree.leaves(model), jax.tree.leaves(places), strict=True):
        whole += leaf.size
        share += jnp.prod(jnp.array(place.shard_shape(leaf.shape), float)).item()
    assert 1 / 8 < share / whole < 0.17
    experts = places.decoder.blocks.layers[0].feed_forward.experts
    assert experts.gate_up_proj.spec == PartitionSpec(None, ("expert",), ("fsdp",), None, None)
    assert places.vision_model.class_embedding.spec == PartitionSpec(("fsdp",))


def test_state_of_the_optimiser_lies_with_its_parameters():
    model = l4.Llama4(MULTIMODAL, key=jax.random.key(0))
    state = eqx.filter_eval_shape(optax.adamw(1e-3).init, eqx.filter(model, eqx.is_array))
    mesh = make_mesh({"fsdp": 2, "expert": 4})
    places = shardings(state, mesh, FSDP | EXPERT)
    of_model = shardings(model, mesh, FSDP | EXPERT)
    assert jax.tree.leaves(places[0].mu) == jax.tree.leaves(of_model)
    assert jax.tree.leaves(places[0].nu) == jax.tree.leaves(of_model)
    assert places[0].count.spec == PartitionSpec()


@pytest.mark.parametrize(
    ("sizes", "rules", "sentence"),
    [
        ({"expert": 8}, EXPERT, r"experts of 4 can't be cut among the 8 devices of expert"),
        ({"data": 8}, FSDP, r"hidden is to lie along fsdp, but the mesh has data"),
        (
            {"x": 2},
            {"hidden": "x", "ff": "x"},
            r"shared_expert\.gate_proj: both ff and hidden are to lie along x",
        ),
    ],
)
def test_rules_that_do_not_fit(sizes, rules, sentence):
    model = eqx.filter_eval_shape(l4.Llama4, l4.Llama4Config(SMALL), key=jax.random.key(0))
    with pytest.raises(ValueError, match=sentence):
        shardings(model, make_mesh(sizes), rules)
