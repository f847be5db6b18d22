"""The collectives of a compiled program: what the devices of a mesh send each other."""

import math
import re
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.stages import Compiled

from llama4_eqx.distributed.hlo import Instruction, Program, read_hlo

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
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


def collectives(program: Compiled | str | Program, mesh: Mesh) -> list[Collective]:
    """The collectives of a program compiled for the mesh, or of its text, in the text's order.

    An instruction in a loop is one entry; one in a function that is called twice is two.

    Raises a `ValueError` for what it doesn't understand.
    """
    program = program if isinstance(program, Program) else read_hlo(program)
    return [
        _collective(inner, kind, mesh, times)
        for instruction, _, times in program.executed()
        for inner, kind in _collectives_of(program, instruction)
    ]


def _collectives_of(program: Program, instruction: Instruction) -> list[tuple[Instruction, str]]:
    """The instruction, if it is a collective, or those inside a fusion; with their kinds."""
    opcode = instruction.opcode.removesuffix("-start")
    if opcode in _KINDS:
        return [(instruction, opcode)]
    if opcode != "fusion":
        return []
    found = []
    for name in instruction.called:
        for inner in program.computations[name].values():
            found += _collectives_of(program, inner)
    # TPUs write a reduce-scatter so: an all-reduce of which each device takes a slice.
    names = " ".join((instruction.name, *instruction.called))
    if [kind for _, kind in found] == ["all-reduce"] and "all-reduce-scatter" in names:
        whole = found[0][0]
        scattered = Instruction(
            whole.name, "reduce-scatter", instruction.results, (), whole.attributes, False
        )
        return [(scattered, "reduce-scatter")]
    return found


def _collective(instruction: Instruction, kind: str, mesh: Mesh, times: int | None) -> Collective:
    arrays = list(instruction.results)
    if not arrays:
        raise ValueError(f"{instruction.name} has no result: it isn't understood.")
    if instruction.opcode.endswith("-start") and len(arrays) > 1:  # operands, then results
        if [(one.dtype, one.shape) for one in arrays[2:]] == [("u32", ())] * 2:  # then semaphores
            arrays = arrays[:2]
        arrays = arrays[len(arrays) // 2 :]
    shape = arrays[0].shape
    if len(arrays) > 1:  # of an all-to-all one for each device, of an all-reduce perhaps several
        shape = (sum(math.prod(one.shape) for one in arrays),)
    dtype = "bool" if arrays[0].dtype == "pred" else _dtype(arrays[0].dtype)
    group = _first_group(instruction.attributes)
    members = np.array(np.unravel_index(group, mesh.devices.shape))
    axes = tuple(
        name for name, along in zip(mesh.axis_names, members, strict=True) if len(set(along)) > 1
    )
    return Collective(kind, dtype, shape, axes, len(group), times)


def _dtype(spelling: str) -> str:
    kind, *bits = re.split(r"(?<=\D)(?=\d)", spelling, maxsplit=1)
    return "".join([_DTYPES[kind], *bits])


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
