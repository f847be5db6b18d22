"""The attention core: dense against torch, blockwise against dense, and what it leaves out."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from llama4_eqx.layers.attention_core import attention
from llama4_eqx.layers.blockwise import _visits, blockwise_attention
from llama4_eqx.layers.dense_attention import dense_attention
from llama4_eqx.layers.mask import TokenPositions, attention_mask, token_positions
from tests.toys import relative_error

CHUNK = 8
HEAD_DIM = 8
SCALE = HEAD_DIM**-0.5
TOLERANCE = 1e-5


def itself(where: TokenPositions) -> tuple[TokenPositions, TokenPositions]:
    return where, where


def ring(slots: int, *lengths: int, new: int) -> tuple[TokenPositions, TokenPositions]:
    """The last `new` tokens of rows of some lengths, and a ring of the newest of their tokens,
    in which empty slots still tell a position."""
    last = jnp.array(lengths)[:, None] - 1
    positions = last - (last - jnp.arange(slots)) % slots
    keys = TokenPositions(jnp.where(positions < 0, 3, positions), jnp.where(positions < 0, -1, 0))
    return token_positions((len(lengths), new), start=last[:, 0] + 1 - new), keys


def packed(*sizes: int) -> np.ndarray:
    return np.repeat(np.arange(len(sizes)), sizes)


index = jnp.arange(45)
PLACES = {
    "plain": itself(token_positions((2, 48))),
    "left": itself(token_positions((3, 45), mask=index >= jnp.array([[0], [7], [33]]))),
    "right": itself(token_positions((3, 45), mask=index < jnp.array([[45], [38], [2]]))),
    "empty row": itself(token_positions((2, 45), mask=index < jnp.array([[45], [0]]))),
    "nothing": itself(token_positions((1, 45), mask=jnp.zeros((1, 45), bool))),
    "packed": itself(
        token_positions((2, 45), segment_ids=jnp.array([packed(19, 5, 1, 20), packed(3, 30, 12)]))
    ),
    "far": itself(token_positions((2, 45), start=jnp.array([1_000_000, 13]))),
    "ring": ring(40, 21, 40, 130, new=17),
    "local ring": ring(CHUNK, 3, 8, 61, new=2),
    "long cache": (
        token_positions((1, 18), start=jnp.array([30])),
        token_positions((1, 70), mask=jnp.arange(70)[None] < 48),
    ),
}


def inputs(
    queries: TokenPositions,
    keys: TokenPositions,
    heads: int = 6,
    kv_heads: int = 2,
    dtype=jnp.float32,
):
    """Random q, k and v, and the derivative of the output."""
    (batch, q_seq), kv_seq = queries.positions.shape, keys.positions.shape[1]
    q_shape, kv_shape = (batch, heads, q_seq, HEAD_DIM), (batch, kv_heads, kv_seq, HEAD_DIM)
    random_keys = jax.random.split(jax.random.key(0), 4)
    shapes = (q_shape, kv_shape, kv_shape, q_shape)
    return [
        jax.random.normal(key, shape, dtype) for key, shape in zip(random_keys, shapes, strict=True)
    ]


def run(form, arrays, queries, keys, **options):
    """The output and the derivatives of q, k and v."""

    @jax.jit
    def both(q, k, v, d_out):
        out, pull = jax.vjp(lambda q, k, v: form(q, k, v, queries, keys, **options), q, k, v)
        return out, *pull(d_out)

    return both(*arrays)


def assert_equal(values, truths, tolerance=TOLERANCE):
    for value, truth in zip(values, truths, strict=True):
        assert np.isfinite(np.asarray(value, np.float32)).all()
        if np.any(truth):
            assert relative_error(value, truth) < tolerance
        else:
            assert not np.any(value)


@cache
def dense(name, chunk_size):
    arrays = inputs(*PLACES[name])
    return run(dense_attention, arrays, *PLACES[name], chunk_size=chunk_size, scale=SCALE)


@pytest.mark.parametrize("chunk_size", [None, CHUNK])
@pytest.mark.parametrize("name", PLACES)
def test_dense_is_torch(name, chunk_size):
    arrays = inputs(*PLACES[name])
    seen = np.asarray(attention_mask(*PLACES[name], chunk_size))[:, None]
    q, k, v, d_out = (torch.tensor(np.asarray(x), requires_grad=True) for x in arrays)
    out = scaled_dot_product_attention(q, k, v, torch.tensor(seen), scale=SCALE, enable_gqa=True)
    truths = out, *torch.autograd.grad(out, (q, k, v), d_out)
    values = dense(name, chunk_size)
    assert_equal(values, [truth.detach().numpy() for truth in truths])
    assert not np.any(np.where(seen.any(-1, keepdims=True), 0, values[0]))


@pytest.mark.parametrize("chunk_size", [None, CHUNK])
@pytest.mark.parametrize("name", PLACES)
def test_blockwise_is_dense(name, chunk_size):
    arrays, options = inputs(*PLACES[name]), {"chunk_size": chunk_size, "scale": SCALE}
    values = run(blockwise_attention, arrays, *PLACES[name], blocks=(16, 8), **options)
    assert_equal(values, dense(name, chunk_size))


@pytest.mark.parametrize("heads", [(4, 4), (5, 1)])
@pytest.mark.parametrize("blocks", [(8, 16), (7, 5), (64, 64)])
def test_blockwise_is_dense_for_any_heads_and_blocks(heads, blocks):
    where = PLACES["left"]
    arrays = inputs(*where, *heads)
    truths = run(dense_attention, arrays, *where, chunk_size=CHUNK, scale=SCALE)
    values = run(blockwise_attention, arrays, *where, chunk_size=CHUNK, scale=SCALE, blocks=blocks)
    assert_equal(values, truths)


@pytest.mark.parametrize(("q_seq", "kv_seq"), [(1, 600), (30, 40), (300, 300)])
def test_attention_is_dense_at_every_size(q_seq, kv_seq):
    where = (
        token_positions((1, q_seq), start=jnp.array([kv_seq - q_seq])),
        token_positions((1, kv_seq)),
    )
    arrays = inputs(*where, 2, 1)
    options = {"chunk_size": None, "scale": SCALE}
    truths = run(dense_attention, arrays, *where, **options)
    assert_equal(run(attention, arrays, *where, **options), truths)


def test_heads_must_be_a_multiple():
    where = PLACES["plain"]
    for form in (attention, blockwise_attention):
        with pytest.raises(ValueError, match="multiple of kv_heads, got 5 and 2"):
            run(form, inputs(*where, 5, 2), *where, chunk_size=None, scale=SCALE)


@pytest.mark.parametrize("form", [dense_attention, blockwise_attention])
def test_bfloat16(form):
    where = PLACES["left"]
    arrays = inputs(*where, dtype=jnp.bfloat16)
    options = {"chunk_size": None, "scale": SCALE}
    exact = [x.astype(jnp.float32) for x in arrays]
    blocks = {"blocks": (16, 8)} if form is blockwise_attention else {}
    values = run(form, arrays, *where, **options, **blocks)
    assert all(value.dtype == jnp.bfloat16 for value in values)
    assert_equal(values, run(dense_attention, exact, *where, **options), tolerance=1e-2)


@partial(jax.jit, static_argnames=("blocks", "dropout_rate"))
def blockwise(q, k, v, where, *, blocks=(16, 8), dropout_rate=0.0, key=None):
    options = {"chunk_size": CHUNK, "scale": SCALE, "dropout_rate": dropout_rate, "key": key}
    return blockwise_attention(q, k, v, where, where, blocks=blocks, **options)


def test_under_vmap():
    wheres = PLACES["packed"][0], PLACES["far"][0]
    # What is known at trace time of one alone isn't of both.
    wheres = [TokenPositions(where.positions, where.segments) for where in wheres]
    each = [(*inputs(where, where), where) for where in wheres]

    def loss(q, k, v, d_out, where):
        return jnp.vdot(blockwise(q, k, v, where), d_out)

    gradients = jax.jit(jax.grad(loss, (0, 1, 2)))
    together = jax.vmap(gradients)(*jax.tree.map(lambda *leaves: jnp.stack(leaves), *each))
    for i, one in enumerate(each):
        assert_equal([x[i] for x in together], gradients(*one))


def test_under_scan_and_checkpoint():
    where = PLACES["packed"][0]
    q, k, v, d_out = inputs(where, where, 2, 2)

    def dense(q, k, v, where):
        return dense_attention(q, k, v, where, where, chunk_size=CHUNK, scale=SCALE)

    def loss(q, form):
        def layer(x, _):
            return x + form(x, k, v, where), None

        out = jax.lax.scan(jax.checkpoint(layer), q, length=3)[0]
        return jnp.vdot(out, d_out), out

    # Not the sum itself, in which terms a thousand times as large cancel.
    gradient_and_output = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    assert_equal(gradient_and_output(q, blockwise), gradient_and_output(q, dense))


RATE = 0.3
# As many keys as features, so that with the identity as values the output is the probabilities.
SQUARE = token_positions((8, HEAD_DIM))


def probabilities(q, k, **options):
    eye = jnp.broadcast_to(jnp.eye(HEAD_DIM), (*k.shape[:2], HEAD_DIM, HEAD_DIM))
    return blockwise(q, k, eye, SQUARE, blocks=(4, 2), **options)


def test_dropout_drops_and_rescales():
    q, k, *_ = inputs(SQUARE, SQUARE, 64, 32)
    whole = probabilities(q, k)
    dropped = probabilities(q, k, dropout_rate=RATE, key=jax.random.key(1))
    kept = np.asarray(dropped != 0)
    assert_equal([dropped], [np.where(kept, whole / (1 - RATE), 0)])
    assert abs(kept[whole > 0].mean() - (1 - RATE)) < 0.01
    # Neither rows, heads nor pairs of blocks share their draws.
    assert len(np.unique(kept.reshape(8 * 64, -1), axis=0)) == 8 * 64
    agree = (kept[:, :, 4:, 0:2] == kept[:, :, 4:, 2:4]).mean()
    assert abs(agree - (RATE**2 + (1 - RATE) ** 2)) < 0.04


def test_dropout_backward_drops_the_same():
    arrays = inputs(SQUARE, SQUARE)
    options = {"dropout_rate": RATE, "key": jax.random.key(1)}
    kept = probabilities(*arrays[:2], **options) != 0

    def form(q, k, v, *_):
        return blockwise(q, k, v, SQUARE, blocks=(4, 2), **options)

    def truth(q, k, v, *_):
        weights = jnp.where(kept, probabilities(q, k) / (1 - RATE), 0)
        return weights @ jnp.repeat(v, 3, axis=1)

    assert_equal(*(run(f, arrays, SQUARE, SQUARE) for f in (form, truth)))


def test_dropout_follows_the_key():
    q, k, *_ = inputs(SQUARE, SQUARE)
    draw = partial(probabilities, q, k, dropout_rate=RATE)
    assert np.array_equal(draw(key=jax.random.key(1)), draw(key=jax.random.key(1)))
    assert not np.array_equal(draw(key=jax.random.key(1)), draw(key=jax.random.key(2)))
    assert np.array_equal(draw(), probabilities(q, k))


def test_dropout_of_one_block_is_dense():
    arrays = inputs(SQUARE, SQUARE)
    options = {"chunk_size": None, "scale": SCALE, "dropout_rate": RATE, "key": jax.random.key(3)}
    forms = blockwise_attention, dense_attention
    assert_equal(*(run(form, arrays, SQUARE, SQUARE, **options) for form in forms))


def visits(
    queries: TokenPositions, keys: TokenPositions, chunk_size: int | None, size: int = 8
) -> list[list[int]]:
    """The blocks of keys that each block of queries visits."""

    def blocks(x):
        return x.reshape(x.shape[0], -1, size).swapaxes(0, 1)

    queries, keys = jax.tree.map(blocks, (queries, keys))
    order, counts = _visits(queries, keys, chunk_size)
    return [row[:count] for row, count in zip(order.tolist(), counts.tolist(), strict=True)]


def test_visits_no_more_than_it_must():
    plain = token_positions((2, 32))
    assert visits(plain, plain, None) == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]
    assert visits(plain, plain, 8) == [[0], [1], [2], [3]]
    assert visits(plain, plain, 16) == [[0], [0, 1], [2], [2, 3]]
    shifted = token_positions((1, 32), start=jnp.array([1_000_004]))
    assert visits(shifted, shifted, 8) == [[0], [0, 1], [1, 2], [2, 3]]
    left = token_positions((1, 32), mask=jnp.arange(32)[None] >= 16)
    assert visits(left, left, None) == [[], [], [2], [2, 3]]
    documents = token_positions((1, 32), segment_ids=jnp.array([packed(16, 8, 8)]))
    assert visits(documents, documents, None) == [[0], [0, 1], [2], [3]]
    # The slots hold positions 32 to 39, then 8 to 31.
    assert visits(*ring(32, 40, new=8), 16) == [[0]]
    assert visits(*ring(32, 40, new=8), 20) == [[0, 2, 3]]


def test_visits_all_that_it_must():
    rng = np.random.default_rng(0)
    for chunk_size in (None, 4, 9):
        for _ in range(20):
            # In runs, as random token_positions would leave nothing to skip.
            queries, keys = (
                TokenPositions(
                    jnp.asarray(rng.integers(0, 60, (2, 6, 1)) + rng.integers(0, 5, (2, 6, 8))),
                    jnp.asarray(rng.integers(-1, 3, (2, 6, 1)).repeat(8, -1)),
                )
                for _ in range(2)
            )
            queries, keys = jax.tree.map(lambda x: x.reshape(2, 48), (queries, keys))
            seen = attention_mask(queries, keys, chunk_size).any(0).reshape(6, 8, 6, 8).any((1, 3))
            for row, visited in zip(seen, visits(queries, keys, chunk_size), strict=True):
                assert set(np.flatnonzero(row)) <= set(visited)


def test_what_is_not_visited_is_not_read():
    queries, keys = token_positions((1, 16), start=jnp.array([48])), token_positions((1, 64))
    q, k, v, d_out = inputs(queries, keys)
    options = {"chunk_size": 16, "scale": SCALE, "blocks": (16, 16)}
    truths = run(blockwise_attention, (q, k, v, d_out), queries, keys, **options)
    poisoned = [x.at[:, :, :48].set(jnp.nan) for x in (k, v)]
    values = run(blockwise_attention, (q, *poisoned, d_out), queries, keys, **options)
    assert_equal(values, truths)


@pytest.mark.parametrize("chunk_size", [None, 256])
def test_memory_is_linear(chunk_size):
    seq, head_dim = 4096, 8
    where = jax.eval_shape(lambda: token_positions((1, seq)))
    q = jax.ShapeDtypeStruct((1, 2, seq, head_dim), jnp.float32)
    kv = jax.ShapeDtypeStruct((1, 1, seq, head_dim), jnp.float32)

    def loss(q, k, v, where):
        return attention(q, k, v, where, where, chunk_size=chunk_size, scale=SCALE).sum()

    for function in (loss, jax.grad(loss, (0, 1, 2))):
        memory = jax.jit(function).lower(q, kv, kv, where).compile().memory_analysis()
        assert memory is not None
        assert memory.temp_size_in_bytes < seq * seq * 4 / 10
