"""The examples of looking inside and swapping parts, on a model that knows a few facts."""

import json
import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from tests.examples.running import OPTIMISED, run, run_shortly

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def facts_folder(tmp_path_factory):
    """Where the research examples find a model that knows the facts, after fewer steps."""
    folder = tmp_path_factory.mktemp("facts")
    run_shortly("facts", "", 80, folder, OPTIMISED)
    return folder


def width(picture: Path) -> int:
    with PIL.Image.open(picture) as image:
        return image.width


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


def test_steering(facts_folder):
    said = run("steering.py", cwd=facts_folder)
    counts = np.array([json.loads(row) for row in re.findall(r"layer \d: (\[.*\])", said)])
    assert counts.shape == (8, 5)
    assert counts[:, 0].max() <= 2 < counts.max()


def test_routing(facts_folder):
    said = run("routing.py", cwd=facts_folder)
    losses = [float(x) for x in re.findall(r"(?:none|expert \d) +([\d.]+)$", said, re.MULTILINE)]
    assert len(losses) == 5
    assert min(losses[1:]) >= losses[0]
    assert width(facts_folder / "runs/research/routing.png") > 900


def test_swap_attention(tmp_path):
    said = run_shortly("swap_attention", "", 80, tmp_path, OPTIMISED)
    assert "5 layers, once" in said
    assert "loaded again: Warsaw" in said
