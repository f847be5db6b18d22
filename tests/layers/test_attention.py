"""One attention layer: temperature steps, chunks of absolute positions, its own cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama4_eqx.layers import (
    Attention,
    Context,
    RotaryEmbedding,
    TemperatureTuning,
    token_positions,
)
from tests.toys import relative_error


def layer(*, use_rope=True, chunk_size=8):
    return Attention(
        16,
        4,
        2,
        8,
        use_rope=use_rope,
        chunk_size=chunk_size,
        qk_norm_eps=1e-5,
        temperature=TemperatureTuning(0.1, 4),
        bias=True,
        dropout=0.0,
        init_std=0.5,
        dtype=jnp.float32,
        key=jax.random.key(0),
    )


def context(shape, **given):
    tokens = token_positions(shape, **given)
    return Context(tokens, RotaryEmbedding(8, 10000.0)(tokens.positions))


def test_temperature_steps_are_whole_at_every_position():
    """At positions where float32 or bfloat16 would round across a step."""
    positions = np.array([0, 2, 3, 6, 7, 8191, 131070, 131071, 2**24 + 1, 2**30])
    q = jnp.ones((len(positions), 1, 1))
    scaled = TemperatureTuning(0.1, 4)(q, jnp.asarray(positions, jnp.int32))[:, 0, 0]
    truth = 1 + 0.1 * np.log1p((positions + 1) // 4)
    np.testing.assert_allclose(scaled, truth, rtol=1e-6)


@pytest.mark.parametrize("use_rope", [True, False])
def test_a_chunk_alone_is_the_chunk_in_its_row(use_rope):
    attention = layer(use_rope=use_rope)
    x = jax.random.normal(jax.random.key(1), (1, 24, 16))
    whole, _ = attention(x, context((1, 24)))
    for start in (0, 8, 16):
        part = slice(start, start + 8)
        alone, _ = attention(x[:, part], context((1, 8), start=jnp.array([start])))
        assert relative_error(whole[:, part], alone) < 1e-5


def test_global_layers_see_everything_before():
    attention = layer(use_rope=False, chunk_size=None)
    x = jax.random.normal(jax.random.key(1), (24, 16))
    out, _ = attention(x, context((24,)))
    changed, _ = attention(x.at[3].add(1), context((24,)))
    moved = np.flatnonzero(np.abs(np.asarray(changed - out)).max(-1) > 1e-6)
    np.testing.assert_array_equal(moved, np.arange(3, 24))


@pytest.mark.parametrize(("chunk_size", "slots"), [(8, 8), (None, 30), (64, 30)])
def test_it_makes_a_cache_of_its_own_size(chunk_size, slots):
    cache = layer(chunk_size=chunk_size).empty_cache((3,), 30)
    assert cache.k.shape == cache.v.shape == (3, 2, slots, 8)
