"""The example scripts, run as a user runs them (the long one for a few steps only)."""

import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import torch
import transformers

import llama4_eqx as l4
from llama4_eqx.processing import byte_tokenizer, load_tokenizer
from tests.toys import MULTIMODAL

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(script: str, *arguments: str, cwd: Path | None = None) -> str:
    command = [sys.executable, "-W", "error", str(EXAMPLES / script), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What `pretrain_text.py` leaves after a few steps."""
    folder = tmp_path_factory.mktemp("text")
    example = runpy.run_path(str(EXAMPLES / "pretrain_text.py"))
    example["main"](steps=12, folder=folder)
    return folder / "model"


def test_transformers_opens_what_was_trained_on_text(folder):
    """And continues a prompt with the same tokens, over two of the chunks of 64."""
    prompt = np.array([load_tokenizer(folder).encode("The following statement ")])
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder)
    truth = reference.generate(
        torch.tensor(prompt), max_new_tokens=150, min_new_tokens=150, do_sample=False
    )[:, prompt.shape[1] :]
    model = l4.load_checkpoint(folder).unstacked()
    new = l4.generate(model, jnp.asarray(prompt, jnp.int32), max_new_tokens=150)
    np.testing.assert_array_equal(new, truth)
    spoken = transformers.AutoTokenizer.from_pretrained(folder).decode(truth[0])
    assert load_tokenizer(folder).decode(np.asarray(new[0])) == spoken


def test_generate(folder):
    assert "python examples/pretrain_text.py" in run("generate.py")
    prompt = ("generate.py", str(folder), "The ", "--max-new-tokens", "9")
    said = run(*prompt, "--temperature", "0")
    assert said.startswith("The ")
    assert said == run(*prompt, "--temperature", "0")
    assert run(*prompt, "--chat")


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
    assert "mask" in said.splitlines()[-3]
    assert "bool[2,9]" in said
