"""Reading collectives off compiled HLO."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.stages import Compiled

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%\S+ = (\(.*?\)|\S+) ([a-z-]+)\((.*)")
_CALLED = re.compile(r"(?:body|calls|to_apply|(?:true|false|branch)_computations?)=(\{.*?\}|\S+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ARRAY = re.compile(r"([a-z]+)(\d*)\[([\d,]*)\]")
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
_DTYPES = {"f": "float", "bf": "bfloat", "s": "int", "u": "uint", "c": "complex"}


@dataclass(frozen=True)
class Collective:
    """One collective instruction, over groups of `devices` along some mesh `axes`.

    `shape` and `dtype` are those of a device's result; `times` is how often a run of the program
    executes it, None where that is known only at run time.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    devices: int
    times: int | None

    @property
    def size(self) -> int:
        """Bytes of a device's result."""
        itemsize = 1 if self.dtype == "bool" else jnp.dtype(self.dtype).itemsize
        return math.prod(self.shape) * itemsize

    @property
    def sent(self) -> float:
        """Bytes that a device sends each time, with ring algorithms."""
        others = self.devices - 1
        parts = {
            "all-gather": others / self.devices,
            "all-reduce": 2 * others / self.devices,
            "reduce-scatter": others,
            "all-to-all": others / self.devices,
            "collective-permute": 1,
        }
        return float(self.size * parts[self.kind])


def collectives(program: Compiled | str, mesh: Mesh) -> list[Collective]:
    """The collectives of a program compiled for the mesh, or of its text, in the text's order.

    An instruction in a loop is one entry; one in a function that is called twice is two.

    Reads the text of programs compiled for CPUs; raises a `ValueError` for what it doesn't
    understand.
    """
    text = program if isinstance(program, str) else program.as_text() or ""
    computations, entry = _computations(text)

    def walk(name: str, times: int | None) -> Iterator[Collective]:
        for result, opcode, rest in computations[name]:
            if opcode in _KINDS:
                yield replace(_collective(result, opcode, rest, mesh), times=times)
            elif opcode.removesuffix("-start") in _KINDS:
                raise ValueError(f"{opcode} isn't understood: compile the program for CPUs.")
            inner = times
            if opcode == "while":
                trips = _TRIPS.search(rest)
                inner = times * int(trips[1]) if trips and times is not None else None
            elif opcode == "conditional":
                inner = None
            for called in _CALLED.findall(rest):
                for computation in re.findall(r"%([^\s,{}]+)", called):
                    yield from walk(computation, inner)

    return list(walk(entry, 1))


def _computations(text: str) -> tuple[dict[str, list[tuple[str, str, str]]], str]:
    """Each computation's instructions, as result, opcode and the rest; and the entry's name."""
    found, entry, here = {}, "", []
    for line in text.splitlines():
        if line.endswith("{") and (header := re.match(r"(ENTRY )?%(\S+) \(", line)):
            here = found[header[2]] = []
            entry = header[2] if header[1] else entry
        elif instruction := _INSTRUCTION.match(line):
            here.append(instruction.groups())
    if not entry:
        raise ValueError("The program's text has no entry: it isn't compiled HLO.")
    return found, entry


def _collective(result: str, opcode: str, rest: str, mesh: Mesh) -> Collective:
    arrays = _ARRAY.findall(result)
    kind, bits, dims = arrays[0]
    shape = tuple(int(size) for size in dims.split(",") if size)
    if len(arrays) > 1:  # of an all-to-all one for each device, of an all-reduce perhaps several
        shape = (sum(_elements(one) for one in arrays),)
    dtype = "bool" if kind == "pred" else _DTYPES[kind] + bits
    group = _first_group(rest)
    members = np.array(np.unravel_index(group, mesh.devices.shape))
    axes = tuple(
        name for name, along in zip(mesh.axis_names, members, strict=True) if len(set(along)) > 1
    )
    return Collective(opcode, dtype, shape, axes, len(group), None)


def _elements(array: tuple[str, str, str]) -> int:
    return math.prod(int(size) for size in array[2].split(",") if size)


def _first_group(rest: str) -> list[int]:
    """The group of devices that has the first one; HLO has four ways to write groups."""
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", rest):
        return [int(pairs[1]), int(pairs[2])]
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return [int(device) for device in listed[1].split(",")]
    if iota := re.search(rf"replica_groups=\[\d+,(\d+)\]<={_IOTA}", rest):
        return _iota(iota[2], iota[3])[: int(iota[1])].tolist()
    if named := re.search(
        rf"replica_groups=mesh\[([^\]]+)\](?:, device_ids=\({_IOTA}\))? \{{('[\w', ]+')\}}", rest
    ):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        count = str(math.prod(sizes.values()))
        ids = _iota(named[2] or count, named[3]).reshape(tuple(sizes.values()))
        along = re.findall(r"'(\w+)'", named[4])
        return ids[tuple(slice(None) if name in along else 0 for name in sizes)].ravel().tolist()
    raise ValueError(f"The groups of devices in {rest[:200]!r} aren't understood.")


def _iota(shape: str, order: str | None) -> np.ndarray:
    """The device numbers of `[16,2]T(1,0)`: an iota of that shape with its axes permuted."""
    sizes = [int(size) for size in shape.split(",")]
    axes = [int(axis) for axis in order.split(",")] if order else None
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(axes).reshape(-1)
