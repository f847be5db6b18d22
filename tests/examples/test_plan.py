"""The figures of `examples/plan.py` for full-size Scout, against arithmetic by hand."""

import json
from pathlib import Path

import PIL.Image
import pytest

from tests.examples.running import python

pytestmark = pytest.mark.slow


def planned(arguments: str, cwd: Path) -> tuple[dict, dict, str]:
    """What a device holds, what it sends by kind and mesh axes, and what was said."""
    code = (
        "import json, plan\n"
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
