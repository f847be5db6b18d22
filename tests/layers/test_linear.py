"""Products with a checkpoint's weights, against NumPy's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama4_eqx.layers.linear import linear, lookup
from llama4_eqx.layers.quantized import quantized
from tests.toys import relative_error


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("batch", [(), (1,), (1, 1), (2,), (0,), (2, 3)])
@pytest.mark.parametrize("outputs", [1, 7, 8])
def test_products(batch, outputs):
    """One row goes another way than many, if it can be halved."""
    x, weight = numbers(*batch, 5), numbers(outputs, 5, seed=1)
    out = linear(jnp.asarray(x), jnp.asarray(weight))
    np.testing.assert_allclose(out, x @ weight.T, rtol=1e-5, atol=1e-6)


def test_derivatives_and_vmap_of_one_row():
    x, weight, seen = numbers(3, 1, 5), numbers(8, 5, seed=1), numbers(3, 1, 8, seed=2)
    out = jax.vmap(linear, in_axes=(0, None))(jnp.asarray(x), jnp.asarray(weight))
    assert relative_error(out, x @ weight.T) < 1e-6
    dx, dw = jax.grad(lambda x, w: jnp.sum(linear(x, w) * seen[0]), argnums=(0, 1))(
        jnp.asarray(x[0]), jnp.asarray(weight)
    )
    assert relative_error(dx, seen[0] @ weight) < 1e-6
    assert relative_error(dw, seen[0].T @ x[0]) < 1e-6
    _, tangent = jax.jvp(lambda x: linear(x, jnp.asarray(weight)), (x[0],), (x[1],))
    assert relative_error(tangent, x[1] @ weight.T) < 1e-6


def test_one_row_is_a_batch_of_two_on_cpus():
    def program(rows):
        weight = jax.ShapeDtypeStruct((8, 5), jnp.float32)
        x = jax.ShapeDtypeStruct((rows, 5), jnp.float32)
        return jax.jit(linear).trace(x, weight).lower(lowering_platforms=("cpu",)).as_text()

    assert "batching_dims = [0] x [0]" in program(1)
    assert "batching_dims" not in program(2)


def in_bfloat16(*arrays):
    """The arrays rounded to bfloat16, and the same numbers in float64."""
    rounded = [jnp.asarray(array, jnp.bfloat16) for array in arrays]
    return rounded, [np.asarray(array, np.float64) for array in rounded]


@pytest.mark.parametrize("batch", [(), (1,), (2,), (0,), (2, 3)])
@pytest.mark.parametrize("inputs", [5, 16, 64])
def test_products_of_bfloat16_are_rounded_once(batch, inputs):
    """One row goes another way than many, if its inputs can be cut into blocks."""
    (x, weight), (wide_x, wide_weight) = in_bfloat16(
        numbers(*batch, inputs), numbers(8, inputs, seed=1)
    )
    out = linear(x, weight)
    assert out.dtype == jnp.bfloat16
    # Half a unit of bfloat16's last place, and float32's error where the sum cancels.
    np.testing.assert_allclose(
        np.asarray(out, np.float64), wide_x @ wide_weight.T, rtol=2**-8, atol=1e-5
    )


def test_derivatives_and_vmap_of_bfloat16():
    arrays = numbers(3, 1, 16), numbers(8, 16, seed=1), numbers(3, 1, 8, seed=2)
    (x, weight, seen), (wide_x, wide_weight, wide_seen) = in_bfloat16(*arrays)
    out = jax.vmap(linear, in_axes=(0, None))(x, weight)
    assert relative_error(out, wide_x @ wide_weight.T) < 2**-8
    dx, dw = jax.vjp(linear, x[0], weight)[1](seen[0])
    assert dx.dtype == dw.dtype == jnp.bfloat16
    assert relative_error(dx, wide_seen[0] @ wide_weight) < 2**-8
    assert relative_error(dw, wide_seen[0].T @ wide_x[0]) < 2**-8
    _, tangent = jax.jvp(lambda x: linear(x, weight), (x[0],), (x[1],))
    assert relative_error(tangent, wide_x[1] @ wide_weight.T) < 2**-8


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_one_row_isnt_rounded_for_int8(dtype):
    """Several are, on CPUs, to numbers that are wrong by up to a part in 254."""
    x, weight = numbers(1, 64), quantized(jnp.asarray(numbers(8, 64, seed=1)), inputs=(1,))
    x = jnp.asarray(x, dtype)
    expected = np.asarray(x, np.float64) @ np.asarray(weight.dequantized(), np.float64).T
    tolerance = 1e-6 if dtype == jnp.float32 else 2**-8  # rounded once
    assert relative_error(linear(x, weight), expected) < tolerance
    several = linear(jnp.concatenate([x, x]), weight)
    assert 1e-4 < relative_error(several[:1], expected) < 2e-2


def test_a_loop_converts_no_weight_of_int8():
    size = 512
    weight = quantized(jnp.asarray(numbers(size, size)), inputs=(1,))

    def products(x, weight):
        return jax.lax.fori_loop(0, 3, lambda _, x: linear(x, weight), x)

    memory = jax.jit(products).lower(jnp.ones((1, size)), weight).compile().memory_analysis()
    assert memory.temp_size_in_bytes < size * size


@pytest.mark.parametrize("rows", [1, 2])
def test_a_loop_converts_no_weight_of_bfloat16(rows):
    """XLA would, ahead of the loop, and hold twice the weight's bytes for as long as it runs."""
    size = 512
    weight = jax.ShapeDtypeStruct((size, size), jnp.bfloat16)

    def products(x, weight):
        return jax.lax.fori_loop(0, 3, lambda _, x: linear(x, weight), x)

    def lookups(token, table):
        def next_tokens(_, tokens):
            return jnp.argmax(lookup(table, tokens), axis=-1)

        return jax.lax.fori_loop(0, 3, next_tokens, token)

    x = jax.ShapeDtypeStruct((rows, size), jnp.bfloat16)
    tokens = jax.ShapeDtypeStruct((rows,), jnp.int32)
    for program, state in ((products, x), (lookups, tokens)):
        memory = jax.jit(program).lower(state, weight).compile().memory_analysis()
        assert memory.temp_size_in_bytes < size * size
