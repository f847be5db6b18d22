"""Sequence parallelism beside tensor parallelism: what it saves, and where it steps aside."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

import llama4_eqx as l4
from llama4_eqx.distributed import (
    EXPERT_ALL_TO_ALL,
    EXPERT_REPLICATED_TOKENS,
    SEQUENCE,
    TENSOR,
    abstract_sharded,
    collectives,
    shard,
)
from llama4_eqx.layers import MLP, Probe
from llama4_eqx.layers.context import PLAIN
from llama4_eqx.lowering import lower
from llama4_eqx.research import replaced
from llama4_eqx.training import next_token_loss
from tests.toys import MAVERICK, random_tokens, relative_error

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
RULES = TENSOR | SEQUENCE
BIASED = replace(MAVERICK, num_hidden_layers=4, no_rope_layers=(1, 0, 1, 0), attention_bias=True)


def make_mesh(devices):
    return jax.make_mesh((devices,), ("tensor",), axis_types=(AxisType.Auto,))


@pytest.fixture(scope="module")
def model():
    """One with dense layers and layers of experts, whose biases aren't zero."""
    model = l4.Llama4(l4.Llama4Config(BIASED), key=jax.random.key(0))
    return jax.tree.map(lambda leaf: leaf + 0.01, model)


def loss(model, tokens):
    return next_token_loss(model, tokens).token.total


@pytest.mark.parametrize("rows", [(), (2,), (2, 3)])
def test_any_batch_is_whole(model, rows):
    """Losses and gradients, of one row and of batches of one and two axes."""
    tokens = random_tokens(6, 40)[: max(1, 3 * len(rows) ** 2)].reshape(-1)
    tokens = tokens[: 40 * int(jnp.prod(jnp.array(rows, int)))].reshape(*rows, 40)
    run = eqx.filter_jit(eqx.filter_value_and_grad(loss))
    truth, ours = (run(one, tokens) for one in (model, shard(model, make_mesh(2), RULES)))
    for value, true in zip(jax.tree.leaves(ours), jax.tree.leaves(truth), strict=True):
        # Of the keys' biases hardly anything is left but rounding, since the softmax ignores them
        # where keys aren't rotated.
        assert relative_error(value, true) < TOLERANCE or abs(value - true).max() < 1e-5


@pytest.mark.parametrize("experts", [EXPERT_REPLICATED_TOKENS, EXPERT_ALL_TO_ALL])
def test_with_experts_elsewhere(model, experts):
    """Their tokens are those of the gathered rows, whichever way these go."""
    mesh = jax.make_mesh((2, 2), ("expert", "tensor"), axis_types=(AxisType.Auto,) * 2)
    run = eqx.filter_jit(eqx.filter_value_and_grad(loss))
    tokens = random_tokens(2, 40)
    truth, ours = (run(one, tokens) for one in (model, shard(model, mesh, experts | RULES)))
    for value, true in zip(jax.tree.leaves(ours), jax.tree.leaves(truth), strict=True):
        assert relative_error(value, true) < TOLERANCE or abs(value - true).max() < 1e-5


def layers_all_reduce(model, tokens, mesh) -> bool:
    """Whether layers all-reduce rows of features, as they do without sequence parallelism."""
    program = lower(lambda model, tokens: model(tokens).hidden, model, tokens).compile()
    found = [one for one in collectives(program, mesh) if one.shape[-1:] == (BIASED.hidden_size,)]
    return "all-reduce" in {one.kind for one in found}


class Doubled(MLP):
    """One that doesn't say that it takes shards of rows: they'd be summed with others."""

    def __init__(self, old):
        for name, value in vars(old).items():
            setattr(self, name, value)

    def __call__(self, x, *, execution=PLAIN):
        out, _ = super().__call__(x, execution=execution)
        return 2 * out, None


def test_where_it_steps_aside(model):
    mesh, tokens = make_mesh(2), random_tokens(2, 40)
    sharded = shard(model, mesh, RULES)
    assert not layers_all_reduce(sharded, tokens, mesh)
    assert layers_all_reduce(sharded, tokens[:, :-1], mesh)  # an odd number

    doubled = replaced(model, "feed_forward", Doubled, layers=[0])
    sharded_doubled = shard(doubled, mesh, RULES)
    assert layers_all_reduce(sharded_doubled, tokens, mesh)
    truth, ours = (one(tokens).logits for one in (doubled, sharded_doubled))
    assert relative_error(ours, truth) < TOLERANCE


def test_a_probe_sees_whole_rows(model):
    tokens, probe = random_tokens(2, 40), Probe(read=("resid_mid", "router_logits"))
    truth, ours = (
        one(tokens, probe=probe).readings for one in (model, shard(model, make_mesh(2), RULES))
    )
    for site in probe.read:
        assert relative_error(ours[site], truth[site]) < TOLERANCE


def test_it_divides_what_layers_leave():
    """Memory of a gradient, where the layers' inputs are most of it: an eighth, and what one layer
    takes."""
    config = replace(
        BIASED, num_hidden_layers=16, no_rope_layers=(1,) * 16, moe_layers=(), hidden_size=256,
        num_attention_heads=8, num_key_value_heads=8, head_dim=4, intermediate_size_mlp=8,
    )  # fmt: skip
    mesh, tokens = make_mesh(8), jax.ShapeDtypeStruct((16, 128), jnp.int32)

    def temporaries(rules):
        def make():
            return l4.Llama4(l4.Llama4Config(config), key=jax.random.key(0))

        model = abstract_sharded(make, mesh, rules)
        program = lower(eqx.filter_grad(loss), model, tokens).compile()
        return program.memory_analysis().temp_size_in_bytes

    without, with_it = temporaries(TENSOR), temporaries(RULES)
    assert with_it < 0.5 * without


def test_rules_that_do_not_fit(model):
    with pytest.raises(ValueError, match=r"residual is sharded along tensor, along which heads"):
        shard(model, make_mesh(2), SEQUENCE)
    with pytest.raises(ValueError, match=r"pass TENSOR \| SEQUENCE"):
        shard(model, make_mesh(2), RULES.replace(ff=None))
