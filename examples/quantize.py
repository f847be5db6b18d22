"""How exact a model is in few bits: the digits model, and the text model where there is one.

    python examples/quantize.py       # after examples/train_digits.py and examples/pretrain_text.py

Loads each with its weights in float32, int8 and int4, and prints what is right of the held-out
digits, or the bits for a held-out byte, and the bytes of the weights that were quantised.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from digits import load_split, read
from pretrain_text import bits_per_byte, split_topics
from train_digits import TEST_BATCHES, TEST_ROWS, example

import llama4_eqx as l4
from llama4_eqx.layers.quantized import Quantized, is_quantized
from llama4_eqx.processing import byte_tokenizer

DIGITS, TEXT = Path("runs/digits/model"), Path("runs/pretrain_text/model")


def main(digits: Path = DIGITS, text: Path = TEXT, batches: int = TEST_BATCHES) -> None:
    for folder, script in ((digits, "train_digits"), (text, "pretrain_text")):
        if not folder.is_dir():
            print(f"There is no {folder} yet: run examples/{script}.py first.")
    # A group of int4 must divide the features of a head, as o_proj sums over these.
    for name, scheme in schemes(group_size=24) if digits.is_dir() else []:
        model = l4.load_checkpoint(digits, quantize=scheme)
        print(f"digits, {name:8} {right(model, batches):.2%} right{size(model)}")
    held_out = np.array(byte_tokenizer().encode("\n\n".join(split_topics()[1])))
    for name, scheme in schemes(group_size=32) if text.is_dir() else []:
        model = l4.load_checkpoint(text, quantize=scheme)
        print(f"text,   {name:8} {bits_per_byte(model, held_out):.4f} bits for a byte{size(model)}")


def schemes(group_size: int) -> list[tuple[str, l4.Quantization | None]]:
    """Ways to keep the weights."""
    int4 = l4.Quantization(dtype=jnp.int4, group_size=group_size)
    return [("float32", None), ("int8", l4.Quantization()), ("int4", int4)]


def right(model: l4.Llama4, batches: int) -> float:
    """The share of held-out digits that the model reads."""
    tokenizer, (_, source), random = byte_tokenizer(), load_split(), np.random.default_rng(1)
    hits, total = 0, 0
    for _ in range(batches):
        batch = [example(tokenizer, source, counts, random) for counts in TEST_ROWS]
        for one, answer in zip(batch, read(model, tokenizer, batch), strict=True):
            total += len(one.answer)
            hits += sum(a == b for a, b in zip(one.answer, answer, strict=False))
    return hits / total


def size(model: l4.Llama4) -> str:
    """The bytes of the quantised weights, as a share of those in float32."""
    weights = [x for x in jax.tree.leaves(model, is_leaf=is_quantized) if isinstance(x, Quantized)]
    if not weights:
        return ""
    few = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    return f", {few / sum(4 * np.prod(weight.shape) for weight in weights):.2f} of the bytes"


if __name__ == "__main__":
    main()
