"""Activation patching: where in a small model a fact is, layer by layer and byte by byte.

    python examples/patching.py

The model of `facts.py` reads "The capital of Norway is ", and what a layer gets at one byte is
replaced by what the same place holds in "The capital of Poland is ". Where this turns Oslo into
Warsaw, the country is. All pairs of layer and position run in one compiled program; attribution
patching estimates them all by one gradient. Draws runs/research/patching.png.
"""

from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
from facts import encode, load, prompt
from matplotlib.figure import Figure

from llama4_eqx.research import Probe, attribution_patching, patch_sweep

FOLDER = Path("runs/research")
SITE = "resid_pre"
CORRUPT, CLEAN = prompt("capital", "Norway"), prompt("capital", "Poland")


def main(folder: Path = FOLDER) -> None:
    model, tokenizer = load()
    (corrupt, clean), _ = encode([CORRUPT, CLEAN])
    wrong, right = tokenizer.encode("OW")

    def metric(logits: jax.Array) -> jax.Array:
        """How much more the model says Warsaw than Oslo."""
        return logits[-1, right] - logits[-1, wrong]

    source = eqx.filter_jit(model)(clean, probe=Probe(read=SITE)).readings[SITE]
    sweep, slopes = (
        eqx.filter_jit(partial(tool, site=SITE))(model, corrupt, source, metric)
        for tool in (patch_sweep, attribution_patching)
    )
    plain = float(metric(eqx.filter_jit(model)(corrupt).logits))
    print(f"Warsaw over Oslo: {plain:.1f} nats as it is, {sweep[-1, -1]:.1f} at best.")
    for layer, row in enumerate(np.asarray(sweep)):
        position = int(row.argmax())
        print(
            f"    layer {layer}: most, {row[position]:6.1f}, by patching position {position:2} "
            f"({CORRUPT[:position]}[{CORRUPT[position]}])"
        )
    agreement = np.corrcoef(np.ravel(sweep - plain), np.ravel(slopes))[0, 1]
    print(f"One gradient's estimate correlates with the sweep by {agreement:.2f}.")

    folder.mkdir(parents=True, exist_ok=True)
    figure = Figure((12, 3.5), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(sweep, cmap="RdBu_r", vmin=-abs(plain), vmax=abs(plain), aspect="auto")
    figure.colorbar(image, label="Warsaw over Oslo, nats")
    axes.set(xticks=range(len(CORRUPT)), xticklabels=CORRUPT.replace(" ", "␣"))
    axes.set(xlabel="patched byte", ylabel="patched layer")
    figure.savefig(folder / "patching.png")
    print(f"Drawn: {folder / 'patching.png'}")


if __name__ == "__main__":
    main()
