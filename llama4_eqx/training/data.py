"""Documents to batches of packed rows, with grain: shuffled, split among processes, and resumable
at any batch. Needs the extra `train`."""

from collections.abc import Mapping, Sequence
from typing import TypedDict

import grain
import jax
import numpy as np
from grain.experimental import (
    FirstFitPackIterDataset,
    FlatMapIterDataset,
    FlatMapTransform,
    WindowShuffleIterDataset,
)
from grain.sources import RandomAccessDataSource
from jaxtyping import Bool, Int32

from llama4_eqx.argument_checks import whole_number


class Document(TypedDict):
    """A document's tokens, and which of them count as targets."""

    tokens: Int32[np.ndarray, "seq"]
    target_mask: Bool[np.ndarray, "seq"]


class Packed(TypedDict):
    """Rows of documents, as `next_token_loss` takes them: each document has its own segment id
    within the row, and padding has -1."""

    tokens: Int32[np.ndarray, "rows seq"]
    target_mask: Bool[np.ndarray, "rows seq"]
    segment_ids: Int32[np.ndarray, "rows seq"]


def packed_batches(
    documents: Sequence[Document] | RandomAccessDataSource[Document],
    *,
    rows: int,
    seq: int,
    seed: int,
    epochs: int | None = None,
    window: int = 1024,
    open_rows: int = 16,
    process: int | None = None,
    processes: int | None = None,
) -> grain.IterDataset[Packed]:
    """Batches of `rows` rows of `seq` tokens; endless if `epochs` is None.

    `documents` is a list, or any object with `len` and indexing that reads them lazily. Their order
    follows from the seed and differs in each epoch. A document longer than `seq` is split, and each
    part is a document to the model; `window` parts at a time are shuffled, so that those of one
    document don't fill a batch. Parts share a row where they fit: `open_rows` rows are filled at a
    time, and more of them leave less padding. Each process reads its own share of the documents,
    that of `jax.process_index()` unless given, and contributes `rows` rows to a batch. An
    incomplete last batch is dropped.

    `iter(…)` has `get_state()` and `set_state(state)`: after a restore the same batches follow.

    Raises a `ValueError` for fewer documents than processes, and, when it is read, for a document
    without tokens or whose mask has another length.
    """
    for name, count in (("rows", rows), ("seq", seq), ("window", window), ("open_rows", open_rows)):
        whole_number(name, count)
    whole_number("seed", seed, least=0)
    process = jax.process_index() if process is None else process
    processes = jax.process_count() if processes is None else processes
    if len(documents) < processes:
        raise ValueError(
            f"{len(documents)} documents can't be split among {processes} processes: use "
            "fewer processes, or split the documents."
        )
    shuffled = grain.MapDataset.source(documents).seed(seed).shuffle()[process::processes]
    parts = FlatMapIterDataset(shuffled.repeat(epochs).to_iter_dataset(), _Split(seq))
    packed = FirstFitPackIterDataset(
        WindowShuffleIterDataset(parts, window_size=window, seed=seed),
        length_struct={"tokens": seq, "target_mask": seq},
        num_packing_bins=open_rows,
        seed=seed,
    )
    return packed.map(_named).batch(rows, drop_remainder=True)


class _Split(FlatMapTransform):
    """Splits a document into parts of at most `size` tokens."""

    max_fan_out = 1 << 20

    def __init__(self, size: int):
        self.size = size

    def flat_map(self, element: Document) -> Sequence[Document]:
        if not (isinstance(element, Mapping) and {"tokens", "target_mask"} <= element.keys()):
            raise ValueError(
                "A document must be a dict of its tokens and its target_mask, which is True at the "
                f"tokens that count, but one is {element!r:.60}."
            )
        tokens, target_mask = np.asarray(element["tokens"]), np.asarray(element["target_mask"])
        if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
            raise ValueError(
                f"A document's tokens must be one row of integers, but are {tokens.dtype} of shape "
                f"{tokens.shape}."
            )
        if len(tokens) == 0:
            raise ValueError("A document has no tokens: leave empty documents out.")
        if len(tokens) != len(target_mask):
            raise ValueError(
                f"A document has {len(tokens)} tokens, but a target_mask of {len(target_mask)}: "
                "they must have one entry for each token."
            )
        return [
            Document(
                tokens=tokens[start : start + self.size],
                target_mask=target_mask[start : start + self.size],
            )
            for start in range(0, len(tokens), self.size)
        ]


def _named(row: dict[str, np.ndarray]) -> Packed:
    return Packed(
        tokens=row["tokens"],
        target_mask=row["target_mask"].astype(bool),
        segment_ids=row["tokens_segment_ids"].astype(np.int32) - 1,
    )
