"""Quantised weights in the layout of `bitsandbytes`, against that library's own code."""

import json
from contextlib import redirect_stderr
from io import StringIO

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import llama4_eqx as l4
from tests.checkpoints.test_compressed import logits
from tests.toys import MAVERICK, SCOUT, as_torch, random_tokens, reference_model, relative_error

pytestmark = pytest.mark.slow

with redirect_stderr(StringIO()):  # it says that it finds no GPU's kernels
    import bitsandbytes.functional as bnb

KINDS = {
    "nf4": {"quant_type": "nf4", "blocksize": 64, "compress_statistics": False},
    "nf4 twice": {"quant_type": "nf4", "blocksize": 64, "compress_statistics": True},
    "fp4": {"quant_type": "fp4", "blocksize": 128, "compress_statistics": True},
    "int8": None,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def quantised(weight, kind):
    """What the library stores for a weight, by suffix, and what it makes of that again."""
    if KINDS[kind] is None:
        numbers, largest, _ = bnb.int8_vectorwise_quant(weight.to(torch.float16))
        stored = {"weight": numbers, "SCB": largest, "weight_format": torch.tensor(0).byte()}
        return stored, bnb.int8_vectorwise_dequant(numbers, largest).to(weight.dtype)
    numbers, state = bnb.quantize_4bit(weight, **KINDS[kind])
    parts = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    # The library's CPU kernel (0.50) is wrong where a block holds parts of several rows.
    if weight.numel() % state.blocksize == 0:
        state.shape = torch.Size((weight.numel() // state.blocksize, state.blocksize))
    return {"weight": numbers, **parts}, bnb.dequantize_4bit(numbers, state).reshape(weight.shape)


def write(folder, reference, kind, dtype):
    """A folder as `transformers` leaves it: linear modules quantised, experts, router and ends not.

    Gives the reference the dequantised weights."""
    reference = reference.to(dtype)
    tensors, state = {}, dict(reference.state_dict())
    for name, weight in reference.state_dict().items():
        if name.endswith("_proj.weight"):
            stored, state[name] = quantised(weight, kind)
            prefix = name.removesuffix("weight")
            tensors |= {prefix + key: value.contiguous() for key, value in stored.items()}
        else:
            tensors[name] = weight.contiguous()
    reference.load_state_dict(state)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    four = KINDS[kind] is not None
    config = reference.config.to_dict() | {
        "architectures": ["Llama4ForCausalLM"],
        "quantization_config": {
            "quant_method": "bitsandbytes",
            "load_in_4bit": four,
            "load_in_8bit": not four,
            "bnb_4bit_quant_type": "nf4",
            "llm_int8_skip_modules": ["lm_head", "router"],
        },
    }
    (folder / "config.json").write_text(json.dumps(config, default=str))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_bit_equal_and_logits_those_of_the_library(kind, dtype, tmp_path):
    reference = reference_model(MAVERICK if kind == "nf4 twice" else SCOUT)
    write(tmp_path / "quantised", reference, kind, DTYPES[dtype])
    reference.save_pretrained(tmp_path / "plain")
    ours, plain = (l4.load_checkpoint(tmp_path / f) for f in ("quantised", "plain"))
    assert ours.decoder.blocks[0].layers[0].self_attn.q_proj.dtype == dtype
    for path, leaf in jax.tree_util.tree_leaves_with_path(ours):
        truth = dict(jax.tree_util.tree_leaves_with_path(plain))[path]
        np.testing.assert_array_equal(leaf, truth, err_msg=jax.tree_util.keystr(path))
    if dtype == "float32":
        tokens = random_tokens(2, 20)
        with torch.no_grad():
            truth = reference(as_torch(tokens, torch.long)).logits
        assert relative_error(logits(ours, tokens), truth) < 1e-5


def test_slices_that_begin_within_a_byte(tmp_path):
    """A matrix of odd sizes: rows begin in the middle of bytes and of blocks."""
    from llama4_eqx.checkpoints.bitsandbytes import with_bitsandbytes
    from llama4_eqx.checkpoints.safetensors_reading import read_headers

    stored, truth = quantised(torch.randn(31, 77), "nf4 twice")
    save_file({f"w.{k}": v for k, v in stored.items()}, tmp_path / "model.safetensors")
    found = with_bitsandbytes(read_headers(tmp_path), tmp_path)
    assert list(found) == ["w.weight"]
    for rows, columns in [(slice(None),) * 2, (slice(3, 20), slice(5, 6)), (slice(30, 31),) * 2]:
        np.testing.assert_array_equal(found["w.weight"][rows, columns], truth[rows, columns])


def test_quantised_again_while_loading(tmp_path):
    write(tmp_path / "model", reference_model(SCOUT), "nf4", torch.float32)
    model = l4.load_checkpoint(tmp_path / "model", quantize=l4.Quantization())
    whole = l4.quantize(l4.load_checkpoint(tmp_path / "model"))
    for leaf, truth in zip(jax.tree.leaves(model), jax.tree.leaves(whole), strict=True):
        # Compiled with another stack, a quotient may be rounded to the neighbouring number.
        np.testing.assert_allclose(
            leaf.astype(jnp.float32), truth.astype(jnp.float32), rtol=1e-6, atol=1
        )


STATE = "weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("kind", "damage", "sentence"),
    [
        ("nf4", {"weight.absmax": None}, "lacks its absmax"),
        ("nf4", {"weight.absmax": torch.ones(3)}, "has 3 F32 in absmax, but needs 64 F32"),
        ("nf4", {"weight": torch.ones(5, 1, dtype=torch.uint8)}, "but 5 bytes of numbers"),
        ("nf4", {"weight": None}, "no numbers of 4 bits"),
        ("nf4", {STATE: torch.ones(9, dtype=torch.uint8)}, "a quant_state that can't be read"),
        ("nf4", {STATE: None}, "U8, but must be one of"),
        ("nf4 twice", {"weight.nested_absmax": None}, "lacks its nested_absmax"),
        ("int8", {"SCB": torch.ones(3)}, r"\(3,\) F32 in SCB"),
        ("int8", {"SCB": None}, "I8, but must be one of"),
    ],
)
def test_damaged_ones_are_named(tmp_path, kind, damage, sentence):
    write(tmp_path / "model", reference_model(SCOUT), kind, torch.float32)
    file, name = tmp_path / "model" / "model.safetensors", "model.layers.1.self_attn.q_proj"
    tensors = load_file(file)
    for field, value in damage.items():
        tensors.pop(f"{name}.{field}")
        if value is not None:
            tensors[f"{name}.{field}"] = value
    save_file(tensors, file)
    with pytest.raises(l4.CheckpointError, match=rf"layers\.1\.self_attn\.q_proj.*({sentence})"):
        l4.load_checkpoint(tmp_path / "model")
