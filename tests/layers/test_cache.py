"""The ring of a layer's cache, against a plain list of what each row was told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama4_eqx.layers.cache import KeysValues, LayerCache
from llama4_eqx.layers.mask import token_positions


def keys_of(positions):
    """Keys and values that say their token's position."""
    k = jnp.broadcast_to(
        positions[:, None, :, None], (*positions.shape[:1], 1, positions.shape[1], 2)
    )
    return k.astype(jnp.float32), -k.astype(jnp.float32)


@pytest.mark.parametrize("slots", [3, 8, 20])
@pytest.mark.parametrize("calls", [(5, 1, 1, 7), (1,) * 12, (14,)])
def test_what_a_ring_holds(slots, calls):
    """After each call the newest `slots` positions of each row, padding left out."""
    start = jnp.array([0, 4])
    cache = LayerCache.empty((2,), kv_heads=1, slots=slots, head_dim=2, dtype=jnp.float32)
    end, random = start, np.random.default_rng(0)
    for size in calls:
        mask = jnp.asarray(random.random((2, size)) < 0.8)
        tokens = token_positions((2, size), mask=mask, start=end)
        new_end = end + jnp.sum(mask, -1)
        cache = cache.update(KeysValues(*keys_of(tokens.positions), tokens), new_end)
        held = cache.read(start, new_end)
        for row in range(2):
            real = np.asarray(held.tokens.segments[row]) >= 0
            positions = np.asarray(held.tokens.positions[row])[real]
            first = max(int(start[row]), int(new_end[row]) - slots)
            assert sorted(positions) == list(range(first, int(new_end[row])))
            np.testing.assert_array_equal(held.k[row, 0, real, 0], positions)
            np.testing.assert_array_equal(held.v[row, 0, real, 1], -positions)
        end = new_end


def test_concatenation_keeps_order():
    tokens = token_positions((2, 4))
    one = KeysValues(*keys_of(tokens.positions), tokens)
    both = one.concatenate(one)
    np.testing.assert_array_equal(both.k[:, :, :4], both.k[:, :, 4:])
    assert both.tokens.positions.shape == (2, 8)


def test_a_cache_is_not_changed_in_place():
    tokens = token_positions((1, 2))
    empty = LayerCache.empty((1,), kv_heads=1, slots=4, head_dim=2, dtype=jnp.float32)
    full = empty.update(KeysValues(*keys_of(tokens.positions + 1), tokens), jnp.array([2]))
    assert not jnp.any(empty.k)
    assert jnp.any(full.k)
    assert jax.tree.structure(full) == jax.tree.structure(empty)
