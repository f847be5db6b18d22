"""The norms against `transformers` and torch; the cast comes before the weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.llama4.modeling_llama4 import Llama4TextRMSNorm

from llama4_eqx.layers import LayerNorm, RMSNorm
from tests.toys import as_torch, relative_error


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rms_norm_is_transformers(dtype):
    x, weight = (jax.random.normal(jax.random.key(i), (3, 64)) * 3 for i in (0, 1))
    x, weight = x.astype(dtype), weight[0].astype(dtype)
    norm = RMSNorm(64, eps=1e-5, dtype=dtype)
    norm = jax.tree.map(lambda _: weight, norm)
    theirs = Llama4TextRMSNorm(64, eps=1e-5).to(getattr(torch, dtype))
    with torch.no_grad():
        theirs.weight.copy_(as_torch(weight.astype(jnp.float32)))
        truth = theirs(as_torch(x.astype(jnp.float32)).to(getattr(torch, dtype))).float()
    ours = norm(x)
    assert ours.dtype == x.dtype
    if dtype == "float32":
        assert relative_error(ours, truth) < 1e-6
    else:  # the same roundings: equal to the bit
        np.testing.assert_array_equal(ours.astype(jnp.float32), truth)


def test_the_product_comes_after_the_cast():
    """In bfloat16 the two orders differ, so this can tell them apart."""
    x = jax.random.normal(jax.random.key(0), (50, 64)).astype(jnp.bfloat16)
    weight = (1 + jax.random.uniform(jax.random.key(1), (64,))).astype(jnp.bfloat16)
    norm = jax.tree.map(lambda _: weight, RMSNorm(64, eps=1e-5, dtype=jnp.bfloat16))
    x32 = x.astype(jnp.float32)
    normalised = x32 / jnp.sqrt(jnp.mean(x32**2, -1, keepdims=True) + 1e-5)
    before = (normalised * weight.astype(jnp.float32)).astype(jnp.bfloat16)
    after = normalised.astype(jnp.bfloat16) * weight
    assert jnp.mean(norm(x) == after) > 0.99  # rsqrt and division may round apart
    assert jnp.mean(norm(x) == before) < 0.9


def test_layer_norm_is_torchs():
    x, w, b = (jax.random.normal(jax.random.key(i), (3, 32)) for i in range(3))
    norm = LayerNorm(32, eps=1e-5, dtype=jnp.float32)
    leaves = iter((w[0], b[0]))
    norm = jax.tree.map(lambda _: next(leaves), norm)
    truth = torch.nn.functional.layer_norm(
        as_torch(x), (32,), as_torch(w[0]), as_torch(b[0]), eps=1e-5
    )
    assert relative_error(norm(x), truth) < 1e-6
