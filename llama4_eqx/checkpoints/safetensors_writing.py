"""Writing safetensors files in parts, from one process or several."""

import json
import math
import os
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama4_eqx.checkpoints.safetensors_reading import DTYPES, PART_DTYPES, Index

_DTYPE_NAMES = {jnp.dtype(dtype): name for name, dtype in (DTYPES | PART_DTYPES).items()}


@dataclass(frozen=True)
class Entry:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def file_header(entries: list[Entry]) -> tuple[bytes, list[int]]:
    """The header of a file that holds the tensors in this order, and each tensor's start in it.

    Raises a `ValueError` for a dtype that `load_checkpoint` doesn't read.
    """
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ends = np.cumsum([0, *(entry.size for entry in entries)]).tolist()
    for entry, start, end in zip(entries, ends[:-1], ends[1:], strict=True):
        if entry.dtype not in _DTYPE_NAMES:
            known = ", ".join(jnp.dtype(dtype).name for dtype in DTYPES.values())
            raise ValueError(
                f"{entry.name} is {entry.dtype}, but must be one of {known}: cast the model before "
                "saving."
            )
        dtype, shape = _DTYPE_NAMES[entry.dtype], entry.shape
        content[entry.name] = {"dtype": dtype, "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, [len(header) + start for start in ends[:-1]]


def create_file(path: Path, header: bytes, size: int) -> None:
    """Creates a file of `size` bytes that begins with the header; the rest is reserved.

    Raises an `OSError` if the disk has no room for it.
    """
    with path.open("xb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        file.truncate(size)
        file.write(header)


def parts(leaf: Any, layer: int | None) -> list[tuple[Index, np.ndarray]]:
    """The parts of an array, or of one layer of a stacked one, that this process writes, as
    `(index, part)`. The processes' parts together are every element exactly once."""
    found = []
    for index, part in _shards(leaf):
        index = tuple(slice(*at.indices(size)) for at, size in zip(index, leaf.shape, strict=True))
        if layer is None:
            found.append((index, np.asarray(part)))
        elif index[0].start <= layer < index[0].stop:
            found.append((index[1:], np.asarray(part[layer - index[0].start])))
    return _merged(found)


def _shards(leaf: Any) -> list[tuple[Index, Any]]:
    if isinstance(leaf, jax.Array):
        return [(s.index, s.data) for s in leaf.addressable_shards if s.replica_id == 0]
    return [((slice(None),) * leaf.ndim, leaf)] if jax.process_index() == 0 else []


def _merged(found: list[tuple[Index, np.ndarray]]) -> list[tuple[Index, np.ndarray]]:
    """One part instead of several that fill a box: its rows are longer, so fewer writes."""
    if len(found) < 2:
        return found
    starts = np.array([[at.start for at in index] for index, _ in found])
    stops = np.array([[at.stop for at in index] for index, _ in found])
    first, last = starts.min(0), stops.max(0)
    if math.prod(last - first) != sum(part.size for _, part in found):
        return found
    box = np.empty(last - first, found[0][1].dtype)
    for start, stop, (_, part) in zip(starts - first, stops - first, found, strict=True):
        box[tuple(map(slice, start, stop))] = part
    return [(tuple(map(slice, first.tolist(), last.tolist())), box)]


def write_part(
    file: BufferedIOBase, start: int, shape: tuple[int, ...], index: Index, part: np.ndarray
) -> None:
    """Writes one of the `parts` of an array of that shape, which starts at byte `start`.

    Writes only the part's own bytes and reads none, so processes on several machines can write to
    one file on a network disk, which a memory map doesn't allow.
    """
    if not shape:  # a single number
        return write_part(file, start, (1,), (slice(0, 1),), part.reshape(1))
    sharded = [axis for axis, size in enumerate(part.shape) if size != shape[axis]]
    axis = sharded[-1] if sharded else 0
    outer = [np.arange(at.start, at.stop) for at in index[:axis]]
    rows = np.ravel_multi_index(np.ix_(*outer, [index[axis].start]), shape[: axis + 1]).ravel()
    content = np.ascontiguousarray(part).reshape(-1).view(np.uint8).reshape(len(rows), -1)
    step = math.prod(shape[axis + 1 :]) * part.dtype.itemsize
    for row, run in zip(rows.tolist(), content, strict=True):
        file.seek(start + row * step)
        file.write(run.data)
