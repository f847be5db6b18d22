"""JAX's kernels for TPUs, interpreted, against the dense forms; also inside `jax.shard_map`, where
they don't say over which mesh axes their results vary."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from llama4_eqx.layers import LayerCache, megablox
from llama4_eqx.layers.attention_core import attention
from llama4_eqx.layers.cache import KeysValues
from llama4_eqx.layers.dense_attention import dense_attention
from llama4_eqx.layers.grouped import grouped_mlp
from llama4_eqx.layers.grouped_products import RAGGED
from llama4_eqx.layers.mask import token_positions
from llama4_eqx.layers.rope import _rotate_by_product, _rotate_pairs
from llama4_eqx.layers.splash import splash_attention
from llama4_eqx.layers.splash_after_cache import splash_after_cache

BATCH, HEADS, KV_HEADS, SEQ, HEAD_DIM = 2, 4, 2, 150, 16
INDEX = jnp.arange(SEQ)
ROWS = {
    "plain": {},
    "left": {"mask": jnp.array([[0], [40]]) <= INDEX},
    "right": {"mask": jnp.array([[150], [0]]) > INDEX},
    "between": {"mask": (jnp.array([[30], [1]]) > INDEX) | (INDEX > 60)},
    "packed": {"segment_ids": jnp.where(jnp.array([[50], [51]]) > INDEX, 7, 8)},
    "restart": {"positions": (INDEX + jnp.array([[3], [0]])) % 70},
}


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.fixture
def operands():
    q = normal(0, BATCH, HEADS, SEQ, HEAD_DIM)
    k, v = (normal(i, BATCH, KV_HEADS, SEQ, HEAD_DIM) for i in (1, 2))
    return q, k, v


def same(ours, truth) -> None:
    """Sums in another order: 1e-5 of what a row's values are."""
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(truth), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_size", [None, 16, 64])
@pytest.mark.parametrize("rows", ROWS)
def test_splash_attention(operands, rows, chunk_size):
    tokens = token_positions((BATCH, SEQ), **ROWS[rows])
    settings = {"chunk_size": chunk_size, "scale": 0.2}
    weights = normal(3, BATCH, HEADS, SEQ, HEAD_DIM)

    def run(function, *args, **more):
        out, vjp = jax.vjp(partial(function, **settings, **more), *operands, *args)
        return out, vjp(weights)[:3]

    def splash(q, k, v, **more):
        return splash_attention(q, k, v, tokens, **more)

    def dense(q, k, v, **more):
        return dense_attention(q, k, v, tokens, tokens, **more)

    same(run(splash, interpret=True), run(dense))


NEW = {
    "plain": {},
    "left": {"mask": jnp.arange(20) >= jnp.array([[0], [13]])},
    "right": {"mask": jnp.arange(20) < jnp.array([[20], [0]])},
}


@pytest.mark.parametrize("lengths", [(0, 0), (0, 7), (60, 200)])
@pytest.mark.parametrize("chunk_size", [None, 64])
@pytest.mark.parametrize("rows", NEW)
def test_splash_after_cache(rows, chunk_size, lengths):
    """New tokens after none, a few or many, of which a ring holds the newest chunk."""
    start, slots = jnp.array(lengths), chunk_size or 210
    queries = token_positions((BATCH, 20), start=start, **NEW[rows])
    q = normal(0, BATCH, HEADS, 20, HEAD_DIM)
    new = KeysValues(*normal(1, 2, BATCH, KV_HEADS, 20, HEAD_DIM), queries)
    ring = LayerCache(*normal(2, 2, BATCH, KV_HEADS, slots, HEAD_DIM))
    past = ring.read(jnp.zeros(BATCH, int), start)
    weights = normal(3, BATCH, HEADS, 20, HEAD_DIM)
    settings = {"chunk_size": chunk_size, "scale": 0.2}

    def splash(q, new_kv, past_kv):
        ours = (KeysValues(*kv, of.tokens) for kv, of in ((new_kv, new), (past_kv, past)))
        return splash_after_cache(q, *ours, queries, interpret=True, **settings)

    def dense(q, new_kv, past_kv):
        keys = past.concatenate(new).tokens
        kv = (jnp.concatenate(pair, axis=2) for pair in zip(past_kv, new_kv, strict=True))
        return dense_attention(q, *kv, queries, keys, **settings)

    def run(function):
        out, vjp = jax.vjp(function, q, (new.k, new.v), (past.k, past.v))
        return out, vjp(weights)

    same(run(splash), run(dense))


def test_splash_takes_what_it_can(operands):
    tokens = token_positions((BATCH, SEQ))
    with pytest.raises(ValueError, match="head_dim that is a multiple of 128"):
        attention(
            *operands, tokens, tokens, chunk_size=None, scale=1.0, own_keys=True, backend="splash"
        )


SIZES = [(40, 24, 40, (8, 0, 20, 5)), (600, 130, 257, (100, 0, 250, 17)), (3, 8, 8, (1, 2))]


@pytest.mark.parametrize(("tokens", "rows", "columns", "sizes"), SIZES)
def test_grouped_products(tokens, rows, columns, sizes):
    """Rows of no expert may hold anything, even NaN."""
    sizes, count = jnp.array(sizes), sum(sizes)
    left, right = normal(0, tokens, rows), normal(1, tokens, columns)
    weight = normal(2, len(sizes), columns, rows)
    outer = megablox.outer_product(
        *(x.at[count:].set(jnp.nan) for x in (left, right)), sizes, interpret=True
    )
    zeroed = (x.at[count:].set(0) for x in (left, right))
    np.testing.assert_allclose(outer, RAGGED.outer(*zeroed, sizes), rtol=1e-5, atol=1e-4)
    product = megablox.grouped_product(left, weight, sizes, transposed=True, interpret=True)
    truth = RAGGED.grouped(left, weight, sizes, transposed=True)
    np.testing.assert_allclose(product[:count], truth[:count], rtol=1e-5, atol=1e-4)


def test_megablox_takes_what_it_can():
    rows, weight = jnp.zeros((4, 8), jnp.float16), jnp.zeros((2, 8, 8), jnp.float16)
    with pytest.raises(ValueError, match="takes bfloat16 or float32"):
        grouped_mlp(rows, weight, weight, weight, jnp.array([2, 2]), backend="megablox")


@pytest.fixture
def mesh():
    return jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)


def test_attention_inside_shard_map(mesh, operands):
    """Results vary as the arguments do, so that gradients get their sums and no more."""
    tokens, weight = token_positions((1, SEQ)), normal(4, HEAD_DIM, HEAD_DIM)
    settings = {"chunk_size": 64, "scale": 0.2}

    def gradients(attend):
        def local(q, k, v, weight):
            return jax.lax.psum(jnp.sum(jnp.sin(attend(q @ weight, k, v, **settings))), "x")

        rows = P("x")
        split = jax.shard_map(local, mesh=mesh, in_specs=(rows, rows, rows, P()), out_specs=P())
        return jax.jit(jax.grad(split, (0, 1, 2, 3)))(*operands, weight)

    ours = gradients(lambda *qkv, **more: splash_attention(*qkv, tokens, interpret=True, **more))
    same(ours, gradients(lambda *qkv, **more: dense_attention(*qkv, tokens, tokens, **more)))


def test_outer_product_inside_shard_map(mesh):
    left, right, sizes = normal(0, 80, 24), normal(1, 80, 8), jnp.array([20, 7])

    def on_mesh(product):
        def local(left, right):
            return jax.lax.psum(product(left, right, sizes), "x")

        split = jax.shard_map(local, mesh=mesh, in_specs=(P("x"), P("x")), out_specs=P())
        return jax.jit(split)(left, right)

    ours = on_mesh(partial(megablox.outer_product, interpret=True))
    same(ours, sum(RAGGED.outer(left[i : i + 40], right[i : i + 40], sizes) for i in (0, 40)))


def test_turning_pairs_by_a_product():
    """Exact: each sum has one term that isn't zero. What rounds are the two products after it."""
    x, angles = normal(0, 3, 5, 2, 16), normal(1, 3, 5, 1, 8)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    ours, truth = (turn(x, cos, sin) for turn in (_rotate_by_product, _rotate_pairs))
    np.testing.assert_allclose(ours, truth, rtol=1e-6, atol=1e-6)
