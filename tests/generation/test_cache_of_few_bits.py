"""Keys and values in int8 or float8: how exact, how small, and what works with them."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import llama4_eqx as l4
from llama4_eqx.config import Llama4Config
from llama4_eqx.distributed import TENSOR, Rules, init_sharded, shard, unshard
from tests.toys import SCOUT, random_tokens, relative_error

pytestmark = pytest.mark.slow

# Half a step of int8, and of e4m3's 3 bits, is 1/254 of a head's largest number and 1/16 of any;
# the softmax and the layers leave about that much of it in the logits.
TOLERANCE = {"int8": 0.01, "float8_e4m3fn": 0.08}
# Dense layers: with experts, a router's near tie now and then sends a token elsewhere.
CONFIG = Llama4Config(replace(SCOUT, moe_layers=(), max_position_embeddings=2048))


@pytest.fixture(scope="module")
def model():
    return l4.Llama4(CONFIG, key=jax.random.key(0))


@eqx.filter_jit
def decoded(model, tokens, cache):
    """The logits of each token, read one by one."""

    def step(cache, token):
        out = model(token[:, None], cache=cache)
        return out.cache, out.logits[:, 0]

    cache, logits = jax.lax.scan(step, cache, tokens.T)
    return jnp.swapaxes(logits, 0, 1), cache


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_thousand_tokens_do_not_drift(model, dtype):
    tokens = random_tokens(2, 1000)
    truth = model(tokens).logits
    logits, cache = decoded(model, tokens, model.empty_cache((2,), 1000, dtype=dtype))
    errors = np.array(
        [relative_error(logits[:, i : i + 100], truth[:, i : i + 100]) for i in range(0, 1000, 100)]
    )
    assert errors.max() < TOLERANCE[dtype]
    assert errors.max() > 1e-4  # it was rounded
    assert errors[-3:].mean() < 1.5 * errors[:3].mean()
    assert cache.dtype == dtype


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_in_pieces_and_with_padding(model, dtype):
    tokens, lengths = random_tokens(3, 90), np.array([90, 41, 77])
    mask = jnp.arange(90) < lengths[:, None]
    truth = model(tokens, mask=mask).logits
    cache, parts = model.empty_cache((3,), 90, dtype=dtype), []
    for first, end in ((0, 40), (40, 41), (41, 90)):
        out = model(tokens[:, first:end], mask=mask[:, first:end], cache=cache)
        cache, parts = out.cache, [*parts, out.logits]
    logits = jnp.concatenate(parts, axis=1)
    assert relative_error(logits[mask], truth[mask]) < TOLERANCE[dtype]


def test_bytes():
    config = replace(CONFIG, text_config=replace(CONFIG.text_config, head_dim=128))
    model = eqx.filter_eval_shape(
        lambda: l4.Llama4(config, key=jax.random.key(0), dtype=jnp.bfloat16)
    )

    def size(dtype):
        cache = eqx.filter_eval_shape(lambda m: m.empty_cache((4,), 512, dtype=dtype), model)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache.blocks))

    assert size("int8") / size(None) == pytest.approx((128 + 2) / 256)
    assert size("float8_e4m3fn") == size("int8")


def test_rows_are_taken_repeated_and_rewound(model):
    tokens = random_tokens(2, 30)
    _, cache = l4.prefill(model, tokens, model.empty_cache((2,), 40, dtype="int8"))
    again = cache.take([1, 0]).take([1, 0]).repeat(2)
    out = model(tokens[:, :1], cache=cache)
    repeated = model(jnp.repeat(tokens[:, None, :1], 2, axis=1), cache=again)
    assert relative_error(repeated.logits[:, 1], out.logits) < 1e-5
    back = out.cache.rewind(30)
    assert relative_error(model(tokens[:, :1], cache=back).logits, out.logits) < 1e-5
    # Also what was read in full is rounded afterwards, to the same numbers.
    _, whole = l4.prefill(model, tokens[:, :1], model.empty_cache((2,), 40))
    _, few = l4.prefill(model, tokens[:, :1], model.empty_cache((2,), 40, dtype="int8"))
    first = lambda cache: cache.blocks[0][0].k[0]  # noqa: E731
    np.testing.assert_array_equal(first(whole.quantized()), first(few))


def test_generation_continues_it(model):
    tokens = random_tokens(1, 20)
    cache = model.empty_cache((1,), 64, dtype="int8")
    text = l4.generate(model, tokens, max_new_tokens=20, cache=cache)
    assert text.shape == (1, 20)
    streamed = [int(t[0]) for t in l4.stream(model, tokens, max_new_tokens=20, cache=cache)]
    assert streamed == text[0].tolist()


def test_sharded(model):
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    rules, tokens = Rules(TENSOR | Rules(batch="data")), random_tokens(4, 24)
    _, whole = l4.prefill(model, tokens, model.empty_cache((4,), 40, dtype="int8"))
    placed = shard(model, mesh, rules)
    empty = init_sharded(lambda: model.empty_cache((4,), 40, dtype="int8"), mesh, rules)
    logits, cache = l4.prefill(placed, tokens, empty)
    assert relative_error(logits, l4.prefill(model, tokens, unshard(empty))[0]) < 1e-3
    k = cache.blocks[0][0].k
    assert k.sharding.shard_shape(k.shape) != k.shape
    off = np.abs(np.asarray(k, np.int32) - np.asarray(whole.blocks[0][0].k, np.int32))
    assert off.max() <= 1  # sums in another order may round to a neighbour


def test_errors(model):
    with pytest.raises(ValueError, match="int8 or float8_e4m3fn, not int4"):
        model.empty_cache((1,), 8, dtype=jnp.int4)
    with pytest.raises(ValueError, match="int8 already"):
        model.empty_cache((1,), 8, dtype="int8").quantized()
