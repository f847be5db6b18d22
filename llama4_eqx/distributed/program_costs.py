"""What a program compiled for TPUs or GPUs costs each device: bytes of HBM, operations, cycles.

XLA's own cost analysis counts a loop's body once, and the whole of an array that is updated in
place; these counts follow the loops, and what is read and written.
"""

import math
import re
from collections import defaultdict
from dataclasses import dataclass, field

from jax.stages import Compiled

from llama4_eqx.distributed.hlo import Computation, HloArray, Instruction, Program, read_hlo

# Of these no array is read: names for what is there, or control flow, whose body is counted.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "opt-barrier", "add-dependency",
    "async-start", "call-start",
}  # fmt: skip
_READS_PART = {"dynamic-slice", "slice", "gather"}
_WRITES_PART = {"dynamic-update-slice": 1, "scatter": 2}
"""The operand with the new values, of which as much is written."""
_UNKNOWN_CYCLES = 2**62


@dataclass(frozen=True)
class ProgramCosts:
    """Of one run on one device, loops of unknown length left out."""

    hbm_bytes: float
    """Read from and written to HBM."""
    flops: float
    """Of matrix products: two for each multiplication; kernels on GPUs aren't in it."""
    cycles: float
    """The compiler's estimate, if nothing but communication overlaps; kernels aren't in it, nor is
    there one for GPUs."""
    hbm_by_name: dict[str, float] = field(repr=False)
    """The bytes, by the operation in the source that asked for them."""


def program_costs(program: Compiled | str | Program) -> ProgramCosts:
    """The costs of a program compiled for TPUs or GPUs, or of its text."""
    program = program if isinstance(program, Program) else read_hlo(program)
    by_name: dict[str, float] = defaultdict(float)
    flops = cycles = 0.0
    for instruction, computation, times in program.executed():
        if times is None:
            continue
        size = _hbm_bytes(program, instruction, computation)
        if size:
            by_name[_source(instruction)] += times * size
        flops += times * _flops(program, instruction, computation)
        estimate = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
        if estimate and int(estimate[1]) < _UNKNOWN_CYCLES:
            cycles += times * int(estimate[1])
    return ProgramCosts(sum(by_name.values()), flops, cycles, dict(by_name))


def _source(instruction: Instruction) -> str:
    name = re.search(r'op_name="([^"]*)"', instruction.attributes)
    return name[1] if name else instruction.opcode


def _hbm_bytes(program: Program, instruction: Instruction, computation: Computation) -> int:
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done"):
        return 0
    operands = [computation[name].results for name in instruction.operands if name in computation]
    if opcode in ("copy-start", "slice-start"):
        source, copy = instruction.results[:2]
        if opcode == "copy-start":
            source, copy = copy, source
        return sum(copy.size for one in (copy, source) if not one.on_chip)
    if opcode in _READS_PART:
        source = _in_hbm(operands[0])
        return (min(_size(instruction.results), source) if source else 0) + _in_hbm(
            instruction.results
        )
    if opcode in _WRITES_PART and _in_hbm(instruction.results):
        return 2 * _size(operands[_WRITES_PART[opcode]])
    if opcode != "fusion":
        return sum(map(_in_hbm, operands)) + _in_hbm(instruction.results)
    inside = program.computations[instruction.called[0]]
    read = 0
    for number, arrays in enumerate(operands):
        whole = _in_hbm(arrays)
        if whole:
            part = _read_of_parameter(program, inside, number)
            read += whole if part is None else min(part, whole)
    return read + _written(inside, instruction)


def _read_of_parameter(program: Program, inside: Computation, number: int) -> int | None:
    """Bytes that a fusion reads of its operand `number`, None for all of it."""
    parameter = next(
        one
        for one in inside.values()
        if one.opcode == "parameter" and f"parameter({number})" in one.attributes
    )
    return _read_of(program, inside, parameter.name)


def _read_of(program: Program, inside: Computation, name: str) -> int | None:
    if inside[name].is_root:
        return None
    total = 0
    for user in inside.values():
        if name not in user.operands:
            continue
        if user.opcode in _READS_PART and user.operands[0] == name:
            part = _size(user.results)
        elif user.opcode in _WRITES_PART and user.operands[0] == name:
            part = 0
        elif user.opcode in ("bitcast", "copy") or _only_copies(program, user):
            part = _read_of(program, inside, user.name)
        elif user.opcode == "fusion":
            nested = program.computations[user.called[0]]
            part = _read_of_parameter(program, nested, user.operands.index(name))
        else:
            part = None
        if part is None:
            return None
        total += part
    return total


def _only_copies(program: Program, fusion: Instruction) -> bool:
    """Whether it is a fusion that only gives its operand another layout. Inside another fusion that
    reads nothing by itself."""
    if fusion.opcode != "fusion":
        return False
    nested = program.computations[fusion.called[0]]
    return {one.opcode for one in nested.values()} == {"parameter", "copy"}


def _written(inside: Computation, fusion: Instruction) -> int:
    """Bytes that a fusion writes: of an array that it updates in place, the new part, twice, since
    it is also read where a tile is written in part."""
    root = next(one for one in inside.values() if one.is_root)
    roots = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
    if len(roots) != len(fusion.results):
        return _in_hbm(fusion.results)
    written = 0
    for one, result in zip(roots, fusion.results, strict=True):
        while one.opcode == "bitcast" and one.operands[0] in inside:
            one = inside[one.operands[0]]
        if result.on_chip:
            continue
        if one.opcode in _WRITES_PART:
            written += 2 * _size(inside[one.operands[_WRITES_PART[one.opcode]]].results)
        else:
            written += result.size
    return written


def _flops(program: Program, instruction: Instruction, computation: Computation) -> float:
    if instruction.opcode == "fusion":
        inside = program.computations[instruction.called[0]]
        return sum(_flops(program, one, inside) for one in inside.values())
    if instruction.opcode == "custom-call":
        estimate = re.search(r'"cost_estimate":\{"flops":"(\d+)"', instruction.attributes)
        return float(estimate[1]) if estimate else 0.0
    if instruction.opcode not in ("convolution", "dot"):
        return 0.0
    outputs = math.prod(instruction.results[0].shape)
    right = computation[instruction.operands[1]].results[0].shape
    if labels := re.search(r"dim_labels=\w+_(\w+)->", instruction.attributes):
        return 2.0 * outputs * right[labels[1].index("i")] * _window(instruction)
    axes = re.search(r"rhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    return 2.0 * outputs * math.prod(right[int(a)] for a in axes[1].split(",") if a) if axes else 0


def _window(convolution: Instruction) -> int:
    """Over how many places of its window a convolution sums: TPUs write batches and further summed
    axes of a product as windows, of which batches, dilated or padded, have one place."""
    window = re.search(r"window=\{([^}]*)\}", convolution.attributes)
    if not window:
        return 1
    given = dict(part.split("=", 1) for part in window[1].split())
    sizes = [int(size) for size in given["size"].split("x")]
    single = [False] * len(sizes)
    for name in ("lhs_dilate", "rhs_dilate"):
        for i, value in enumerate(given.get(name, "").split("x")):
            single[i] |= value not in ("", "1")
    for i, value in enumerate(given.get("pad", "").split("x")):
        single[i] |= value not in ("", "0_0")
    return math.prod(size for size, one in zip(sizes, single, strict=True) if not one)


def _size(arrays: tuple[HloArray, ...]) -> int:
    return sum(one.size for one in arrays)


def _in_hbm(arrays: tuple[HloArray, ...]) -> int:
    return sum(one.size for one in arrays if not one.on_chip)
