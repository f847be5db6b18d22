"""The example scripts, run as a user runs them (the long one for a few steps only)."""

import json
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import sklearn.datasets
import torch
import transformers

import llama4_eqx as l4
from llama4_eqx.processing import byte_tokenizer, load_tokenizer
from tests.toys import MULTIMODAL, their_embeddings

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(script: str, *arguments: str, cwd: Path | None = None) -> str:
    return python(str(EXAMPLES / script), *arguments, cwd=cwd)


def run_shortly(name: str, settings: str, steps: int, cwd: Path) -> str:
    """The example's `main` for a few steps, its module's constants set before."""
    code = (
        f"import sys; sys.path.insert(0, {str(EXAMPLES)!r})\n"
        f"import {name} as example\n{settings}\nexample.main(steps={steps})"
    )
    return python("-c", code, cwd=cwd)


def python(*arguments: str, cwd: Path | None) -> str:
    command = [sys.executable, "-W", "error", *arguments]
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


def planned(arguments: str, cwd: Path) -> tuple[dict, dict, str]:
    """What a device holds, what it sends by kind and mesh axes, and what was said."""
    code = (
        f"import json, sys; sys.path.insert(0, {str(EXAMPLES)!r})\nimport plan\n"
        f"p = plan.main({arguments.split()!r})\n"
        "print(json.dumps([p.held, [[*vars(c).values(), c.sent] for c in p.sent]]))"
    )
    *said, told = python("-c", code, cwd=cwd).splitlines()
    held, collectives = json.loads(told)
    sent = {}
    for kind, dtype, _, axes, _, times, each in collectives:
        if dtype == "float16" and times is not None:
            sent[kind, *axes] = sent.get((kind, *axes), 0) + times * each
    return held, sent, "\n".join(said)


HIDDEN, VOCAB, LAYERS, MLP = 5120, 202_048, 48, 3 * 5120 * 8192
ATTENTION = HIDDEN * 128 * (40 + 8 + 8 + 40)


def test_plan_of_training(tmp_path):
    """Scout on 256 devices, by hand: fsdp 64 × expert 4, one row of 8,192 tokens each."""
    held, sent, said = planned("scout train", tmp_path)
    layer = ATTENTION + 2 * HIDDEN + MLP  # but for the router and its experts
    routed = 16 * (HIDDEN + MLP)
    parameters = (LAYERS * layer + 2 * VOCAB * HIDDEN + HIDDEN) / 64 + LAYERS * routed / 256
    assert held["parameters"] == held["gradients"] == 4 * parameters
    assert held["optimiser"] == pytest.approx(8 * parameters, rel=1e-6)
    assert held["activations: each layer's input"] == LAYERS * 8192 * HIDDEN * 2
    # Two bytes, of which 63 in 64 come from elsewhere: layers forward and backward, the head once.
    layers, head = LAYERS * (layer + routed / 4), VOCAB * HIDDEN + HIDDEN
    assert sent["all-gather", "fsdp"] == pytest.approx(2 * (2 * layers + head) * 63 / 64)
    assert sent["reduce-scatter", "fsdp"] == pytest.approx(2 * (layers + head) * 63 / 64)
    # Tokens there and back with half as much room again, there once more, and both gradients.
    assert sent["all-to-all", "expert"] == LAYERS * 5 * 1.5 * 8192 * HIDDEN * 2 * 3 / 4
    # What isn't an expert's: its gradient on each of four, after it was scattered over 64.
    rest = (LAYERS * layer + 2 * VOCAB * HIDDEN + HIDDEN) / 64
    assert sent["all-reduce", "expert"] == pytest.approx(2 * 2 * rest * 3 / 4, rel=0.01)
    assert "for each round that uneven routing adds" in said
    with PIL.Image.open(tmp_path / "runs/plan/scout-train.png") as picture:
        assert min(picture.size) > 300


def test_plan_of_serving(tmp_path):
    """Scout on 16 devices: tensor 8 × expert 2, 16 rows with 131,072 tokens each."""
    held, sent, _ = planned("scout serve", tmp_path)
    norms = LAYERS * 2 * HIDDEN + HIDDEN
    experts = LAYERS * 16 * MLP / 16 + LAYERS * 16 * HIDDEN / 2
    shares = (LAYERS * (ATTENTION + MLP) + 2 * VOCAB * HIDDEN) / 8
    assert held["parameters"] == 2 * (norms + experts + shares)
    slots = 36 * 8192 + 12 * 131_072
    assert held["cache"] == pytest.approx(2 * 2 * 16 * 128 * slots, rel=1e-6)
    activation = 2 * 16 * HIDDEN
    assert sent["all-reduce", "tensor"] == (2 * LAYERS + 1) * 2 * 7 / 8 * activation
    assert sent["all-reduce", "expert"] == LAYERS * 2 * 1 / 2 * activation


@pytest.fixture(scope="module")
def digits_folder(tmp_path_factory):
    """What `train_digits.py` leaves after a few steps, and what it said."""
    folder = tmp_path_factory.mktemp("digits")
    settings = "example.TEST_ROWS, example.TEST_BATCHES = example.TEST_ROWS[:40], 2"
    return folder, run_shortly("train_digits", settings, 30, cwd=folder)


def test_digits_are_split_by_their_writers(digits_folder):
    folder, said = digits_folder
    assert said.startswith("1,437 digits to learn from, 360 held out.")
    assert len(re.findall(r"(?m)% of 16 whole answers\.$", said)) == 5
    for name in ("samples.png", "loss.png", "experts.png"):
        with PIL.Image.open(folder / "runs/digits" / name) as picture:
            assert min(picture.size) > 300
    example = runpy.run_path(str(EXAMPLES / "train_digits.py"))
    seen, held_out = example["digits"]()
    everything = np.concatenate([seen.images, held_out.images])
    truth = np.rint(sklearn.datasets.load_digits().images * 255 / 16)
    np.testing.assert_array_equal(everything, truth)


def test_transformers_reads_digits_the_same(digits_folder):
    """Its parts, put together with the weights that were saved, give the same greedy answer."""
    folder = digits_folder[0] / "runs/digits/model"
    reference = transformers.Llama4ForConditionalGeneration.from_pretrained(folder)
    example = runpy.run_path(str(EXAMPLES / "train_digits.py"))
    random, tokenizer = np.random.default_rng(5), load_tokenizer(folder)
    model = l4.load_checkpoint(folder)
    for counts in ((4,), (2, 1)):
        one = example["example"](tokenizer, example["digits"]()[1], counts, random)
        tokens = jnp.asarray(one.tokens[: -len(one.answer) - 1])
        pixels = jnp.asarray(one.tiles)
        embeddings = their_embeddings(reference, tokens, pixels)
        theirs = reference.language_model.generate(
            inputs_embeds=embeddings, max_new_tokens=6, do_sample=False
        )[0]
        ours = l4.generate(
            model,
            tokens,
            pixel_values=pixels,
            max_new_tokens=len(theirs),
            stop_ids=tokenizer.stop_ids,
        )
        assert len(theirs) > 2
        np.testing.assert_array_equal(ours, theirs)


def test_finetuning_the_digits_model(digits_folder, tmp_path):
    assert "run examples/train_digits.py first" in run("finetune_lora.py", cwd=tmp_path)
    folder, _ = digits_folder
    said = run_shortly("finetune_lora", "example.TESTS = 8", 12, cwd=folder)
    assert said.count(" stands\n") == 5
    old = l4.load_checkpoint(folder / "runs/digits/model")
    new = l4.load_checkpoint(folder / "runs/finetune_lora/model")
    np.testing.assert_array_equal(new.embed_tokens, old.embed_tokens)
    assert not eqx.tree_equal(new.decoder, old.decoder)
