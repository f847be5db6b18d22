"""Experts as separate arrays: the same model in another form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import llama4_eqx as l4
from llama4_eqx.distributed import TENSOR, shard
from llama4_eqx.generation import generate_output
from llama4_eqx.layers.grouped import grouped_mlp
from llama4_eqx.layers.quantized import quantized
from llama4_eqx.layers.unstacked import unstacked_weight
from tests.toys import MAVERICK

pytestmark = pytest.mark.slow

EXPERTS, HIDDEN, FF = 5, 24, 40


@pytest.fixture
def weights():
    shapes = (EXPERTS, HIDDEN, FF), (EXPERTS, HIDDEN, FF), (EXPERTS, FF, HIDDEN)
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(jax.random.normal(key, shape) / 5 for key, shape in zip(keys, shapes, strict=True))


@pytest.mark.parametrize(
    "sizes", [(0, 0, 1, 0, 0), (0, 0, 0, 0, 0), (3, 0, 9, 1, 0), (40, 3, 0, 0, 20)], ids=str
)
def test_values_and_gradients(weights, sizes):
    """With rows of no expert at the end, which give zeros and get none."""
    sizes = jnp.array(sizes)
    rows = jax.random.normal(jax.random.key(1), (max(1, int(sizes.sum()) + 2), HIDDEN))
    rows = rows[:1] if int(sizes.sum()) == 1 else rows
    apart = tuple(map(unstacked_weight, weights))

    def run(backend, rows, weights):
        out, vjp = jax.vjp(lambda r, w: grouped_mlp(r, *w, sizes, backend=backend), rows, weights)
        d_rows, d_weights = vjp(jnp.cos(rows))
        return out, d_rows, d_weights

    out, d_rows, d_weights = run(None, rows, apart)
    truth, d_rows_truth, d_weights_truth = run("dense", rows, weights)
    np.testing.assert_allclose(out, truth, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(d_rows, d_rows_truth, rtol=1e-5, atol=1e-5)
    for one, other in zip(d_weights, d_weights_truth, strict=True):
        np.testing.assert_allclose(one.stacked(), other, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(apart[0].stacked(), weights[0])
    np.testing.assert_array_equal(run("dense", rows, apart)[0], truth)


def test_of_few_bits(weights):
    sizes = jnp.array((3, 0, 9, 1, 0))
    rows = jax.random.normal(jax.random.key(1), (13, HIDDEN))
    small = tuple(quantized(weight, (1,)) for weight in weights)
    apart = tuple(map(unstacked_weight, small))
    for part in (lambda f: f(rows), lambda f: jax.grad(lambda r: jnp.sum(f(r) ** 2))(rows)):
        ours = part(lambda r: grouped_mlp(r, *apart, sizes))
        truth = part(lambda r: grouped_mlp(r, *small, sizes))
        np.testing.assert_allclose(ours, truth, rtol=1e-4, atol=1e-4)  # a rounded number may flip


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("quantize", [False, True])
def test_a_model_decodes_the_same(quantize, rows):
    model = l4.Llama4(l4.Llama4Config(MAVERICK), key=jax.random.key(0))
    model = l4.quantize(model) if quantize else model
    tokens = jax.random.randint(jax.random.key(1), (rows, 9), 0, 250)
    found = [
        generate_output(form, tokens, max_new_tokens=12)
        for form in (model.unstacked(), model.unstacked(experts=True))
    ]
    np.testing.assert_array_equal(found[0].tokens, found[1].tokens)
    np.testing.assert_allclose(found[0].logprobs, found[1].logprobs, rtol=1e-4, atol=1e-4)


def test_it_is_a_form_for_one_device_and_for_memory(tmp_path):
    model = l4.Llama4(l4.Llama4Config(MAVERICK), key=jax.random.key(0)).unstacked(experts=True)
    with pytest.raises(ValueError, match="save the model that it was made from"):
        l4.save_checkpoint(model, tmp_path / "model")
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(AxisType.Auto,))
    with pytest.raises(ValueError, match="shard the model that they were made from"):
        shard(model, mesh, TENSOR)
