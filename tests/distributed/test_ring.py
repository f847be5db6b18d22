"""Ring attention, on four fake devices: equal to dense attention and to gathered keys, which it
never holds."""

from dataclasses import replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import llama4_eqx as l4
from llama4_eqx.distributed import CONTEXT, TENSOR, collectives, shard
from llama4_eqx.layers import Backends, attend
from llama4_eqx.layers.collectives import fold_in_axis_index
from llama4_eqx.layers.dense_attention import dense_attention
from llama4_eqx.layers.mask import token_positions
from llama4_eqx.layers.ring import ring_attention
from llama4_eqx.lowering import lower
from llama4_eqx.training import next_token_loss
from tests.toys import SCOUT, random_tokens, relative_error

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
ROWS, SEQ, HEADS, KV_HEADS, HEAD_DIM = 2, 44, 4, 2, 8
RING = Backends(attention="ring")
INDEX = jnp.arange(SEQ)
DOCUMENTS = jnp.array([np.repeat([0, 1, 2], [19, 5, 20]), np.repeat([0, 1, 2], [3, 33, 8])])
PLACES = {
    "plain": token_positions((ROWS, SEQ)),
    "left": token_positions((ROWS, SEQ), mask=jnp.array([[3], [33]]) <= INDEX),
    "right": token_positions((ROWS, SEQ), mask=jnp.array([[44], [2]]) > INDEX),
    "nothing": token_positions((ROWS, SEQ), mask=jnp.zeros((ROWS, SEQ), bool)),
    "packed": token_positions((ROWS, SEQ), segment_ids=DOCUMENTS),
    "far": token_positions((ROWS, SEQ), start=jnp.array([1_000_000, 13])),
}


def make_mesh(**sizes):
    axis_types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=axis_types)


def in_a_ring(mesh, tokens, *, key=None, **settings):
    def local(q, k, v, tokens):
        own_key = fold_in_axis_index(key, ("context",))
        run = partial(ring_attention, axis_names=("context",), blocks=(4, 8), key=own_key)
        return run(q, k, v, tokens, tokens, **settings)

    heads, seq = P(None, None, "context"), P(None, "context")
    run = jax.shard_map(local, mesh=mesh, in_specs=(heads,) * 3 + (seq,), out_specs=heads)
    return jax.jit(lambda q, k, v: run(q, k, v, tokens))


@pytest.fixture(scope="module")
def arrays():
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(ROWS, heads, SEQ, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize("chunk_size", [None, 8])
@pytest.mark.parametrize("name", PLACES)
def test_ring_is_dense(arrays, name, chunk_size):
    *operands, d_out = arrays
    tokens, settings = PLACES[name], {"chunk_size": chunk_size, "scale": HEAD_DIM**-0.5}
    whole = partial(dense_attention, queries=tokens, keys=tokens, **settings)
    results = []
    for function in (whole, in_a_ring(make_mesh(context=4), tokens, **settings)):
        out, vjp = jax.vjp(function, *operands)
        results.append((out, *vjp(d_out)))
    for ours, truth in zip(*reversed(results), strict=True):
        if name == "nothing":
            assert not ours.any()
            continue
        assert relative_error(ours, truth) < TOLERANCE


def test_dropout_backward_drops_the_same(arrays):
    """The output is linear in the values: its derivative along them is itself."""
    q, k, v, d_out = arrays
    settings = {"chunk_size": None, "scale": 1.0, "dropout_rate": 0.5, "key": jax.random.key(0)}
    run = in_a_ring(make_mesh(context=4), PLACES["plain"], **settings)
    out, vjp = jax.vjp(run, q, k, v)
    assert relative_error(jnp.sum(vjp(d_out)[2] * v), jnp.sum(out * d_out)) < TOLERANCE
    kept = in_a_ring(make_mesh(context=4), PLACES["plain"], chunk_size=None, scale=1.0)(q, k, v)
    assert relative_error(out, kept) > 0.1


@pytest.fixture(scope="module")
def model():
    config = replace(SCOUT, num_hidden_layers=4, no_rope_layers=(1, 0, 1, 0))
    return l4.Llama4(l4.Llama4Config(config), key=jax.random.key(0))


@pytest.mark.parametrize("packed", [False, True])
def test_a_model_in_a_ring_is_whole(model, packed):
    """Its loss and gradients, where chunks are cut, and heads and rows sharded, too."""
    mesh = make_mesh(context=4, tensor=2)
    tokens = random_tokens(2, 44)
    segment_ids = DOCUMENTS if packed else None

    def loss(model, backends):
        losses = next_token_loss(model, tokens, segment_ids=segment_ids, backends=backends)
        return losses.token.total

    run = eqx.filter_jit(eqx.filter_value_and_grad(loss))
    truth = run(model, Backends())
    ours = run(shard(model, mesh, CONTEXT | TENSOR), RING)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(truth), strict=True):
        assert relative_error(one, other) < TOLERANCE


def test_a_cache_is_read_as_ever(model):
    """The ring takes the place of gathering keys, which reading a cache does otherwise."""
    tokens = random_tokens(2, 16)
    truth = model(tokens).logits
    sharded = shard(model, make_mesh(context=4), CONTEXT)
    first = sharded(tokens[:, :12], cache=sharded.empty_cache((2,), 16), backends=RING)
    second = sharded(tokens[:, 12:], cache=first.cache, backends=RING)
    assert relative_error(first.logits, truth[:, :12]) < TOLERANCE
    assert relative_error(second.logits, truth[:, 12:]) < TOLERANCE


def gathers_and_sends(program, mesh) -> tuple[int, int]:
    """How many collectives have a shape of keys and values."""
    kinds = [one.kind for one in collectives(program, mesh) if len(one.shape) > 3]
    return kinds.count("all-gather"), kinds.count("collective-permute")


def test_keys_are_never_gathered(model):
    mesh, tokens = make_mesh(context=4), random_tokens(2, 44)
    sharded = shard(model, mesh, CONTEXT)
    for backends, sent in ((Backends(), (4, 0)), (RING, (0, 4))):
        run = partial(lambda model, backends: model(tokens, backends=backends).logits, sharded)
        program = lower(run, backends).compile()
        assert gathers_and_sends(program, mesh) == sent  # of a cycle's two layers


def test_a_long_row_goes_round(model, monkeypatch):
    """Where the keys and values of the whole row are too many to gather."""
    mesh, tokens = make_mesh(context=4), random_tokens(2, 44)
    sharded = shard(model, mesh, CONTEXT)
    text = model.config.text_config
    gathered = 2 * tokens.size * text.num_key_value_heads * text.head_dim * 4
    for most, sent in ((gathered, (4, 0)), (gathered - 1, (0, 4))):
        monkeypatch.setattr(attend, "MOST_GATHERED", most)
        jax.clear_caches()
        program = lower(lambda model: model(tokens).logits, sharded).compile()
        assert gathers_and_sends(program, mesh) == sent
