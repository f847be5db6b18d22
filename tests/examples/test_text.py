"""`pretrain_text.py`, and the examples that use what it leaves."""

import contextlib
import io
import re
import time

import jax.numpy as jnp
import numpy as np
import pretrain_text
import pytest
import torch
import transformers

import llama4_eqx as l4
from llama4_eqx.processing import load_tokenizer
from tests.examples.running import finished, run, run_by_two, shortened

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    """What `pretrain_text.py` leaves after a few steps, and what it said."""
    folder, said = tmp_path_factory.mktemp("text"), io.StringIO()
    with contextlib.redirect_stdout(said):
        pretrain_text.main(steps=12, folder=folder)
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
    resumed = finished("-W", "error", "-c", script, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "on 2 devices" in resumed.stdout
    assert re.findall(r"(\d+)/12 ", resumed.stderr)[0] == "2"  # the step from which it went on
    bits = [
        float(re.findall(r"Bits per held-out byte: ([\d.]+)", said)[0])
        for said in (resumed.stdout, text_run[1])
    ]
    assert abs(bits[0] - bits[1]) < 0.005  # of about 5: Adam blows up what rounding does


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
