"""Prompts of different lengths as one padded batch."""

from collections.abc import Iterable
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int32

from llama4_eqx.processing.inputs import Inputs, assistant_mask
from llama4_eqx.processing.tokenizer import Tokenizer


class Batch(NamedTuple):
    """Prompts in rows of one length, with the tiles of all images in reading order, if any.

    `mask` is True at tokens that are not padding; `target_mask` at those that the assistant writes.
    """

    tokens: Int32[np.ndarray, "batch seq"]
    mask: Bool[np.ndarray, "batch seq"]
    target_mask: Bool[np.ndarray, "batch seq"]
    pixel_values: Float[np.ndarray, "tiles channels height width"] | None


def collate(
    tokenizer: Tokenizer,
    inputs: Iterable[Inputs],
    *,
    padding_side: Literal["left", "right"] = "right",
    length: int | None = None,
) -> Batch:
    """Pads the results of `process`: to `length`, or to the longest of them.

    Pad on the right to train and on the left to generate. A fixed `length` avoids recompilation.
    """
    rows = list(inputs)
    if not all(isinstance(row, Inputs) for row in rows) or not rows:
        raise ValueError(
            "a batch must hold at least one prompt, each a result of process(); got "
            + (
                type(next(x for x in rows if not isinstance(x, Inputs))).__name__
                if rows
                else "none"
            )
        )
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side must be 'left' or 'right'; got {padding_side!r}")
    longest = max(len(row.tokens) for row in rows)
    length = longest if length is None else length
    if length < longest:
        raise ValueError(
            f"the longest prompt has {longest} tokens, more than length={length}: shorten it, or "
            "pad to a greater length (a cut could separate images from their tokens)"
        )
    pixels = [row.pixel_values for row in rows if row.pixel_values is not None]
    for tiles in pixels:
        if not np.issubdtype(tiles.dtype, np.floating):
            raise ValueError(
                f"pixel_values must be normalised floats, as process() gives; got {tiles.dtype}"
            )
    shapes = {tiles.shape[1:] for tiles in pixels}
    if len(shapes) > 1:
        raise ValueError(
            "all images of a batch must have tiles of one size; got "
            f"{' and '.join(' × '.join(map(str, shape)) for shape in sorted(shapes))}: use the "
            "same ImageProcessor"
        )

    tokens = np.full((len(rows), length), tokenizer.pad_id, np.int32)
    mask = np.zeros(tokens.shape, bool)
    target_mask = np.zeros(tokens.shape, bool)
    for index, row in enumerate(rows):
        start = length - len(row.tokens) if padding_side == "left" else 0
        place = (index, slice(start, start + len(row.tokens)))
        tokens[place] = row.tokens
        mask[place] = True
        target_mask[place] = assistant_mask(tokenizer, row.tokens)
    return Batch(tokens, mask, target_mask, np.concatenate(pixels) if pixels else None)
