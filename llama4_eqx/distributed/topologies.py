"""Slices of TPUs and nodes of GPUs to compile for, on a machine that has none."""

import math
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

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
# Of each GPU: its name, bytes of memory, and bytes a second.
GPUS = {
    "h100": ("NVIDIA H100 80GB HBM3", 84_942_979_072, 3_352_320_000_000),
    "h200": ("NVIDIA H200", 150_109_880_320, 4_800_000_000_000),
}
# What XLA wants to know of a GPU that it compiles for: a `GpuTargetConfigProto`.
_TARGET = """
platform_name: "CUDA"
device_description_str: "{name}"
dnn_version_info {{ major: 9 minor: 10 }}
gpu_device_info {{
  name: "{name}"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  platform_version: "Compute Capability 9.0a"
  driver_version: "13.0.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
  device_memory_size: {memory}
  memory_bandwidth: {bandwidth}
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  core_count: 132
  fpus_per_core: 128
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  device_address_bits: 64
}}
"""


def topology_mesh(topology: str, axes: Mapping[str, int]) -> Mesh:
    """A mesh of a slice of TPUs such as `"v5e:4x4"`, `"v5p:4x4x4"` or `"v6e:8x8"`, or of GPUs such
    as `"h100:8"`, or `"h200:4x8"` for four nodes of eight. None of them needs to exist: programs
    can be compiled for it, but not run. `axes` are the mesh axes' sizes.

    Raises an `ImportError` without the compiler, and a `ValueError` for a topology that there
    isn't, or of another size.
    """
    is_gpu = topology.partition(":")[0] in GPUS
    devices = _gpus(topology) if is_gpu else _tpus(topology)
    shape = tuple(axes.values())
    if math.prod(shape) != len(devices):
        sizes = " × ".join(f"{name} {size}" for name, size in axes.items())
        raise ValueError(f"{topology} has {len(devices)} devices, and {sizes} are another number.")
    placed = np.array(devices).reshape(shape)
    if not is_gpu:
        # Neighbours along a mesh axis are neighbours in the slice, where that can be.
        with suppress(AssertionError, NotImplementedError, ValueError):
            placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(placed, tuple(axes), axis_types=(AxisType.Auto,) * len(shape))


def _tpus(topology: str) -> list[Any]:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if find_spec("libtpu") is None:
        raise ImportError(
            "Compiling for TPUs needs libtpu, for Linux on x86: pip install 'llama4_eqx[tpu-plan]'."
        )
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except (JaxRuntimeError, ValueError, NotImplementedError) as error:
        said = str(error).splitlines()[0]
        raise ValueError(
            f'"{topology}" is neither a slice of TPUs such as "v5p:4x4x4" nor GPUs such as '
            f'"h100:8": {said}'
        ) from None


def _gpus(topology: str) -> list[Any]:
    kind, _, size = topology.partition(":")
    found = re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)", size)
    if not found:
        raise ValueError(f'GPUs are written as "{kind}:8" or "{kind}:4x8", not as "{topology}".')
    if not any(find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        raise ImportError(
            "Compiling for GPUs needs JAX's plugin for CUDA: pip install 'llama4_eqx[gpu-plan]'."
        )
    name, memory, bandwidth = GPUS[kind]
    return topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        topology=f"1x{found[1] or 1}x{found[2]}",
        target_config=_TARGET.format(name=name, memory=memory, bandwidth=bandwidth),
    ).devices


class HbmError(Exception):
    """A program needs more memory than a device has."""


def compile_for_topology(lowered: Lowered, mesh: Mesh) -> Compiled:
    """Compiles a program that was lowered for a `topology_mesh`.

    Raises an `HbmError` that says how much memory it needs, and how much there is.
    """
    try:
        if mesh.devices.flat[0].platform != "gpu":
            return lowered.compile()
        # Small products of one operand would be joined, which copies their weights in each step.
        program = lowered.compile(compiler_options={"xla_gpu_dot_merger_threshold_mb": "0"})
    except JaxRuntimeError as error:
        if found := _OUT_OF_HBM.search(str(error)):
            need, there_is = (number for number in found.groups() if number)
            raise HbmError(f"It needs {need} of HBM a device, which has {there_is}.") from None
        raise
    kind = mesh.devices.flat[0].device_kind
    there_is = next(memory for name, memory, _ in GPUS.values() if name == kind)
    *_, need = memory_needed(program)
    if need > there_is:
        raise HbmError(
            f"It needs {need / 2**30:.2f}G of HBM a device, which has {there_is / 2**30:.2f}G."
        )
    return program


def memory_needed(program: Compiled) -> tuple[int, int, int]:
    """Bytes that a program takes on each device: its arguments, its temporaries, and all together,
    with those results that don't take an argument's place."""
    memory = program.memory_analysis()
    if memory is None:
        raise ValueError("This compiler doesn't say how much memory a program takes.")
    arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return arguments, temporary, arguments + temporary + results
