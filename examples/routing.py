"""Routing: which expert reads which kind of byte, and what a layer without an expert still knows.

    python examples/routing.py

Counts, over all sentences that the model of `facts.py` knows, how often each expert of each layer
gets capitals, small letters, spaces and full stops; then bans each expert in turn and measures the
loss. Draws runs/research/routing.png.
"""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from facts import encode, load, sentences
from matplotlib.figure import Figure

from llama4_eqx.research import Probe, ban_experts, routing_counts
from llama4_eqx.training import next_token_loss

FOLDER = Path("runs/research")
KINDS = ("capital", "small letter", "space", "full stop")


def main(folder: Path = FOLDER) -> None:
    model, _ = load()
    tokens, mask = encode(sentences())
    counts = np.asarray(routing_counts(model, [tokens], kinds_of(model.embed_tokens.shape[0])))
    shares = counts / counts.sum(-1, keepdims=True)
    for kind, by_layer in zip(KINDS, shares, strict=True):
        layer, expert = np.unravel_index(by_layer.argmax(), by_layer.shape)
        print(f"{by_layer.max():4.0%} of each {kind} go to expert {expert} of layer {layer}.")

    @eqx.filter_jit
    def loss_without(model, expert):
        probe = Probe(edit=ban_experts(jnp.arange(shares.shape[-1]) == expert))
        return next_token_loss(model, tokens, mask=mask, probe=probe).token.total

    print("Loss in nats a byte if one expert is banned from all layers:")
    for expert in (-1, *range(shares.shape[-1])):
        name = "none" if expert < 0 else f"expert {expert}"
        print(f"    {name:8} {float(loss_without(model, jnp.int32(expert))):.2f}")

    folder.mkdir(parents=True, exist_ok=True)
    figure = Figure((10, 4), layout="constrained")
    for axes, kind, share in zip(figure.subplots(1, len(KINDS)), KINDS, shares, strict=True):
        axes.imshow(share, vmin=0, vmax=1, cmap="Blues")
        axes.set(title=kind, xlabel="expert", ylabel="layer")
    figure.savefig(folder / "routing.png")
    print(f"Drawn: {folder / 'routing.png'}")


def kinds_of(vocab: int) -> jax.Array:
    """The number of each byte's kind in `KINDS`, and -1 for all else."""
    tests = (str.isupper, str.islower, str.isspace, ".".__eq__)
    return jnp.array(
        [
            next((i for i, test in enumerate(tests) if token < 128 and test(chr(token))), -1)
            for token in range(vocab)
        ]
    )


if __name__ == "__main__":
    main()
