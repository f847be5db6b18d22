"""Reading safetensors files: their headers, and slices of their tensors."""

import json
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path, PurePath
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from llama4_eqx.checkpoints.errors import CheckpointError, cannot_load
from llama4_eqx.checkpoints.file_kinds import damage, is_lfs_pointer

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": jnp.float32, "BF16": jnp.bfloat16, "F16": jnp.float16}
# Of the parts of quantised weights, which aren't parameters themselves.
PART_DTYPES = {
    "I8": jnp.int8,
    "U8": jnp.uint8,
    "I32": jnp.int32,
    "I64": np.int64,
    "F8_E4M3": jnp.float8_e4m3fn,
}
Index = tuple[slice, ...]


@dataclass(frozen=True)
class Header:
    """A tensor in a file: its name, shape and dtype there, the latter as safetensors names it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def files(self) -> tuple[Path, ...]:
        """The one file that holds it."""
        return (self.file,)


def raw_tensor(header: Header) -> np.ndarray:
    """A tensor of any of these dtypes, mapped from its file and not read yet."""
    dtypes = DTYPES | PART_DTYPES
    if header.dtype not in dtypes:
        raise CheckpointError(f"{header.name} is {header.dtype}, which no quantised weight uses.")
    stat = header.file.stat()
    start = _starts(header.file, (stat.st_ino, stat.st_size, stat.st_mtime_ns))[header.name]
    dtype = np.dtype(dtypes[header.dtype])
    if 0 in header.shape:
        return np.zeros(header.shape, dtype)
    return np.memmap(header.file, dtype, mode="r", offset=start, shape=header.shape)


@lru_cache(maxsize=256)
def _starts(path: Path, identity: tuple[int, ...]) -> dict[str, int]:
    """Where each tensor's bytes begin in a file that safetensors has already checked. Another file
    under the same name has another `identity`."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(size))
    return {
        name: 8 + size + entry["data_offsets"][0]
        for name, entry in entries.items()
        if name != "__metadata__"
    }


def read_headers(folder: Path) -> dict[str, Header]:
    """The tensors in the folder, by name, from the files' headers.

    `model.safetensors` goes before an index, as in `transformers`. What counts is the files'
    content: an index only says which files there are.

    Raises `CheckpointError` with every missing or damaged file, and `FileNotFoundError` where there
    are no weights at all.
    """
    weight_map, names = {}, [SINGLE]
    if not (folder / SINGLE).is_file():
        weight_map = _weight_map(folder)
        names = sorted(set(weight_map.values()))
    found: dict[str, Header] = {}
    problems, unread = [], set()
    for name in names:
        path = folder / name
        try:
            headers = _headers(path) if _is_inside(name) else f"{name} is missing: it isn't inside"
        except OSError as error:
            headers = f"{name} can't be read ({error.strerror or error})"
        if isinstance(headers, str):
            problems.append(f"file {headers}")
            unread.add(name)
            continue
        for header in headers:
            if header.name in found:
                other = found[header.name].file.relative_to(folder)
                problems.append(f"{header.name} is in both {other} and {name}")
            found[header.name] = header
    problems += [
        f"{tensor} is not in {name}, where the index says it is"
        for tensor, name in weight_map.items()
        if tensor not in found and name not in unread
    ]
    if problems:
        raise cannot_load(folder, problems)
    return found


def _weight_map(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has neither {SINGLE} nor {INDEX}.")
    if is_lfs_pointer(path):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the file: run `git lfs pull`.")
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        if not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
            raise TypeError("weight_map must give a file for each tensor")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}): fetch it again.") from error
    return weight_map


def _is_inside(name: str) -> bool:
    """Whether a file that an index names lies in the folder or a subfolder of it."""
    path = PurePath(name)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name


def _headers(path: Path) -> list[Header] | str:
    """The tensors in a file, or what is wrong with it."""
    if not path.is_file():
        return f"{path.name} is missing"
    try:
        with safe_open(path, framework="numpy") as source:
            views = {tensor: source.get_slice(tensor) for tensor in source.keys()}  # noqa: SIM118
            return [
                Header(path, tensor, tuple(view.get_shape()), view.get_dtype())
                for tensor, view in views.items()
            ]
    except SafetensorError as error:
        return damage(path, error)


def slices(stack: ExitStack) -> Callable[[Header], Any]:
    """What reads slices of a tensor, from files that stay open as long as the stack."""

    @cache
    def opened(file: Path) -> Any:
        return stack.enter_context(safe_open(file, framework="numpy"))

    return lambda header: opened(header.file).get_slice(header.name)


def reader(
    view: Any, axes: Sequence[tuple[int, ...]], offset: int = 0
) -> Callable[[Any], np.ndarray]:
    """Returns a cached reader: `read(index)` takes a slice per axis of the leaf and returns that
    part.

    `view` is what safetensors' `get_slice` returns. `axes` has, for each axis of the tensor, the
    sizes of the leaf's axes that it joins; the leaf begins at `offset` of the last one.
    """
    sizes = tuple(size for joined in axes for size in joined)

    @cache
    def read(bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
        rest = [slice(*bound) for bound in bounds]
        runs = [_runs(joined, [rest.pop(0) for _ in joined]) for joined in axes]
        if offset:
            runs[-1] = [slice(run.start + offset, run.stop + offset) for run in runs[-1]]
        return _joined(view, runs).reshape([stop - start for start, stop in bounds])

    def part(index: Index) -> np.ndarray:
        bounds = (at.indices(size)[:2] for at, size in zip(index, sizes, strict=True))
        return read(tuple(bounds))

    return part


def _runs(sizes: tuple[int, ...], index: Sequence[slice]) -> list[slice]:
    """The contiguous runs of a part of some axes once they are joined to one."""
    positions = np.arange(math.prod(sizes)).reshape(sizes)[tuple(index)].ravel()
    ends = np.flatnonzero(np.diff(positions) != 1) + 1
    return [slice(int(run[0]), int(run[-1]) + 1) for run in np.split(positions, ends)]


def _joined(view: Any, runs: list[list[slice]], fixed: Index = ()) -> np.ndarray:
    axis = len(fixed)
    if axis == len(runs):
        return view[fixed]
    parts = [_joined(view, runs, (*fixed, run)) for run in runs[axis]]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis)
