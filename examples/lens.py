"""The logit lens: what each layer of a small model would say next, and when it makes up its mind.

    python examples/lens.py

Asks the model of `facts.py` for a capital and reads the residual stream after each layer; then
trains a tuned lens, an affine map for each layer, which reads the early layers better. Draws
runs/research/lens.png.
"""

from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import optax
from facts import encode, load, prompt, sentences
from matplotlib.figure import Figure

import llama4_eqx as l4
from llama4_eqx.processing.tokenizer import Tokenizer
from llama4_eqx.research import Probe, TunedLens, logit_lens, tuned_lens_loss

FOLDER = Path("runs/research")
QUESTION = prompt("capital", "Sweden")


def main(folder: Path = FOLDER) -> None:
    model, tokenizer = load()
    tokens, _ = encode([f"{QUESTION}Stockholm."])
    output = eqx.filter_jit(model)(tokens, probe=Probe(read="resid_post"))
    logits = logit_lens(model, output.readings["resid_post"])[:, 0]
    print("What each layer would say after each byte before the answer's:")
    for number, ids in enumerate(np.asarray(logits.argmax(-1))):
        print(f"    layer {number}: {tokenizer.decode(ids[len(QUESTION) - 1 : -1])!r}")

    before, after = tuned_and_plain(model)
    print("How far a lens is from the model itself, in nats a byte, layer by layer:")
    print(f"    plain {np.round(before, 2).tolist()}")
    print(f"    tuned {np.round(after, 2).tolist()}")

    folder.mkdir(parents=True, exist_ok=True)
    draw(tokenizer, np.asarray(tokens)[0], logits).savefig(folder / "lens.png")
    print(f"Drawn: {folder / 'lens.png'}")


def tuned_and_plain(model: l4.Llama4, steps: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """The losses of the plain lens and of one trained on all facts."""
    tokens, _ = encode(sentences())
    output = eqx.filter_jit(model)(tokens, probe=Probe(read="resid_post"))
    residuals = output.readings["resid_post"]
    lens = TunedLens(len(residuals), residuals.shape[-1])
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(lens, state):
        def loss(lens):
            by_layer = tuned_lens_loss(lens, model, residuals, output.logits)
            return by_layer.sum(), by_layer

        gradients, by_layer = jax.grad(loss, has_aux=True)(lens)
        updates, state = optimizer.update(gradients, state)
        return eqx.apply_updates(lens, updates), state, by_layer

    state, losses = optimizer.init(eqx.filter(lens, eqx.is_array)), []
    for _ in range(steps):
        lens, state, by_layer = step(lens, state)
        losses.append(np.asarray(by_layer))
    return losses[0], losses[-1]


def draw(tokenizer: Tokenizer, tokens: np.ndarray, logits: jax.Array) -> Figure:
    """Each layer's likeliest next byte at each position, and how sure it is."""
    probabilities = np.asarray(jax.nn.softmax(logits, axis=-1))
    figure = Figure((14, 4), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(probabilities.max(-1), vmin=0, vmax=1, cmap="Blues", aspect="auto")
    figure.colorbar(image, label="probability of the likeliest byte")
    for layer, row in enumerate(probabilities):
        for position, byte in enumerate(row):
            text = tokenizer.decode([int(byte.argmax())])
            color = "white" if byte.max() > 0.5 else "black"
            axes.text(position, layer, text, ha="center", va="center", color=color, fontsize=8)
    read = [tokenizer.decode([int(token)]).replace(" ", "␣") for token in tokens]
    axes.set(xticks=range(len(tokens)), xticklabels=read, xlabel="byte read", ylabel="layer")
    return figure


if __name__ == "__main__":
    main()
