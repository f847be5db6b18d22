"""Products with a checkpoint's weights, against NumPy's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama4_eqx.layers.linear import linear
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
