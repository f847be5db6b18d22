"""Large parameters are drawn in little memory, and each device draws its own part."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from llama4_eqx.layers.initializers import LARGE, normal

SHAPES = [(16, 512, 256), (4 * 577, 600), (LARGE,), (40, 16, 2048)]


def drawn(key, shape, dtype=jnp.float32):
    return normal(0.02)(key, shape, dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_numbers_are_normal_and_independent(shape):
    numbers = np.asarray(drawn(jax.random.key(0), shape)).reshape(-1) / 0.02
    for power, moment in enumerate((0, 1, 0, 3), start=1):
        error = np.std(numbers**power) / np.sqrt(numbers.size)
        assert abs(np.mean(numbers**power) - moment) < 5 * error
    assert len(np.unique(numbers)) > 0.8 * len(numbers)  # float32 has but 2²³ uniform numbers
    assert abs(np.mean(numbers[1:] * numbers[:-1])) < 5 / np.sqrt(numbers.size)


def test_small_ones_are_jaxs_own():
    key = jax.random.key(3)
    truth = jax.nn.initializers.normal(0.02)(key, (64, 32), jnp.float32)
    np.testing.assert_array_equal(drawn(key, (64, 32)), truth)


@pytest.mark.parametrize("shape", SHAPES)
def test_stacked_layers_are_those_drawn_alone(shape):
    keys = jax.random.split(jax.random.key(1), (2, 3))
    stacked = jax.vmap(jax.vmap(lambda key: drawn(key, shape)))(keys)
    np.testing.assert_array_equal(stacked[1, 2], drawn(keys[1, 2], shape))
    old = jax.random.key_data(keys[0, 1])
    np.testing.assert_array_equal(stacked[0, 1], drawn(old, shape))


@pytest.mark.parametrize("layers", [(), (3,)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_temporaries_are_small(layers, dtype):
    def make(keys):
        draw = lambda key: drawn(key, (16, 512, 256), jnp.dtype(dtype))  # noqa: E731
        return jax.vmap(draw)(keys) if layers else draw(keys)

    key = jax.random.key(0)
    keys = jax.random.split(key, layers) if layers else key
    memory = jax.jit(make).lower(keys).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.25 * memory.output_size_in_bytes


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_each_device_draws_its_own_part(axis):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    shape, key = (16, 512, 256), jax.random.key(0)
    sharding = NamedSharding(mesh, P(*(["x" if i == axis else None for i in range(3)])))
    jitted = jax.jit(lambda key: drawn(key, shape), out_shardings=sharding)
    compiled = jitted.lower(key).compile()
    assert not re.search("all-|collective-|reduce-scatter", compiled.as_text())
    memory = compiled.memory_analysis()
    assert memory.output_size_in_bytes == 16 * 512 * 256 * 4 // 8
    assert memory.temp_size_in_bytes < 0.25 * memory.output_size_in_bytes
    np.testing.assert_array_equal(jitted(key), drawn(key, shape))
