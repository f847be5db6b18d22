"""The example scripts, run as a user runs them (the long ones for a few steps only).

Tests that read what a run leaves are a group, so that one worker of pytest does the run.
"""

import contextlib
import io
import json
import re
import runpy
import subprocess
import sys
import time
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

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.append(str(EXAMPLES))  # the examples import each other


def run(script: str, *arguments: str, cwd: Path | None = None) -> str:
    return python(str(EXAMPLES / script), *arguments, cwd=cwd)


def run_shortly(name: str, settings: str, steps: int, cwd: Path) -> str:
    """The example's `main` for a few steps, its module's constants set before."""
    return python("-c", shortened(name, settings, steps), cwd=cwd)


def shortened(name: str, settings: str, steps: int) -> str:
    return (
        f"import sys; sys.path.insert(0, {str(EXAMPLES)!r})\n"
        f"import {name} as example\n{settings}\nexample.main(steps={steps})"
    )


def python(*arguments: str, cwd: Path | None) -> str:
    command = [sys.executable, "-W", "error", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout


def run_by_two(script: str, cwd: Path) -> subprocess.CompletedProcess:
    """As two processes of four devices each."""
    cwd.mkdir(exist_ok=True)
    (cwd / "script.py").write_text(script)
    launch = [str(EXAMPLES / "launch.py"), "--processes", "2", "--devices", "4", "script.py"]
    command = [sys.executable, *launch]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    """What `pretrain_text.py` leaves after a few steps, and what it said."""
    folder, said = tmp_path_factory.mktemp("text"), io.StringIO()
    example = runpy.run_path(str(EXAMPLES / "pretrain_text.py"))
    with contextlib.redirect_stdout(said):
        example["main"](steps=12, folder=folder)
    return folder / "model", said.getvalue()


@pytest.fixture(scope="module")
def folder(text_run):
    return text_run[0]


# In the second process, when it gets its fourth batch.
DEATH = """
example.SAVE_EVERY, device_put_global, calls = 2, example.device_put_global, []
import jax, os, signal, time
def spread_or_die(batch, place):
    calls.append(1)
    if jax.process_index() == 1 and len(calls) == 4:
        open("died", "w").write(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
    return device_put_global(batch, place)
example.device_put_global = spread_or_die
"""


@pytest.mark.xdist_group("text")
def test_text_goes_on_after_a_death(text_run, tmp_path):
    """When one of two processes dies the other fails soon; and one process with two devices goes on
    from the last checkpoint, and comes out where an undisturbed run of one process does."""
    killed = run_by_two(shortened("pretrain_text", DEATH, 12), tmp_path)
    assert killed.returncode == 1
    # 20 seconds without a heartbeat, and time to end.
    assert time.time() - float((tmp_path / "died").read_text()) < 45
    assert "Process 1 ended with signal 9; so will the others." in killed.stderr
    assert "another task died" in killed.stderr

    two_devices = "import jax; jax.config.update('jax_num_cpu_devices', 2)"
    script = shortened("pretrain_text", two_devices, 12)
    command = [sys.executable, "-W", "error", "-c", script]
    resumed = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "on 2 devices" in resumed.stdout
    assert re.findall(r"(\d+)/12 ", resumed.stderr)[0] == "2"  # the step from which it went on
    bits = [
        float(re.findall(r"Bits per held-out byte: ([\d.]+)", said)[0])
        for said in (resumed.stdout, text_run[1])
    ]
    assert abs(bits[0] - bits[1]) < 0.005  # of about 5: Adam blows up what rounding does


@pytest.mark.xdist_group("text")
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


@pytest.mark.xdist_group("text")
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


FEW_TESTS = "example.TEST_ROWS, example.TEST_BATCHES = example.TEST_ROWS[:40], 2"


@pytest.fixture(scope="module")
def digits_folder(tmp_path_factory):
    """What `train_digits.py` leaves after a few steps, and what it said."""
    folder = tmp_path_factory.mktemp("digits")
    return folder, run_shortly("train_digits", FEW_TESTS, 10, cwd=folder)


@pytest.mark.xdist_group("digits")
def test_two_processes_read_digits_as_one(digits_folder, tmp_path):
    """All the answers that are printed, and how many are right."""
    result = run_by_two(shortened("train_digits", FEW_TESTS, 10), tmp_path)
    assert result.returncode == 0, result.stderr
    assert "on 8 devices" in result.stdout
    one, two = (
        re.findall(r"(?m)^.*(?:are right|stands).*$", said)
        for said in (digits_folder[1], result.stdout)
    )
    assert len(one) == 11
    assert one == two


@pytest.mark.xdist_group("digits")
def test_digits_are_split_by_their_writers(digits_folder):
    folder, said = digits_folder
    assert said.startswith("1,437 digits to learn from, 360 held out.")
    assert len(re.findall(r"(?m)% of 16 whole answers\.$", said)) == 5
    for name in ("samples.png", "loss.png", "experts.png"):
        with PIL.Image.open(folder / "runs/digits" / name) as picture:
            assert min(picture.size) > 300
    example = runpy.run_path(str(EXAMPLES / "train_digits.py"))
    seen, held_out = example["load_split"]()
    everything = np.concatenate([seen.images, held_out.images])
    truth = np.rint(sklearn.datasets.load_digits().images * 255 / 16)
    np.testing.assert_array_equal(everything, truth)


@pytest.mark.xdist_group("digits")
def test_transformers_reads_digits_the_same(digits_folder):
    """Its parts, put together with the weights that were saved, give the same greedy answer."""
    folder = digits_folder[0] / "runs/digits/model"
    reference = transformers.Llama4ForConditionalGeneration.from_pretrained(folder)
    reference.language_model.generation_config.eos_token_id = None  # so that all have six tokens
    example = runpy.run_path(str(EXAMPLES / "train_digits.py"))
    random, tokenizer = np.random.default_rng(5), load_tokenizer(folder)
    model = l4.load_checkpoint(folder)
    for counts in ((4,), (2, 1)):
        one = example["example"](tokenizer, example["load_split"]()[1], counts, random)
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


@pytest.mark.xdist_group("digits")
def test_finetuning_the_digits_model(digits_folder, tmp_path):
    assert "run examples/train_digits.py first" in run("finetune_lora.py", cwd=tmp_path)
    folder, _ = digits_folder
    said = run_shortly("finetune_lora", "example.TESTS = 8", 12, cwd=folder)
    assert said.count(" stands\n") == 5
    old = l4.load_checkpoint(folder / "runs/digits/model")
    new = l4.load_checkpoint(folder / "runs/finetune_lora/model")
    np.testing.assert_array_equal(new.embed_tokens, old.embed_tokens)
    assert not eqx.tree_equal(new.decoder, old.decoder)


@pytest.mark.xdist_group("digits")
def test_quantize(digits_folder, tmp_path):
    assert run("quantize.py", cwd=tmp_path).count("yet: run examples/") == 2
    folder, _ = digits_folder
    code = f"import sys; sys.path.insert(0, {str(EXAMPLES)!r})\nimport quantize\n"
    said = python("-c", f"{code}quantize.main(batches=1)", cwd=folder).splitlines()
    told = [line for line in said if line.startswith("digits")]
    shares = [float(line.split("right, ")[1].split()[0]) for line in told[1:]]
    assert [line.split()[1] for line in told] == ["float32", "int8", "int4"]
    assert shares == [0.26, 0.17]  # (96 + 4) / 384, or so, and (12 + 4) / 96


@pytest.fixture(scope="module")
def facts_folder(tmp_path_factory):
    """Where the research examples find a model that knows the facts, after fewer steps."""
    folder = tmp_path_factory.mktemp("facts")
    python("-c", shortened("facts", "", 80), cwd=folder)
    return folder


def width(picture: Path) -> int:
    with PIL.Image.open(picture) as image:
        return image.width


@pytest.mark.xdist_group("facts")
def test_lens(facts_folder):
    said = run("lens.py", cwd=facts_folder)
    assert "layer 7: 'Stockholm.'" in said
    plain, tuned = (
        [float(x) for x in re.search(rf"{name} \[(.*)\]", said)[1].split(",")]
        for name in ("plain", "tuned")
    )
    assert plain[0] > 2 * tuned[0]
    assert plain[-1] == 0
    assert width(facts_folder / "runs/research/lens.png") > 1000


@pytest.mark.xdist_group("facts")
def test_patching(facts_folder):
    said = run("patching.py", cwd=facts_folder)
    before, after = map(
        float, re.search(r"(-[\d.]+) nats as it is, ([\d.]+) at best", said).groups()
    )
    assert before < 0 < after
    # At first the country is in its letters, in the end at the byte that asks for the answer.
    assert re.search(r"layer 0: .*The capital of [N]?\w*\[", said)
    assert "layer 7: most" in said
    assert said.count("position 24") >= 1
    assert width(facts_folder / "runs/research/patching.png") > 1000


@pytest.mark.xdist_group("facts")
def test_steering(facts_folder):
    said = run("steering.py", cwd=facts_folder)
    counts = np.array([json.loads(row) for row in re.findall(r"layer \d: (\[.*\])", said)])
    assert counts.shape == (8, 5)
    assert counts[:, 0].max() <= 2 < counts.max()


@pytest.mark.xdist_group("facts")
def test_routing(facts_folder):
    said = run("routing.py", cwd=facts_folder)
    losses = [float(x) for x in re.findall(r"(?:none|expert \d) +([\d.]+)$", said, re.MULTILINE)]
    assert len(losses) == 5
    assert min(losses[1:]) >= losses[0]
    assert width(facts_folder / "runs/research/routing.png") > 900


@pytest.mark.xdist_group("facts")
def test_swap_attention(tmp_path):
    said = run_shortly("swap_attention", "", 80, tmp_path)
    assert "5 layers, once" in said
    assert "loaded again: Warsaw" in said
