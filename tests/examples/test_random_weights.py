"""The examples that need no trained model."""

from dataclasses import replace

import jax
import numpy as np
import PIL.Image
import pytest

import llama4_eqx as l4
from llama4_eqx.processing import byte_tokenizer
from tests.examples.running import run
from tests.toys import MULTIMODAL

pytestmark = pytest.mark.slow


def test_describe(tmp_path):
    """A picture of 2 × 1 tiles of 28 pixels, and a small one, through a toy model."""
    assert "hf download" in run("describe.py")
    tokenizer, folder = byte_tokenizer(), tmp_path / "model"
    text = MULTIMODAL.text_config
    text = replace(text, vocab_size=tokenizer.vocab_size, num_hidden_layers=4)
    config = replace(
        MULTIMODAL, text_config=text, image_token_index=tokenizer.token_id("<|patch|>")
    )
    l4.save_checkpoint(l4.Llama4(config, key=jax.random.key(0)), folder)
    tokenizer.save(folder)
    shades = np.random.default_rng(0).integers(0, 256, (56, 28, 3), dtype=np.uint8)
    PIL.Image.fromarray(shades).save(tmp_path / "tall.png")
    PIL.Image.fromarray(shades[:9, :9]).save(tmp_path / "small.png")

    request = ("describe.py", "model", "tall.png", "small.png", "--max-new-tokens", "9")
    said = run(*request, "--temperature", "0", cwd=tmp_path)
    assert len(said.splitlines()) > 2
    gap = config.vision_config.patch_size
    for i, side in ((1, 2 * (28 + gap) + gap), (2, 28 + 2 * gap)):
        with PIL.Image.open(tmp_path / f"runs/describe/tiles-{i}.png") as sheet:
            assert sheet.size == (side, side)


def test_shapes():
    said = run("shapes.py")
    assert "Scout: 107.8 billion parameters" in said.replace(" of text", "")
    assert "Maverick: 400.7 billion parameters" in said.replace(" of text", "")
    # In int8: a byte a parameter, two in the embedding, router and norms; scales of all outputs.
    hidden, ff, vocab = 5120, 8192, 202_048
    plain = vocab * hidden + 48 * (16 + 2) * hidden + hidden
    outputs = vocab + 48 * (17 * (2 * ff + hidden) + 2 * hidden + 2 * 1024)
    numbers = vocab * hidden + 48 * (17 * 3 * hidden * ff + hidden * (2 * hidden + 2 * 1024))
    room = 0.9 * 141 * 2**30 - 2 * plain - numbers - 4 * outputs
    # Of 4,096 bytes a token, 36 layers keep 8,192 tokens and 12 keep all.
    tokens = int((room / 4096 - 36 * 8192) / 12 / 1024) * 1024
    lines = said.splitlines()
    int8, small_cache = (line for line in lines if line.startswith("  int8") and "101 G" in line)
    assert int8.split()[2] == f"{tokens:,}"
    # A cache in int8 takes 130 bytes where bfloat16 takes 256: a scale for every 128 numbers.
    tokens = int((room / (4096 * 130 / 256) - 36 * 8192) / 12 / 1024) * 1024
    assert small_cache.split()[2] == f"{tokens:,}"
    assert "  mask must have the tokens' shape (2, 10), but has (2, 9)." in lines
    assert "Actual value: f32[32,64]" in said
    assert "in_features=10" in said
