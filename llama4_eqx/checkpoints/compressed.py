"""Quantised weights in the layout of `compressed-tensors`, dequantised as they are read, or not.

A weight `W` of `out` rows and `in` columns is stored as numbers and scales, `W = scale · number` or
`scale · (number - zero_point)`, with one scale for the tensor, a row, a group of columns in a row,
or a block. Numbers are FP8 or int8, or integers of few bits packed into int32 words along a row,
the lowest bits first. Source: compressed-tensors 0.20.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama4_eqx.checkpoints.errors import CheckpointError, cannot_load
from llama4_eqx.checkpoints.safetensors_reading import DTYPES, Header, raw_tensor

_FORMATS = ("float-quantized", "int-quantized", "pack-quantized", "naive-quantized", "dense")
_STRATEGIES = ("tensor", "channel", "group", "block")
# Of activations, which stay in floating point.
_ACTIVATIONS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")
_FIELDS = ("weight_scale", "weight_zero_point", "weight_packed", "weight_shape", "weight_g_idx")


class Form(NamedTuple):
    """How a quantised weight can be kept: the dtype of its numbers, and how many groups of inputs
    have a scale of their own for each output."""

    dtype: str
    groups: int


@dataclass(frozen=True)
class Part:
    """Numbers or scales of a quantised weight. Slices of them are read: `part[0:5, :]`."""

    read: Callable[[slice, slice], np.ndarray]

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        return self.read(*index)


@dataclass(frozen=True)
class Compressed:
    """A quantised weight. Slices of it are read and dequantised: `weight[0:5, :]`."""

    name: str
    shape: tuple[int, ...]
    number_header: Header
    scale_header: Header
    zero_point: Header | None
    group_of_column: Header | None
    bits: int | None
    block: tuple[int, int] | None

    @property
    def dtype(self) -> str:
        """That of the dequantised weight, as safetensors names it: its scales'."""
        return self.scale_header.dtype

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that hold a part of it."""
        parts = (self.number_header, self.scale_header, self.zero_point, self.group_of_column)
        return tuple(sorted({part.file for part in parts if part is not None}))

    @property
    def form(self) -> Form | None:
        """How it can be kept as it is; None where only its dequantised weight can."""
        columns, groups = self.shape[1], self._scales().shape[1]
        size = columns // groups if self.block is None else self.block[1]
        if self.group_of_column is not None or size * groups != columns:
            return None
        if self.zero_point is not None and np.any(raw_tensor(self.zero_point)):
            return None
        if self.number_header.dtype == "F8_E4M3":
            return Form("float8_e4m3fn", groups)
        return Form("int4" if self.bits == 4 and size % 2 == 0 else "int8", groups)

    @property
    def numbers(self) -> Part:
        """The numbers, one in each place."""
        return Part(self._numbers)

    @property
    def scales(self) -> Part:
        """The scales of each output, one for each group of inputs."""

        def read(rows: slice, groups: slice) -> np.ndarray:
            scale, index = self._scales(), np.arange(self.shape[0])[rows]
            if self.block is not None:
                index = index // self.block[0]
            elif len(scale) == 1:
                index = index * 0
            return scale[index, groups]

        return Part(read)

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        rows, columns = (
            slice(*at.indices(size)[:2]) for at, size in zip(index, self.shape, strict=True)
        )
        scale = self._spread(self._scales(), rows, columns)
        values = self._numbers(rows, columns).astype(scale.dtype)
        if self.zero_point is not None:
            zero_point = _matrix(raw_tensor(self.zero_point))
            if self.bits is not None:
                zero_point = unpacked(zero_point.T, self.bits, self.shape[0]).T
            values = values - self._spread(zero_point, rows, columns).astype(scale.dtype)
        return values * scale

    def _numbers(self, rows: slice, columns: slice) -> np.ndarray:
        numbers = raw_tensor(self.number_header)[rows]
        if self.bits is not None:
            numbers = unpacked(numbers, self.bits, self.shape[1])
        return numbers[:, columns]

    def _scales(self) -> np.ndarray:
        return _matrix(raw_tensor(self.scale_header))

    def _spread(self, scale: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
        """Scales, or zero points, for these rows and columns."""
        row_index = np.arange(rows.start, rows.stop)
        column_index = np.arange(columns.start, columns.stop)
        if self.block is not None:
            return scale[row_index // self.block[0]][:, column_index // self.block[1]]
        if self.group_of_column is not None:
            column_index = np.asarray(raw_tensor(self.group_of_column))[column_index]
        else:
            column_index = column_index // math.ceil(self.shape[1] / scale.shape[1])
        scale = scale if len(scale) == 1 else scale[row_index]
        return scale if scale.shape[1] == 1 else scale[:, column_index]


def _matrix(scale: np.ndarray) -> np.ndarray:
    """One row for each output, or for all."""
    return np.asarray(scale).reshape(-1, 1) if scale.ndim < 2 else np.asarray(scale)


def unpacked(words: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """The int8 numbers of `bits` bits that are packed along the rows of int32 words."""
    words = np.ascontiguousarray(words).view(np.uint32)
    first = np.arange(columns) * bits
    word, shift = first // 32, (first % 32).astype(np.uint32)
    values = words[:, word] >> shift
    straddles = shift + bits > 32
    if straddles.any():
        rest = words[:, word[straddles] + 1] << (np.uint32(32) - shift[straddles])
        values[:, straddles] |= rest
    values = (values & np.uint32(2**bits - 1)).astype(np.int16) - 2 ** (bits - 1)
    return values.astype(np.int8)


def packed_words(numbers: np.ndarray) -> np.ndarray:
    """Numbers of four bits, eight in each int32 word: what `unpacked` reads."""
    halves = np.pad((numbers + 8).astype(np.uint32), ((0, 0), (0, -numbers.shape[1] % 8)))
    words = halves.reshape(len(halves), -1, 8) << (4 * np.arange(8, dtype=np.uint32))
    return np.bitwise_or.reduce(words, axis=-1).view(np.int32)


def with_compressed(
    headers: Mapping[str, Header], settings: Mapping[str, Any], folder: Path
) -> Mapping[str, Header | Compressed]:
    """The tensors of a folder, with a `Compressed` in place of each quantised weight's parts.

    `settings` is the config's `quantization_config`. Raises `CheckpointError` for formats that
    can't be read and for parts that don't fit together.
    """
    groups = _weight_settings(settings, folder)
    found: dict[str, Header | Compressed] = {}
    parts: dict[str, dict[str, Header]] = {}
    for name, header in headers.items():
        module, _, field = name.rpartition(".")
        if field in _FIELDS:
            parts.setdefault(module, {})[field] = header
        elif field not in _ACTIVATIONS:
            found[name] = header
    problems = []
    for module, fields in parts.items():
        weight = found.pop(f"{module}.weight", None)
        if isinstance(weight, Header):
            fields["weight"] = weight
        made = _compressed(f"{module}.weight", fields, groups)
        if isinstance(made, str):
            problems.append(f"{module}.weight {made}")
        else:
            found[made.name] = made
    if problems:
        raise cannot_load(folder, problems)
    return found


def _weight_settings(settings: Mapping[str, Any], folder: Path) -> list[Mapping[str, Any]]:
    """What the config says of weights, for each group of them."""

    def refuse(what: str) -> CheckpointError:
        return CheckpointError(
            f"{folder} is quantised with {what}, which can't be read: only {', '.join(_FORMATS)} "
            f"with one scale for each {', '.join(_STRATEGIES[:-1])} or {_STRATEGIES[-1]}."
        )

    groups = settings.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise refuse("an unnamed scheme")
    for name in ("kv_cache_scheme", "transform_config"):
        if settings.get(name):
            raise refuse(name)
    sparsity = settings.get("sparsity_config") or {}
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        raise refuse(f"sparsity {json.dumps(sparsity.get('format'))}")
    found = []
    for group in groups.values():
        group = group if isinstance(group, Mapping) else {}
        weights, form = group.get("weights"), group.get("format") or settings.get("format")
        if form not in _FORMATS:
            raise refuse(f"the format {json.dumps(form)}")
        if not isinstance(weights, Mapping) or weights.get("strategy") not in _STRATEGIES:
            strategy = weights.get("strategy") if isinstance(weights, Mapping) else None
            raise refuse(f"the strategy {json.dumps(strategy)}")
        found.append(weights)
    return found


def _compressed(
    name: str, fields: Mapping[str, Header], groups: list[Mapping[str, Any]]
) -> Compressed | str:
    """The weight, or what is wrong with its parts."""
    packed, scale = fields.get("weight_packed"), fields.get("weight_scale")
    numbers = packed if packed is not None else fields.get("weight")
    if numbers is None or scale is None:
        return f"is quantised, but lacks its {'numbers' if numbers is None else 'scale'}"
    if scale.dtype not in DTYPES or len(numbers.shape) != 2:
        return f"has scales of {scale.dtype} and numbers of shape {numbers.shape}"
    shape, bits = numbers.shape, None
    if packed is not None:
        header = fields.get("weight_shape")
        if header is None or header.shape != (2,):
            return "is packed, but lacks its weight_shape"
        shape = tuple(int(size) for size in raw_tensor(header))
        asked = {group.get("num_bits") for group in groups}
        fitting = [b for b in range(1, 9) if b in asked and _words(shape[1], b) == packed.shape[1]]
        if len(fitting) != 1 or packed.shape[0] != shape[0] or packed.dtype != "I32":
            return f"has shape {shape}, but {packed.dtype} words of shape {packed.shape}"
        bits = fitting[0]
    elif numbers.dtype not in ("F8_E4M3", "I8"):
        return f"has a scale, but its numbers are {numbers.dtype}"
    block, rows = None, scale.shape[0] if len(scale.shape) == 2 else 1
    if rows not in (1, shape[0]) or (rows == 1 and len(scale.shape) == 2 and scale.shape[1] > 1):
        block = _block(groups, shape, scale.shape)
        if block is None:
            return f"has shape {shape}, but scales of shape {scale.shape}"
    elif len(scale.shape) == 2 and shape[1] % scale.shape[1] and "weight_g_idx" not in fields:
        return f"has {shape[1]} columns, but scales for {scale.shape[1]} groups of them"
    return Compressed(
        name=name,
        shape=shape,
        number_header=numbers,
        scale_header=scale,
        zero_point=fields.get("weight_zero_point"),
        group_of_column=fields.get("weight_g_idx"),
        bits=bits,
        block=block,
    )


def _words(columns: int, bits: int) -> int:
    return -(-columns * bits // 32)


def _block(
    groups: list[Mapping[str, Any]], shape: tuple[int, ...], blocks: tuple[int, ...]
) -> tuple[int, int] | None:
    """The rows and columns of a block, of which there are as many as scales."""
    for group in groups:
        sides = group.get("block_structure")
        if not isinstance(sides, list | tuple) or len(sides) != 2:
            continue
        rows, columns = sides
        if all(isinstance(size, int) and size > 0 for size in sides) and blocks == (
            -(-shape[0] // rows),
            -(-shape[1] // columns),
        ):
            return rows, columns
    return None
