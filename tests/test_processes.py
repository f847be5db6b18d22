"""Training examples as two processes of four devices each: as one; and when one of them dies."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"

# With a module's constants set, and whatever else a test needs done before its `main`.
SCRIPT = """
import sys
sys.path.insert(0, {examples!r})
import {name} as example
{before}
example.main(steps={steps})
"""
SMALL_TEXT = "example.ROWS, example.SEQ, example.SAVE_EVERY = 8, 128, 4"
FEW_DIGITS = "example.TEST_ROWS, example.TEST_BATCHES = example.TEST_ROWS[:20], 1"
DEATH = """
import os, signal, time
import jax
spread, calls = example.spread, []
def spread_or_die(batch, place):
    calls.append(1)
    if jax.process_index() == 1 and len(calls) == 7:
        open("died", "w").write(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
    return spread(batch, place)
example.spread = spread_or_die
"""


def run(cwd: Path, name: str, before: str, steps: int, *, devices=1, processes=1) -> tuple:
    cwd.mkdir(exist_ok=True)
    script = cwd / "script.py"
    text = SCRIPT.format(examples=str(EXAMPLES), name=name, before=before, steps=steps)
    script.write_text(text)
    command = [sys.executable, str(script)]
    if processes > 1:
        launch = [sys.executable, str(EXAMPLES / "launch.py"), "--processes", str(processes)]
        command = [*launch, "--devices", str(devices), str(script)]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)
    return result.returncode, result.stdout, result.stderr


def bits(said: str) -> float:
    return float(re.findall(r"Bits per held-out byte: ([\d.]+)", said)[0])


def test_text_goes_on_after_a_death(tmp_path):
    """Two processes train as one; when one dies the other fails soon, and one process with two
    devices goes on from the last checkpoint and comes out where an undisturbed run does."""
    code, truth, _ = run(tmp_path / "undisturbed", "pretrain_text", SMALL_TEXT, 10)
    assert code == 0
    assert "on 1 devices" in truth

    code, _, errors = run(
        tmp_path / "killed", "pretrain_text", SMALL_TEXT + DEATH, 10, devices=4, processes=2
    )
    assert code == 1
    died = float((tmp_path / "killed/died").read_text())
    assert time.time() - died < 45  # 20 seconds without a heartbeat, and time to end
    assert "Process 1 ended with signal 9; so will the others." in errors
    assert "another task died" in errors

    code, said, errors = run(tmp_path / "killed", "pretrain_text", SMALL_TEXT, 10, devices=2)
    assert code == 0
    assert "on 2 devices" in said
    assert re.findall(r"(\d+)/10 ", errors)[0] == "4"  # the step from which it went on
    assert abs(bits(said) - bits(truth)) < 0.005  # of 4; optimisers blow up what rounding does


def test_digits_by_two_processes(tmp_path):
    """They read the same in the held-out pictures as a run of one."""
    code, truth, _ = run(tmp_path / "one", "train_digits", FEW_DIGITS, 10)
    assert code == 0
    code, said, errors = run(
        tmp_path / "two", "train_digits", FEW_DIGITS, 10, devices=4, processes=2
    )
    assert code == 0, errors
    assert "on 8 devices" in said
    answers = [re.findall(r"(?m)^.*(?:are right|stands).*$", text) for text in (truth, said)]
    assert len(answers[0]) == 11
    assert answers[0] == answers[1]
