"""Sharded = whole, on eight fake devices, for every preset; and rules that don't fit."""

import math
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

import llama4_eqx as l4
from llama4_eqx.distributed import (
    CONTEXT,
    DATA,
    EXPERT_ALL_TO_ALL,
    EXPERT_REPLICATED_TOKENS,
    FSDP,
    SEQUENCE,
    TENSOR,
    abstract_sharded,
    batch_sharding,
    collectives,
    init_sharded,
    shard,
    shardings,
    unshard,
)
from llama4_eqx.layers.collectives import MeshAxes
from llama4_eqx.layers.dispatch import routed_experts
from llama4_eqx.lowering import lower
from llama4_eqx.training import LoRA, init_train_state, make_train_step, next_token_loss, select
from tests.toys import MULTIMODAL, SCOUT, random_tokens, relative_error

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
# A scanned cycle of a chunk-local and a global layer: quick to compile.
SMALL = replace(SCOUT, num_hidden_layers=4, no_rope_layers=(1, 0, 1, 0))
PRESETS = {
    "data": ({"data": 8}, DATA),
    "fsdp-expert": ({"fsdp": 2, "expert": 4}, FSDP | EXPERT_REPLICATED_TOKENS),
    "fsdp-tensor": ({"fsdp": 4, "tensor": 2}, FSDP | TENSOR),
    "exchange": ({"fsdp": 2, "expert": 2, "tensor": 2}, FSDP | TENSOR | EXPERT_ALL_TO_ALL),
    "sequence": (
        {"fsdp": 2, "context": 2, "tensor": 2},
        FSDP | CONTEXT | TENSOR | SEQUENCE,
    ),
    "context": ({"data": 2, "tensor": 2, "context": 2}, DATA | TENSOR | CONTEXT),
}


def make_mesh(sizes):
    names = tuple(sizes)
    return jax.make_mesh(tuple(sizes.values()), names, axis_types=(AxisType.Auto,) * len(names))


def loss_function(model, tokens, key):
    loss = next_token_loss(model, tokens, key=key).token
    return loss.total, loss.num_tokens, None


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
        state, metrics = step(state, tokens)
    return logits, state.model, metrics.loss


@pytest.mark.parametrize(("sizes", "rules"), PRESETS.values(), ids=list(PRESETS))
def test_sharded_is_whole(truth, sizes, rules, capfd):
    """Logits, losses and weights after two steps; and every array stays where it was put, without
    the compiler's warning that it had to copy one whole."""
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
        state, metrics = step(state, tokens)
    assert relative_error(metrics.loss, truth[2]) < TOLERANCE
    assert largest_difference(state.model, truth[1]) < TOLERANCE
    kept = jax.tree.map(
        lambda leaf, place: leaf.sharding.is_equivalent_to(place, leaf.ndim),
        eqx.filter(state, eqx.is_array),
        places,
    )
    assert all(jax.tree.leaves(kept))
    assert "rematerialization" not in capfd.readouterr().err


@pytest.mark.parametrize(("sizes", "rules"), PRESETS.values(), ids=list(PRESETS))
def test_what_is_held_and_sent(sizes, rules):
    """Of a training step, as compiled: no device gets all tokens, or the experts of others."""
    mesh, rows, seq = make_mesh(sizes), 16, 48
    optimizer = optax.sgd(0.1, momentum=0.9)

    def make():
        model = l4.Llama4(l4.Llama4Config(SMALL), key=jax.random.key(0))
        return init_train_state(model, optimizer, key=jax.random.key(1))

    state = abstract_sharded(make, mesh, rules)
    tokens = jax.ShapeDtypeStruct((rows, seq), jnp.int32, sharding=batch_sharding(mesh, rules))
    program = (
        make_train_step(optimizer, loss_function, clip_norm=1.0).lower(state, tokens).compile()
    )

    planned = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * 4
        for leaf in jax.tree.leaves((state.model, state.opt_state, tokens))
        if isinstance(leaf, jax.ShapeDtypeStruct)
    )
    assert program.memory_analysis().argument_size_in_bytes == pytest.approx(planned, rel=0.05)

    gathered = [one for one in collectives(program, mesh) if one.kind == "all-gather"]
    rows_gathered = {"fsdp", "context", "expert"} | {*rules["residual"]}
    assert {name for one in gathered for name in one.axes} <= rows_gathered
    sizes = {math.prod(one.shape): one.axes for one in gathered}
    hidden, experts = SMALL.hidden_size, SMALL.num_local_experts
    assert max(sizes, default=0) < rows * seq * hidden
    if "experts" in rules:
        assert max(sizes) < experts * hidden * SMALL.intermediate_size
        # Of the experts' axis only the router, and the ids of tokens for the embedding.
        small = [size for size, axes in sizes.items() if "expert" in axes]
        assert max(small) <= max(experts * hidden, rows * seq)


@pytest.mark.parametrize(("seq", "layers"), [(48, 1), (40, 2)])
def test_only_cut_chunks_need_others_keys(seq, layers):
    """On each of two devices three chunks of eight, or two and a half."""
    sizes, rules = PRESETS["context"]
    mesh, model = make_mesh(sizes), l4.Llama4(l4.Llama4Config(SMALL), key=jax.random.key(0))
    tokens, sharded = random_tokens(8, seq), shard(model, mesh, rules)

    def loss(model, tokens):
        return next_token_loss(model, tokens).token.total

    gradient = eqx.filter_jit(eqx.filter_grad(loss))
    assert largest_difference(gradient(sharded, tokens), gradient(model, tokens)) < TOLERANCE
    program = lower(lambda model, tokens: model(tokens).logits, sharded, tokens).compile()
    keys = [
        one for one in collectives(program, mesh) if one.axes == ("context",) and len(one.shape) > 2
    ]
    assert len(keys) == 2 * layers  # of a cycle's two; keys and values


def test_low_rank_updates():
    """Two steps of them, on a mesh that cuts the weights in every way."""
    sizes, rules = PRESETS["exchange"]
    mesh, model = make_mesh(sizes), l4.Llama4(l4.Llama4Config(SMALL), key=jax.random.key(0))
    lora = LoRA(model, "decoder.*_proj", "embed_tokens", rank=2, key=jax.random.key(1))
    # Steps ten times as large multiply rounding: 1.6e-6 becomes 6e-6 to 2e-5, by how XLA compiles.
    optimizer, results = optax.sgd(3.0), []
    for place in (lambda tree: tree, lambda tree: shard(tree, mesh, rules)):
        placed = place(jax.tree.map(jnp.copy, lora))
        trainable = select(placed, "updates.*")
        step = make_train_step(
            optimizer,
            lambda lora, *rest: loss_function(lora.attached(), *rest),
            trainable=trainable,
        )
        state = place(
            init_train_state(placed, optimizer, key=jax.random.key(2), trainable=trainable)
        )
        for _ in range(2):
            state, metrics = step(state, random_tokens(8, 40))
        results.append((metrics.loss, state.model.updates))
    assert largest_difference(results[1], results[0]) < TOLERANCE


def test_dropout_differs_among_devices():
    """Equal rows on different devices; and the same again from the same key."""
    sizes, rules = PRESETS["exchange"]
    config = l4.Llama4Config(replace(SMALL, attention_dropout=0.5))
    model = shard(l4.Llama4(config, key=jax.random.key(0)), make_mesh(sizes), rules)
    tokens = jnp.tile(random_tokens(1, 40), (4, 1))
    run = eqx.filter_jit(lambda model, tokens, key: model(tokens, key=key).logits)
    first, again = (run(model, tokens, jax.random.key(1)) for _ in range(2))
    assert jnp.array_equal(first, again)
    assert len({row.tobytes() for row in np.asarray(first)}) == 4
    assert relative_error(run(model, tokens, None)[1:], run(model, tokens, None)[:-1]) < TOLERANCE


@pytest.mark.parametrize(("sizes", "rules"), PRESETS.values(), ids=list(PRESETS))
def test_sharded_generation_is_whole(sizes, rules):
    """Prompts of different lengths, over several chunks; and where there is more to go wrong, a
    prompt that can't be cut evenly, and one row for many devices."""
    model = l4.Llama4(l4.Llama4Config(SMALL), key=jax.random.key(0))
    sharded = shard(model, make_mesh(sizes), rules)
    shapes = [(8, 12), (1, 13)] if len(sizes) > 2 else [(8, 12)]
    for rows, seq in shapes:
        tokens = random_tokens(rows, seq)
        mask = jnp.arange(seq) >= jnp.arange(rows)[:, None]
        truth, new = (
            l4.generate(one, tokens, mask=mask, max_new_tokens=20) for one in (model, sharded)
        )
        assert jnp.array_equal(new, truth)


def test_unsharded_again():
    model = l4.Llama4(l4.Llama4Config(SMALL), key=jax.random.key(0))
    sizes, rules = PRESETS["exchange"]
    assert eqx.tree_equal(unshard(shard(model, make_mesh(sizes), rules)), model)


def test_born_sharded():
    mesh, rules = make_mesh({"fsdp": 2, "expert": 4}), FSDP | EXPERT_REPLICATED_TOKENS
    model = l4.Llama4(l4.Llama4Config(SMALL), key=jax.random.key(0))
    born = init_sharded(lambda: l4.Llama4(model.config, key=jax.random.key(0)), mesh, rules)
    there = shard(model, mesh, rules)
    assert jax.tree.structure(born) == jax.tree.structure(there)
    for ours, theirs in zip(jax.tree.leaves(born), jax.tree.leaves(there), strict=True):
        assert ours.sharding == theirs.sharding
        assert relative_error(ours, theirs) < TOLERANCE
    cache = init_sharded(lambda: born.empty_cache((8,), 32), mesh, rules)
    assert cache.blocks[0][0].k.sharding.shard_shape(cache.blocks[0][0].k.shape)[1] == 4


@pytest.mark.parametrize("crowded", [False, True])
def test_exchange_drops_no_token(crowded):
    """Also where all tokens of all devices want one expert, and one round isn't enough."""
    keys = jax.random.split(jax.random.key(0), 6)
    x = jax.random.normal(keys[0], (32, 16))
    router_weights = jax.random.uniform(keys[1], (32, 2))
    expert_ids = jax.random.randint(keys[2], (32, 2), 0, 1 if crowded else 8)
    gate, up = jax.random.normal(keys[3], (2, 8, 16, 24))
    down = jax.random.normal(keys[4], (8, 24, 16))
    d_out = jax.random.normal(keys[5], (32, 16))

    def run(mesh_axes):
        def local(x, router_weights, gate, up, down, expert_ids):
            return routed_experts(x, router_weights, expert_ids, gate, up, down, mesh_axes)

        return local

    expert, mesh = PartitionSpec("expert"), make_mesh({"expert": 8})
    mesh_axes = MeshAxes(tokens=("expert",), experts=("expert",))
    split = jax.shard_map(run(mesh_axes), mesh=mesh, in_specs=expert, out_specs=expert)
    results = []
    for function in (run(MeshAxes()), split):
        out, vjp = jax.vjp(jax.jit(function), x, router_weights, gate, up, down, expert_ids)
        results.append((out, vjp(d_out)[:5]))
    assert largest_difference(results[1], results[0]) < TOLERANCE


def test_each_device_has_its_share():
    """Of full-size Scout, by its shapes."""
    model = eqx.filter_eval_shape(l4.Llama4, l4.Llama4Config.scout(), key=jax.random.key(0))
    mesh = make_mesh({"fsdp": 2, "expert": 4})
    places = shardings(model, mesh, FSDP | EXPERT_REPLICATED_TOKENS)
    whole = share = 0
    for leaf, place in zip(jax.tree.leaves(model), jax.tree.leaves(places), strict=True):
        whole += leaf.size
        share += jnp.prod(jnp.array(place.shard_shape(leaf.shape), float)).item()
    assert 1 / 8 < share / whole < 0.17
    experts = places.decoder.blocks[0].layers[0].feed_forward.experts
    assert experts.gate_proj.spec == PartitionSpec(None, ("expert",), ("fsdp",), None)
    assert experts.up_proj.spec == experts.gate_proj.spec
    assert places.vision_model.class_embedding.spec == PartitionSpec(("fsdp",))


def test_state_of_the_optimiser_lies_with_its_parameters():
    model = l4.Llama4(MULTIMODAL, key=jax.random.key(0))
    state = eqx.filter_eval_shape(optax.adamw(1e-3).init, eqx.filter(model, eqx.is_array))
    mesh = make_mesh({"fsdp": 2, "expert": 4})
    places = shardings(state, mesh, FSDP | EXPERT_REPLICATED_TOKENS)
    of_model = shardings(model, mesh, FSDP | EXPERT_REPLICATED_TOKENS)
    assert jax.tree.leaves(places[0].mu) == jax.tree.leaves(of_model)
    assert jax.tree.leaves(places[0].nu) == jax.tree.leaves(of_model)
    assert places[0].count.spec == PartitionSpec()


@pytest.mark.parametrize(
    ("sizes", "rules", "sentence"),
    [
        (
            {"expert": 8},
            EXPERT_REPLICATED_TOKENS,
            r"experts of 4 can't be sharded among the 8 devices of expert",
        ),
        ({"data": 8}, FSDP, r"hidden is sharded along fsdp, but the mesh has data"),
        (
            {"x": 2},
            {"hidden": "x", "ff": "x"},
            r"shared_expert\.gate_proj: both ff and hidden are sharded along x",
        ),
    ],
)
def test_rules_that_do_not_fit(sizes, rules, sentence):
    model = eqx.filter_eval_shape(l4.Llama4, l4.Llama4Config(SMALL), key=jax.random.key(0))
    with pytest.raises(ValueError, match=sentence):
        shardings(model, make_mesh(sizes), rules)


def test_presets_join():
    joined = {"batch": "pod"} | DATA | FSDP | {"hidden": "data"}
    assert joined["batch"] == ("pod", "data", "fsdp")
    assert joined["hidden"] == ("fsdp", "data")
    assert "experts" not in joined
    replaced = FSDP.replace(hidden=None)
    assert replaced["hidden"] == ()
    assert replaced["batch"] == FSDP["batch"] == ("fsdp",)


def test_experts_get_tokens_of_all_their_devices_or_of_none():
    model = l4.Llama4(l4.Llama4Config(SMALL), key=jax.random.key(0))
    mesh = make_mesh({"x": 2, "y": 2})
    with pytest.raises(
        ValueError, match="experts are sharded along x, y, of which some shard the tokens"
    ):
        shard(model, mesh, {"experts": ("x", "y"), "batch": "x"})
    with pytest.raises(ValueError, match="batch is sharded along data, but the mesh has x, y"):
        shard(model, mesh, DATA)
    # A batch of two can be cut along x only.
    tokens = random_tokens(2, 24)
    sharded = shard(model, mesh, {"experts": ("x", "y"), "batch": ("x", "y")})
    logits = [eqx.filter_jit(lambda m, t: m(t).logits)(m, tokens) for m in (model, sharded)]
    assert relative_error(logits[1], logits[0]) < TOLERANCE
