"""The example scripts, run as a user runs them (the long one for a few steps only)."""

import runpy
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import llama4_eqx as l4
from llama4_eqx.processing import load_tokenizer

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, "-W", "error", str(EXAMPLES / script), *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the quickstart leaves after a few steps."""
    folder = tmp_path_factory.mktemp("quickstart") / "model"
    example = runpy.run_path(str(EXAMPLES / "quickstart.py"))
    with jax.numpy_dtype_promotion("standard"):  # optax's schedules mix floats with the count
        example["main"](steps=12, folder=folder)
    return folder


def test_transformers_opens_what_the_quickstart_saves(folder):
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
    assert "python examples/quickstart.py" in run("generate.py")
    prompt = ("generate.py", str(folder), "The ", "--max-new-tokens", "9")
    said = run(*prompt, "--temperature", "0")
    assert said.startswith("The ")
    assert said == run(*prompt, "--temperature", "0")
    assert run(*prompt, "--chat")


def test_shapes():
    said = run("shapes.py")
    assert "Scout: 107.8 billion parameters" in said.replace(" of text", "")
    assert "Maverick: 400.7 billion parameters" in said.replace(" of text", "")
    assert "mask" in said.splitlines()[-3]
    assert "bool[2,9]" in said
