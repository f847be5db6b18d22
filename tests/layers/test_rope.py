"""Rotary embeddings against complex multiplication and `transformers`' frequencies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from transformers.models.llama4.modeling_llama4 import Llama4TextRotaryEmbedding

from llama4_eqx.layers import RotaryEmbedding
from tests.toys import SCOUT, TOYS, relative_error


@pytest.mark.parametrize("config", [SCOUT, TOYS["maverick"], TOYS["scaled-1-4"]])
def test_frequencies_are_transformers(config):
    scaling = config.rope_scaling
    ours = RotaryEmbedding(config.head_dim, config.rope_theta)
    if scaling is not None:
        ours = RotaryEmbedding(
            config.head_dim,
            config.rope_theta,
            scaling.factor,
            scaling.low_freq_factor,
            scaling.high_freq_factor,
            scaling.original_max_position_embeddings,
        )
    theirs = Llama4TextRotaryEmbedding(transformers.Llama4TextConfig(**config.to_hf()))
    np.testing.assert_array_equal(ours.frequencies(), theirs.inv_freq)


def test_interleaved_pairs_turn_as_complex_numbers():
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, 8))
    positions = jnp.array([[0, 1, 2, 3, 4], [7, 100, 5000, 3, 10**6]])
    rope = RotaryEmbedding(8, 10000.0)
    pairs = np.asarray(x, np.float64).reshape(2, 5, 3, 4, 2)
    angles = np.asarray(positions)[..., None] * np.asarray(rope.frequencies(), np.float64)
    truth = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)[:, :, None]
    truth = np.stack([truth.real, truth.imag], -1).reshape(x.shape)
    # An angle of a million radians is rounded to a sixteenth of one in float32, so not that row.
    rotated = rope(positions)(x)
    assert relative_error(rotated[0], truth[0]) < 1e-6
    assert relative_error(rotated[1, :2], truth[1, :2]) < 1e-5


def test_no_tokens():
    rope = RotaryEmbedding(8, 10000.0)
    assert rope(jnp.zeros((2, 0), jnp.int32))(jnp.zeros((2, 0, 3, 8))).shape == (2, 0, 3, 8)


def test_rotation_is_in_float32_and_keeps_the_dtype():
    x = jax.random.normal(jax.random.key(0), (4, 2, 8)).astype(jnp.bfloat16)
    rotation = RotaryEmbedding(8, 10000.0)(jnp.arange(4) + 1000)
    truth = rotation(x.astype(jnp.float32))
    rotated = rotation(x)
    assert rotated.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rotated, truth.astype(jnp.bfloat16))
