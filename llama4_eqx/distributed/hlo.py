"""Reading compiled HLO: what a run of a program executes, how often, and on which arrays.

Understands the text of programs compiled for CPUs and for TPUs.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from jax.stages import Compiled

_HEADER = re.compile(r"(ENTRY )?%(\S+) \(")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%(\S+) = (.*)")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(
    r"(?:body|calls|to_apply|branch_computations|(?:true|false)_computation)=(\{.*?\}|%[^\s,]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclass(frozen=True)
class HloArray:
    """An array of the program. `dtype` is in HLO's spelling; `on_chip` is True where a TPU keeps it
    in a memory of the core, not in HBM."""

    dtype: str
    shape: tuple[int, ...]
    on_chip: bool
    size: int
    """Bytes that it takes, with the padding of its tiles."""


@dataclass(frozen=True)
class Instruction:
    """One instruction: its results (several for a tuple), and the names of its operands."""

    name: str
    opcode: str
    results: tuple[HloArray, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def called(self) -> list[str]:
        """The names of the computations that it calls: a fusion's, a loop's body, branches."""
        groups = _CALLED.findall(self.attributes)
        return [name for group in groups for name in re.findall(r"%([^\s,{}]+)", group)]


Computation = dict[str, Instruction]


@dataclass(frozen=True)
class Program:
    """The computations of a program, by name, and the name of the one that a run begins with."""

    computations: dict[str, Computation]
    entry: str

    def executed(self) -> Iterator[tuple[Instruction, Computation, int | None]]:
        """Each instruction with its computation, and how often a run of the program executes it:
        None where that is known only at run time. An instruction in a function that is called twice
        comes twice; what is inside a fusion doesn't come."""
        yield from self._executed(self.entry, 1)

    def _executed(
        self, name: str, times: int | None
    ) -> Iterator[tuple[Instruction, Computation, int | None]]:
        computation = self.computations[name]
        for instruction in computation.values():
            yield instruction, computation, times
            if instruction.opcode == "fusion":
                continue
            inner = times
            if instruction.opcode == "while":
                trips = self._trips(instruction)
                inner = None if trips is None or times is None else times * trips
            elif instruction.opcode == "conditional":
                inner = None
            for called in instruction.called:
                yield from self._executed(called, inner)

    def _trips(self, loop: Instruction) -> int | None:
        """How often a loop runs: said by the text, or the constant that its counter, which JAX
        starts at 0, is compared with."""
        if known := _TRIPS.search(loop.attributes):
            return int(known[1])
        name = re.search(r"condition=%([^\s,]+)", loop.attributes)
        condition = self.computations[name[1]] if name else {}
        root = next((one for one in condition.values() if one.is_root), None)
        if root is None or root.opcode != "compare" or "direction=LT" not in root.attributes:
            return None
        limit = condition.get(root.operands[1])
        value = re.match(r"constant\((\d+)\)", limit.attributes) if limit else None
        return int(value[1]) if value else None


def read_hlo(program: Compiled | str) -> Program:
    """A compiled program, or its text.

    Raises a `ValueError` for a text that isn't compiled HLO.
    """
    text = program if isinstance(program, str) else program.as_text() or ""
    computations: dict[str, Computation] = {}
    entry, here = "", {}
    for line in text.splitlines():
        if line.endswith("{") and (header := _HEADER.match(line)):
            here = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif found := _INSTRUCTION.match(line):
            here[found[2]] = _instruction(found[2], found[3], is_root=bool(found[1]))
    if not entry:
        raise ValueError("The program's text has no entry: it isn't compiled HLO.")
    return Program(computations, entry)


def _instruction(name: str, text: str, *, is_root: bool) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    results, rest = text[:end], text[end:].lstrip()
    opcode, _, arguments = rest.partition("(")
    close = _closing("(" + arguments, 0) - 1
    operands = tuple(re.findall(r"%([^\s,()]+)", arguments[:close]))
    # A constant's value stands where others have operands.
    attributes = rest if opcode in ("constant", "parameter") else arguments[close + 1 :]
    return Instruction(name, opcode, _arrays(results), operands, attributes, is_root)


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` is closed."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"The brackets of {text[:200]!r} aren't closed.")


def _arrays(text: str) -> tuple[HloArray, ...]:
    return tuple(_array(*found) for found in _ARRAY.findall(text))


def _array(dtype: str, dims: str, layout: str) -> HloArray:
    shape = tuple(int(size) for size in dims.split(",") if size)
    order, _, tiling = layout.partition(":")
    padded = [shape[int(axis)] for axis in reversed(order.split(",")) if axis]  # minor axis last
    if tiles := re.match(r"T\(([\d,]+)\)", tiling):
        tile = [int(size) for size in tiles[1].split(",")]
        for i, size in enumerate(reversed(tile[: len(padded)]), 1):
            padded[-i] = -(-padded[-i] // size) * size
    count = math.prod(padded if len(padded) == len(shape) else shape)
    return HloArray(dtype, shape, "S(" in tiling, math.ceil(count * _bits(dtype) / 8))


def _bits(dtype: str) -> int:
    if dtype == "pred":
        return 8
    bits = re.match(r"[a-z]+(\d+)", dtype)
    return int(bits[1]) if bits else 0  # tokens have no size
