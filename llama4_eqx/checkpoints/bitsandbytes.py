"""Quantised weights in the layout of `bitsandbytes`, dequantised as they are read.

In 4 bits (`nf4`, `fp4`), a weight's rows follow one another as one long row, of which each block of
numbers has a scale. A number is an index into a table of 16 values, two in a byte, the first in the
upper half; the scales may be indices, too, into a table of 256, with a scale for each block of
them and an offset for all. Tables, sizes and dtype stand beside the weight. In 8 bits (`int8`) each
row has a scale, the row's largest absolute value. Source: bitsandbytes 0.50.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from llama4_eqx.checkpoints.errors import cannot_load
from llama4_eqx.checkpoints.safetensors_reading import DTYPES, Header, raw_tensor

_STATE = "quant_state.bitsandbytes__"
_FIELDS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class FourBit:
    """A weight of 4 bits. Slices of it are read and dequantised: `weight[0:5, :]`."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    block_size: int
    nested_block_size: int | None
    offset: float
    numbers: Header
    fields: Mapping[str, Header]

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that hold a part of it."""
        return tuple(sorted({header.file for header in (self.numbers, *self.fields.values())}))

    @cached_property
    def _scales(self) -> np.ndarray:
        scales = raw_tensor(self.fields["absmax"]).reshape(-1)
        if self.nested_block_size is None:
            return np.asarray(scales)
        nested = np.repeat(raw_tensor(self.fields["nested_absmax"]), self.nested_block_size)
        table = np.asarray(raw_tensor(self.fields["nested_quant_map"]))
        return table[scales] * nested[: len(scales)] + np.float32(self.offset)

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        rows, columns = (at.indices(size) for at, size in zip(index, self.shape, strict=True))
        first, last = (row * self.shape[1] for row in rows[:2])
        pairs = np.asarray(raw_tensor(self.numbers).reshape(-1)[first // 2 : -(-last // 2)])
        numbers = np.stack([pairs >> 4, pairs & 15], axis=-1).reshape(-1)
        numbers = numbers[first % 2 :][: last - first]
        scales = self._scales[np.arange(first, last) // self.block_size]
        values = np.asarray(raw_tensor(self.fields["quant_map"]))[numbers] * scales
        matrix = values.reshape(-1, self.shape[1])[:, slice(*columns)]
        return matrix.astype(np.dtype(DTYPES[self.dtype]))


@dataclass(frozen=True)
class EightBit:
    """A weight of int8. Slices of it are read and dequantised: `weight[0:5, :]`."""

    name: str
    numbers: Header
    largest: Header
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weight."""
        return self.numbers.shape

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that hold a part of it."""
        return tuple(sorted({self.numbers.file, self.largest.file}))

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        numbers = raw_tensor(self.numbers)[index].astype(np.float32)
        values = numbers * raw_tensor(self.largest)[index[0], None] * np.float32(1 / 127)
        return values.astype(np.dtype(DTYPES[self.dtype]))


def with_bitsandbytes(
    headers: Mapping[str, Header], folder: Path
) -> Mapping[str, Header | FourBit | EightBit]:
    """The tensors of a folder, with one `FourBit` or `EightBit` in place of each quantised weight's
    parts.

    A weight of int8 doesn't say which dtype it stands for: it gets that of the folder's norms.
    Raises `CheckpointError` for parts that are missing or don't fit together.
    """
    found: dict[str, Header | FourBit | EightBit] = dict(headers)
    norms = {header.dtype for name, header in headers.items() if name.endswith("norm.weight")}
    dtype = norms.pop() if len(norms) == 1 and norms <= DTYPES.keys() else "F32"
    problems = []
    for name, header in headers.items():
        prefix = name.partition(f".{_STATE}")[0]
        if prefix != name:
            del found[name]
            fields = {field: found.pop(f"{prefix}.{field}", None) for field in _FIELDS}
            made = _four_bit(prefix, headers.get(prefix), header, fields)
        elif name.endswith(".SCB"):
            del found[name]
            prefix = f"{name.removesuffix('.SCB')}.weight"
            found.pop(f"{prefix}_format", None)
            made = _eight_bit(prefix, headers.get(prefix), header, dtype)
        else:
            continue
        if isinstance(made, str):
            problems.append(f"{prefix} {made}")
        else:
            found[prefix] = made
    if problems:
        raise cannot_load(folder, problems)
    return found


def _four_bit(
    name: str, numbers: Header | None, state: Any, fields: dict[str, Any]
) -> FourBit | str:
    """The weight, or what is wrong with its parts."""
    if numbers is None or numbers.dtype != "U8":
        return "has a quant_state, but no numbers of 4 bits"
    try:
        said = json.loads(bytes(raw_tensor(state)))
        shape, block_size = tuple(map(int, said["shape"])), int(said["blocksize"])
        dtype = _DTYPES[said["dtype"]]
        nested = int(said.get("nested_blocksize") or 0) or None
        offset = float(said.get("nested_offset", 0))
    except (ValueError, KeyError, TypeError, OverflowError):
        return "has a quant_state that can't be read"
    if len(shape) != 2 or min(*shape, block_size, nested or 1) < 1:
        return f"has a quant_state of shape {shape} and blocks of {block_size}"
    count = shape[0] * shape[1]
    scales = -(-count // block_size)
    expected = {"absmax": ("F32", scales), "quant_map": ("F32", 16)}
    if nested:
        expected["absmax"] = ("U8", scales)
        expected["nested_absmax"] = ("F32", -(-scales // nested))
        expected["nested_quant_map"] = ("F32", 256)
    if _size(numbers) != -(-count // 2):
        return f"has shape {shape}, but {_size(numbers)} bytes of numbers"
    for field, (field_dtype, size) in expected.items():
        header = fields[field]
        if header is None:
            return f"lacks its {field}"
        if (header.dtype, _size(header)) != (field_dtype, size):
            return f"has {_size(header)} {header.dtype} in {field}, but needs {size} {field_dtype}"
    present = {field: fields[field] for field in expected}
    return FourBit(name, shape, dtype, block_size, nested, offset, numbers, present)


def _eight_bit(name: str, numbers: Header | None, largest: Any, dtype: str) -> EightBit | str:
    if numbers is None or numbers.dtype != "I8" or len(numbers.shape) != 2:
        return "has an SCB, but no matrix of int8"
    if largest.dtype != "F32" or largest.shape != numbers.shape[:1]:
        return f"has shape {numbers.shape}, but {largest.shape} {largest.dtype} in SCB"
    return EightBit(name, numbers, largest, dtype)


def _size(header: Header) -> int:
    return int(np.prod(header.shape, dtype=np.int64))
