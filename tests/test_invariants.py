"""One forward path, stated as equalities: what must be the same, however it is computed."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama4_eqx as l4
from tests.toys import SCOUT, TOYS, random_tokens, relative_error

# Logits of an untrained toy model are sums of some hundred terms; 1e-5 of the largest is rounding.
TOLERANCE = 1e-5
CONFIGS = {"scout": SCOUT, "irregular": TOYS["irregular"]}  # scanned; dense and MoE, unrolled


def random_model(config, seed=0) -> l4.Llama4:
    """A model whose weights are large enough that every rule changes its logits."""
    model = l4.Llama4(l4.Llama4Config(config), key=jax.random.key(seed))
    return jax.tree.map(lambda leaf: leaf * 8 if leaf.ndim > 2 else leaf, model)


@pytest.fixture(params=CONFIGS)
def model(request) -> l4.Llama4:
    return random_model(CONFIGS[request.param])


def forward(model, tokens, **options):
    return eqx.filter_jit(model)(tokens, **options).logits


def feed(model, tokens, cache, mask=None):
    """Logits of tokens fed to a cache in one call, and the cache."""
    output = eqx.filter_jit(model)(tokens, cache=cache, mask=mask)
    return output.logits, output.cache


def test_decode_equals_prefill(model):
    tokens = random_tokens(2, 40)
    whole = forward(model, tokens)
    logits, cache = feed(model, tokens[:, :5], model.empty_cache((2,), 40))
    parts = [logits]
    for i in range(5, 40):
        step, cache = l4.decode_step(model, tokens[:, i], cache)
        parts.append(step[:, None])
    assert relative_error(jnp.concatenate(parts, 1), whole) < TOLERANCE


@pytest.mark.parametrize("sizes", [(8, 8, 8, 16), (3, 20, 1, 16), (40,), (1, 39)])
def test_pieces_equal_one_prefill(model, sizes):
    tokens = random_tokens(2, 40)
    cache, parts = model.empty_cache((2,), 64), []
    for piece in jnp.split(tokens, np.cumsum(sizes)[:-1], axis=1):
        logits, cache = feed(model, piece, cache)
        parts.append(logits)
    assert relative_error(jnp.concatenate(parts, 1), forward(model, tokens)) < TOLERANCE


LENGTHS = (17, 30, 1, 24)


def padded(side):
    """Rows of different lengths in one batch, and their mask."""
    tokens, mask = np.zeros((len(LENGTHS), 30), np.int32), np.zeros((len(LENGTHS), 30), bool)
    for row, length in enumerate(LENGTHS):
        first = {"left": 30 - length, "right": 0, "both": (30 - length) // 2}[side]
        tokens[row, first : first + length] = random_tokens(length, seed=row)
        mask[row, first : first + length] = True
    return jnp.asarray(tokens), jnp.asarray(mask)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padded_equals_alone(model, side):
    tokens, mask = padded(side)
    together = forward(model, tokens, mask=mask)
    for row in range(len(LENGTHS)):
        alone = forward(model, tokens[row][mask[row]])
        assert relative_error(together[row][mask[row]], alone) < TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
def test_decode_after_ragged_prefill_equals_alone(model, side):
    tokens, mask = padded(side)
    after = random_tokens(len(LENGTHS), 12, seed=9)
    cache = model.empty_cache((len(LENGTHS),), 42)
    _, cache = l4.prefill(model, tokens, cache, mask=mask)
    steps = []
    for i in range(12):
        logits, cache = l4.decode_step(model, after[:, i], cache)
        steps.append(logits)
    together = jnp.stack(steps, 1)
    for row in range(len(LENGTHS)):
        alone = forward(model, jnp.concatenate([tokens[row][mask[row]], after[row]]))
        assert relative_error(together[row], alone[-12:]) < TOLERANCE


def test_packed_equals_apart(model):
    sizes = (19, 5, 1, 20)
    documents = [random_tokens(size, seed=size) for size in sizes]
    segment_ids = jnp.repeat(jnp.array([3, 0, 7, 1]), jnp.array(sizes))
    packed = jnp.pad(jnp.concatenate(documents), (0, 3))
    segment_ids = jnp.pad(segment_ids, (0, 3), constant_values=-1)
    logits = forward(model, packed, segment_ids=segment_ids)
    for document, start in zip(documents, np.cumsum((0, *sizes)), strict=False):
        mine = logits[start : start + len(document)]
        assert relative_error(mine, forward(model, document)) < TOLERANCE


def test_scanned_equals_unrolled(model):
    unrolled = model.unstacked()
    assert unrolled.decoder.blocks[0].repeats is None
    tokens = random_tokens(2, 40)
    scanned_output, unrolled_output = eqx.filter_jit(model)(tokens), unrolled(tokens)
    assert relative_error(unrolled_output.logits, scanned_output.logits) < TOLERANCE
    assert relative_error(unrolled_output.router_logits, scanned_output.router_logits) < TOLERANCE


@pytest.mark.parametrize("batch_shape", [(), (1,), (2, 3)])
def test_any_batch_axes(model, batch_shape):
    rows = random_tokens(6, 20)[: np.prod(batch_shape, dtype=int)]
    apart = jnp.stack([forward(model, row) for row in rows])
    tokens = rows.reshape(*batch_shape, 20)
    assert relative_error(forward(model, tokens), apart.reshape(*batch_shape, 20, -1)) < TOLERANCE
    cache = model.empty_cache(batch_shape, 20)
    logits, _ = l4.prefill(model, tokens, cache)
    assert relative_error(logits, apart[:, -1].reshape(*batch_shape, -1)) < TOLERANCE


def test_explicit_positions_equal_counted_ones(model):
    tokens = random_tokens(20)
    assert (
        relative_error(forward(model, tokens, positions=jnp.arange(20)), forward(model, tokens))
        == 0
    )


def test_a_cache_may_start_anywhere(model):
    tokens = random_tokens(2, 30)
    whole = forward(model, tokens, positions=jnp.broadcast_to(100_005 + jnp.arange(30), (2, 30)))
    logits, cache = feed(model, tokens[:, :7], model.empty_cache((2,), 30, start=100_005))
    assert relative_error(logits, whole[:, :7]) < TOLERANCE
    logits, cache = feed(model, tokens[:, 7:], cache)
    assert relative_error(logits, whole[:, 7:]) < TOLERANCE


def test_local_layers_cache_one_chunk():
    model = random_model(SCOUT)
    cache = model.empty_cache((3,), 64)
    slots = [layer.slots for layer in cache.blocks[0]]
    assert slots == [8, 64]
    # Against the arithmetic of the text: keys and values of 2 heads of 16 float32.
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(cache.blocks[0])) == (
        3 * 2 * (8 + 64) * 2 * 2 * 16 * 4
    )


def test_memory_of_scouts_cache_is_as_published():
    """48 KiB a token, and 1.125 GiB for the chunks of the local layers, in bfloat16."""
    model = eqx.filter_eval_shape(
        l4.Llama4, l4.Llama4Config.scout(), dtype=jnp.bfloat16, key=jax.random.key(0)
    )
    sizes = [
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.blocks[0]))
        for capacity in (100_000, 200_000)
        for cache in [eqx.filter_eval_shape(lambda m, n=capacity: m.empty_cache((1,), n), model)]
    ]
    assert sizes[1] - sizes[0] == 100_000 * 48 * 1024
    assert sizes[0] - 100_000 * 48 * 1024 == 1.125 * 2**30


def test_dropout_needs_a_key_and_is_random():
    config = l4.Llama4Config(l4.TextConfig(**{**vars(SCOUT), "attention_dropout": 0.5}))
    model, tokens = l4.Llama4(config, key=jax.random.key(0)), random_tokens(2, 20)
    plain = l4.Llama4(l4.Llama4Config(SCOUT), key=jax.random.key(0))
    assert relative_error(forward(model, tokens), forward(plain, tokens)) == 0
    a, b, again = (forward(model, tokens, key=jax.random.key(i)) for i in (1, 2, 1))
    assert relative_error(a, again) == 0
    assert relative_error(a, b) > 1e-3
    assert relative_error(a, forward(plain, tokens)) > 1e-3


def test_user_errors_are_sentences(model):
    tokens = random_tokens(2, 10)
    cache = model.empty_cache((2,), 12)
    _, cache = l4.prefill(model, tokens, cache)
    with pytest.raises(RuntimeError, match="holds 12 tokens of a row"):
        jax.block_until_ready(l4.prefill(model, tokens, cache))
    with pytest.raises(RuntimeError, match="ids go from 0 to 255"):
        jax.block_until_ready(forward(model, tokens.at[0, 3].set(256)))
    with pytest.raises(ValueError, match="made for the batch shape"):
        model(tokens[:1], cache=cache)
    with pytest.raises(ValueError, match="excludes positions and segment_ids"):
        model(tokens, cache=cache, positions=tokens)
