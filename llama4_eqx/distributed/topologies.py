"""Slices of TPUs to compile for, on a machine that has none."""

import math
import os
import re
from collections.abc import Mapping
from importlib.util import find_spec

import numpy as np
from jax.errors import JaxRuntimeError
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh
from jax.stages import Compiled, Lowered

_OUT_OF_HBM = re.compile(
    r"Used (\S+) of (\S+) hbm|required[^(]*\((\S+)\) exceeds available HBM \((\S+)\)"
)
# Else libtpu asks a metadata server what machine this is, complains that it knows nothing of other
# hosts, and keeps other processes out.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def tpu_mesh(topology: str, axes: Mapping[str, int]) -> Mesh:
    """A mesh of the TPUs of a slice such as `"v5e:4x4"`, `"v5p:4x4x4"` or `"v6e:8x8"`, which need
    not exist: programs can be compiled for it, but not run. `axes` are the mesh axes' sizes.

    Raises an `ImportError` without libtpu, and a `ValueError` for a slice that there isn't, or of
    another size.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if find_spec("libtpu") is None:
        raise ImportError(
            "Compiling for TPUs needs libtpu, for Linux on x86: pip install 'llama4_eqx[tpu-plan]'."
        )
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except (JaxRuntimeError, ValueError, NotImplementedError) as error:
        said = str(error).splitlines()[0]
        raise ValueError(f'"{topology}" is no slice of TPUs such as "v5p:4x4x4": {said}') from None
    shape = tuple(axes.values())
    if math.prod(shape) != len(devices):
        sizes = " × ".join(f"{name} {size}" for name, size in axes.items())
        raise ValueError(f"{topology} has {len(devices)} devices, and {sizes} are another number.")
    try:  # neighbours along a mesh axis are neighbours in the slice
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError, ValueError):
        placed = np.array(devices).reshape(shape)
    return Mesh(placed, tuple(axes), axis_types=(AxisType.Auto,) * len(shape))


class HbmError(Exception):
    """A program needs more HBM than a device has."""


def compile_for_tpu(lowered: Lowered) -> Compiled:
    """Compiles a program that was lowered for a `tpu_mesh`.

    Raises an `HbmError` that says how much memory it needs, and how much there is.
    """
    try:
        return lowered.compile()
    except JaxRuntimeError as error:
        if found := _OUT_OF_HBM.search(str(error)):
            need, there_is = (number for number in found.groups() if number)
            raise HbmError(f"It needs {need} of HBM a device, which has {there_is}.") from None
        raise
