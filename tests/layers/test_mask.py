"""Who sees whom, against a loop over pairs and against `transformers`; where tokens stand."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import DynamicCache, Llama4TextConfig
from transformers.masking_utils import create_causal_mask, create_chunked_causal_mask

from llama4_eqx.layers.mask import TokenPositions, attention_mask, token_positions

CHUNK = 8
CONFIG = Llama4TextConfig(
    hidden_size=8,
    num_hidden_layers=4,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    attention_chunk_size=CHUNK,
    attn_implementation="eager",
)


def by_loop(queries: TokenPositions, keys: TokenPositions, chunk_size: int | None) -> np.ndarray:
    def pair(b, i, j):
        position, segment = queries.positions[b][i], queries.segments[b][i]
        if keys.segments[b][j] < 0 or keys.segments[b][j] != segment:
            return False
        if keys.positions[b][j] > position:
            return False
        return chunk_size is None or keys.positions[b][j] // chunk_size == position // chunk_size

    queries, keys = jax.tree.map(np.ndarray.tolist, jax.device_get((queries, keys)))
    shape = len(queries.positions), len(queries.positions[0]), len(keys.positions[0])
    return np.array([pair(*index) for index in np.ndindex(shape)]).reshape(shape)


def by_transformers(
    mask: np.ndarray, chunk_size: int | None, *, past: int = 0, positions: jax.Array | None = None
) -> np.ndarray:
    """Whom the last tokens see, after `past` others in the cache; where documents are packed,
    `positions` show it."""
    tokens, cache = torch.tensor(mask), DynamicCache(config=CONFIG)
    batch, length = tokens.shape
    if past:
        for layer in range(CONFIG.num_hidden_layers):
            cache.update(torch.zeros(batch, 1, past, 4), torch.zeros(batch, 1, past, 4), layer)
    make = create_causal_mask if chunk_size is None else create_chunked_causal_mask
    embeds = torch.zeros(batch, length - past, CONFIG.hidden_size)
    if positions is None:
        bias = make(CONFIG, embeds, tokens.long(), cache)
    else:
        bias = make(CONFIG, embeds, None, None, position_ids=torch.tensor(np.asarray(positions)))
    assert isinstance(bias, torch.Tensor)
    seen = (bias[:, 0] == 0).numpy()
    # A chunk's cache has let go of the oldest keys.
    return np.pad(seen, ((0, 0), (0, 0), (length - seen.shape[2], 0)))


@pytest.mark.parametrize("chunk_size", [None, 1, 5, CHUNK])
def test_visible_is_the_loop(chunk_size):
    rng = np.random.default_rng(0)
    queries, keys = (
        TokenPositions(
            jnp.asarray(rng.integers(0, 20, (2, size), dtype=np.int32)),
            jnp.asarray(rng.integers(-1, 2, (2, size), dtype=np.int32)),
        )
        for size in (13, 29)
    )
    seen = attention_mask(queries, keys, chunk_size)
    assert np.array_equal(seen, by_loop(queries, keys, chunk_size))
    assert seen.any()
    assert not seen.all()


@pytest.mark.parametrize("chunk_size", [None, CHUNK])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_visible_is_transformers(chunk_size, padding):
    count = np.array([[30], [27], [9]]) if padding != "none" else np.full((3, 1), 30)
    mask = np.arange(30) >= 30 - count if padding == "left" else np.arange(30) < count
    where = token_positions(mask.shape, mask=jnp.asarray(mask))
    seen = np.asarray(attention_mask(where, where, chunk_size))
    # Padding sees nobody here, while theirs sees what a token in its stead would.
    assert np.array_equal(seen, by_transformers(mask, chunk_size) & mask[:, :, None])
    assert not seen[~mask].any()


@pytest.mark.parametrize("chunk_size", [None, CHUNK])
@pytest.mark.parametrize("past", [7, 8, 13, 20])
@pytest.mark.parametrize("new", [1, 11])
def test_visible_is_transformers_with_a_cache(chunk_size, past, new):
    mask = np.arange(past + new) >= np.array([[0], [3], [5]])
    before, after = jnp.asarray(mask[:, :past]), jnp.asarray(mask[:, past:])
    old = token_positions(before.shape, mask=before)
    queries = token_positions(after.shape, mask=after, start=before.sum(-1))
    keys = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), old, queries)
    seen = attention_mask(queries, keys, chunk_size)
    assert np.array_equal(seen, by_transformers(mask, chunk_size, past=past))


@pytest.mark.parametrize("chunk_size", [None, CHUNK])
def test_visible_is_transformers_with_packing(chunk_size):
    ids = jnp.repeat(jnp.array([4, 0, 4]), jnp.array([13, 20, 5]), total_repeat_length=38)[None]
    where = token_positions(ids.shape, segment_ids=ids)
    expected = by_transformers(np.ones(ids.shape, bool), chunk_size, positions=where.positions)
    assert np.array_equal(attention_mask(where, where, chunk_size), expected)


def test_places_of_a_plain_row():
    where = token_positions((2, 3))
    assert where.positions.tolist() == [[0, 1, 2]] * 2
    assert where.segments.tolist() == [[0, 0, 0]] * 2
    assert where.positions.dtype == where.segments.dtype == jnp.int32


def test_places_count_real_tokens_only():
    mask = jnp.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 0, 0, 1, 1, 0], [0] * 6], bool)
    where = token_positions(mask.shape, mask=mask, start=jnp.array([0, 7, 1_000_000, 3]))
    assert where.positions.tolist() == [
        [0, 0, 0, 1, 2, 3],
        [7, 8, 9, 0, 0, 0],
        [1_000_000, 0, 0, 1_000_001, 1_000_002, 0],
        [0] * 6,
    ]
    assert np.array_equal(where.segments, np.where(mask, 0, -1))


def test_places_of_documents():
    ids = jnp.array([[9, 9, 9, 2, 2, 5, -1, -3], [-1, -1, 4, 4, 1, 4, 4, 4]])
    where = token_positions(ids.shape, segment_ids=ids)
    assert where.positions.tolist() == [[0, 1, 2, 0, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0, 1, 2]]
    # The second 4 of a row is another document than the first.
    assert where.segments.tolist() == [[0, 0, 0, 1, 1, 2, -1, -1], [-1, -1, 1, 1, 2, 3, 3, 3]]


def test_places_of_documents_with_a_mask():
    ids = jnp.array([[1, 1, 1, 1, 6, 6, 6]])
    mask = jnp.array([[0, 1, 0, 1, 0, 1, 1]], bool)
    where = token_positions(ids.shape, segment_ids=ids, mask=mask)
    assert where.positions.tolist() == [[0, 0, 0, 1, 0, 0, 1]]
    assert where.segments.tolist() == [[-1, 0, -1, 0, -1, 1, 1]]


def test_only_a_rows_first_document_is_resumed():
    ids = jnp.array([[-1, 3, 3, 8, 8, 8]])
    where = token_positions(ids.shape, segment_ids=ids, start=jnp.array([40]))
    assert where.positions.tolist() == [[0, 40, 41, 0, 1, 2]]


def test_given_positions_are_kept():
    mask, positions = jnp.array([True, True, False]), jnp.array([5, 900, 7])
    where = token_positions((3,), mask=mask, positions=positions)
    assert where.positions.tolist() == [5, 900, 0]
    assert where.segments.tolist() == [0, 0, -1]


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_any_batch_axes(chunk_size):
    mask = jnp.arange(5) >= jnp.array([[[0], [2]], [[1], [4]]])
    start = jnp.array([[0, 10], [20, 31]])
    whole = token_positions(mask.shape, mask=mask, start=start)
    seen = attention_mask(whole, whole, chunk_size)
    for i, j in np.ndindex(start.shape):
        row = token_positions((5,), mask=mask[i, j], start=start[i, j])
        assert eqx.tree_equal(row, jax.tree.map(lambda x, i=i, j=j: x[i, j], whole))
        assert np.array_equal(seen[i, j], attention_mask(row, row, chunk_size))
