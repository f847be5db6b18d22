"""Models of few bits as folders that `transformers` opens, with `compressed-tensors`."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import llama4_eqx as l4
from llama4_eqx.layers import dequantized
from tests.toys import MAVERICK, MULTIMODAL, SCOUT, as_torch, random_tokens, relative_error

pytestmark = pytest.mark.slow

KINDS = {
    "int8": l4.Quantization(),
    "float8": l4.Quantization(dtype=jnp.float8_e4m3fn),
    "int4": l4.Quantization(dtype=jnp.int4, group_size=16),
    "int8 in groups": l4.Quantization(group_size=16),
    "attention": l4.Quantization(("decoder.*self_attn.*_proj",)),
    "experts": l4.Quantization(("decoder.*experts.*_proj",)),
    "not the head": l4.Quantization(("decoder.*_proj",)),
}


def small(config, quantization=None, dtype=jnp.float32):
    model = l4.Llama4(l4.Llama4Config(config), dtype=dtype, key=jax.random.key(0))
    return l4.quantize(model, quantization)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_opens_it_to_the_same_logits(kind, tmp_path):
    model = small(MAVERICK, KINDS[kind])
    l4.save_checkpoint(model, tmp_path / "model")
    reference, report = transformers.Llama4ForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokens = random_tokens(2, 20)
    with torch.no_grad():
        truth = reference(as_torch(tokens, torch.long)).logits
    logits = eqx.filter_jit(lambda m, t: m(t).logits)(dequantized(model), tokens)
    assert relative_error(logits, truth) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_it_loads_as_it_was(kind, tmp_path):
    """Dequantised; or of few bits again, with the same numbers."""
    model = small(MAVERICK, KINDS[kind])
    l4.save_checkpoint(model, tmp_path / "model", max_shard_bytes=30_000)
    assert eqx.tree_equal(l4.load_checkpoint(tmp_path / "model"), dequantized(model))
    again = l4.load_checkpoint(tmp_path / "model", quantize=KINDS[kind])
    for ours, saved in zip(jax.tree.leaves(again), jax.tree.leaves(model), strict=True):
        if saved.dtype in (jnp.int8, jnp.uint8):
            np.testing.assert_array_equal(ours, saved)
        elif ours.dtype == jnp.float32:
            np.testing.assert_allclose(ours, saved, rtol=1e-6)  # a quotient of rounded products


def test_unstacked_tied_and_multimodal_ones(tmp_path):
    tied = replace(SCOUT, tie_word_embeddings=True)
    for name, model in {
        "unstacked": small(SCOUT).unstacked(),
        "tied": small(tied),
        "bfloat16": small(SCOUT, dtype=jnp.bfloat16),
        "multimodal": l4.quantize(l4.Llama4(MULTIMODAL, key=jax.random.key(1))),
    }.items():
        l4.save_checkpoint(model, tmp_path / name)
        loaded, truth = l4.load_checkpoint(tmp_path / name), dequantized(model)
        loaded, truth = loaded.unstacked(), truth.unstacked()
        for ours, saved in zip(jax.tree.leaves(loaded), jax.tree.leaves(truth), strict=True):
            wide = ours.astype(jnp.float32), saved.astype(jnp.float32)
            # In bfloat16 the scales are float32, and so are the products here, then rounded.
            np.testing.assert_allclose(*wide, rtol=0 if name != "bfloat16" else 2**-8)


def test_a_folder_that_was_replaced_is_read_anew(tmp_path):
    """Also if a plain model takes the place of one of few bits, under the same names."""
    model = l4.Llama4(l4.Llama4Config(SCOUT), key=jax.random.key(0))
    for form in (l4.quantize(model), model, l4.quantize(model, KINDS["float8"])):
        l4.save_checkpoint(form, tmp_path / "model", overwrite=True)
        assert eqx.tree_equal(l4.load_checkpoint(tmp_path / "model"), dequantized(form))


def test_mixed_numbers_are_refused(tmp_path):
    model = small(SCOUT, KINDS["attention"])
    model = l4.quantize(model, l4.Quantization(("*experts.*_proj",), jnp.float8_e4m3fn))
    with pytest.raises(ValueError, match="in several ways"):
        l4.save_checkpoint(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()
