"""`train_digits.py`, and the examples that use what it leaves."""

import re

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import sklearn.datasets
import train_digits
import transformers

import llama4_eqx as l4
from llama4_eqx.processing import load_tokenizer
from tests.examples.running import python, run, run_by_two, run_shortly, shortened
from tests.toys import their_embeddings

pytestmark = pytest.mark.slow

FEW_ROWS = """
example.ROWS, example.TEST_ROWS = example.ROWS[::4], example.TEST_ROWS[:40]
example.TEST_BATCHES = 2
"""


@pytest.fixture(scope="module")
def digits_folder(tmp_path_factory):
    """What `train_digits.py` leaves after a few steps, and what it said."""
    folder = tmp_path_factory.mktemp("digits")
    return folder, run_shortly("train_digits", FEW_ROWS, 10, cwd=folder)


def test_two_processes_read_digits_as_one(digits_folder, tmp_path):
    """All the answers that are printed, and how many are right."""
    result = run_by_two(shortened("train_digits", FEW_ROWS, 10), tmp_path)
    assert result.returncode == 0, result.stderr
    assert "on 8 devices" in result.stdout
    one, two = (
        re.findall(r"(?m)^.*(?:are right|stands).*$", said)
        for said in (digits_folder[1], result.stdout)
    )
    assert len(one) == 11
    assert one == two


def test_digits_are_split_by_their_writers(digits_folder):
    folder, said = digits_folder
    assert said.startswith("1,437 digits to learn from, 360 held out.")
    assert len(re.findall(r"(?m)% of 16 whole answers\.$", said)) == 5
    for name in ("samples.png", "loss.png", "experts.png"):
        with PIL.Image.open(folder / "runs/digits" / name) as picture:
            assert min(picture.size) > 300
    seen, held_out = train_digits.load_split()
    everything = np.concatenate([seen.images, held_out.images])
    truth = np.rint(sklearn.datasets.load_digits().images * 255 / 16)
    np.testing.assert_array_equal(everything, truth)


def test_transformers_reads_digits_the_same(digits_folder):
    """Its parts, put together with the weights that were saved, give the same greedy answer."""
    folder = digits_folder[0] / "runs/digits/model"
    reference = transformers.Llama4ForConditionalGeneration.from_pretrained(folder)
    reference.language_model.generation_config.eos_token_id = None  # so that all have six tokens
    random, tokenizer = np.random.default_rng(5), load_tokenizer(folder)
    model = l4.load_checkpoint(folder)
    for counts in ((4,), (2, 1)):
        one = train_digits.example(tokenizer, train_digits.load_split()[1], counts, random)
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
            max_new_tokens=6,
        )
        assert len(theirs) == 6
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


def test_quantize(digits_folder, tmp_path):
    assert run("quantize.py", cwd=tmp_path).count("yet: run examples/") == 2
    folder, _ = digits_folder
    said = python("-c", "import quantize; quantize.main(batches=1)", cwd=folder).splitlines()
    told = [line for line in said if line.startswith("digits")]
    shares = [float(line.split("right, ")[1].split()[0]) for line in told[1:]]
    assert [line.split()[1] for line in told] == ["float32", "int8", "int4"]
    assert shares == [0.26, 0.17]  # (96 + 4) / 384, or so, and (12 + 4) / 96
