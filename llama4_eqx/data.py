"""Documents to batches of packed rows, by way of grain: shuffled, shared out among processes, and
resumable at any batch. Needs the extra `train`."""

from collections.abc import Sequence
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


class Document(TypedDict):
    """What is to be read in one go, and which of its tokens count when they are predicted."""

    tokens: Int32[np.ndarray, "seq"]
    target_mask: Bool[np.ndarray, "seq"]


class Packed(TypedDict):
    """Rows of documents, as `next_token_loss` takes them: each document has an id of its own in its
    row, and padding has -1."""

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
    """Batches of `rows` rows of `seq` tokens; without end where `epochs` is None.

    `documents` is a list, or any object with `len` and an index, which reads them when asked. They
    come in an order that the seed decides, another in each epoch. One longer than `seq` is cut into
    pieces, each a document to the model; `window` pieces at a time are shuffled, so that those of
    one document don't fill a batch. Pieces share a row where they fit: `open_rows` rows are filled
    at a time, and more of them leave less padding. Of all documents each process reads its own
    share, that of `jax.process_index()` unless given, and a batch has so many rows of each process.
    What doesn't fill a batch at the very end is left out.

    `iter(…)` has `get_state()` and `set_state(state)`: from one batch on, the same batches follow.

    Raises a `ValueError` for fewer documents than processes.
    """
    process = jax.process_index() if process is None else process
    processes = jax.process_count() if processes is None else processes
    if len(documents) < processes:
        raise ValueError(
            f"{len(documents)} documents can't be shared out among {processes} processes: use "
            "fewer processes, or cut the documents."
        )
    shuffled = grain.MapDataset.source(documents).seed(seed).shuffle()[process::processes]
    pieces = FlatMapIterDataset(shuffled.repeat(epochs).to_iter_dataset(), _Cut(seq))
    packed = FirstFitPackIterDataset(
        WindowShuffleIterDataset(pieces, window_size=window, seed=seed),
        length_struct={"tokens": seq, "target_mask": seq},
        num_packing_bins=open_rows,
        seed=seed,
    )
    return packed.map(_named).batch(rows, drop_remainder=True)


class _Cut(FlatMapTransform):
    """Into pieces of at most so many tokens."""

    max_fan_out = 1 << 20

    def __init__(self, size: int):
        self.size = size

    def flat_map(self, element: Document) -> Sequence[Document]:
        tokens, target_mask = element["tokens"], element["target_mask"]
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
