"""JAX's own grouped matrix products for Hopper GPUs, H100 and H200."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float, Int

from llama4_eqx.layers.collectives import pvary, varying_axes
from llama4_eqx.layers.platforms import local_devices, mesh_device

# Tiles of the kernels: the fastest of four tried on an H100, at 8,192 rows of Scout's sizes.
BLOCK = 128
_TILES: dict[str, Any] = {
    "block_m": BLOCK,
    "block_n": BLOCK,
    "block_k": 64,
    "max_concurrent_steps": 4,
}

_HOPPER = re.compile(r"NVIDIA G?H\d+\b")


def may_run_on_hopper() -> bool:
    """Whether the mesh that the program is for has GPUs that the kernels run on, or this machine if
    there is no mesh."""
    if (device := mesh_device()) is not None:
        return bool(_HOPPER.search(device.device_kind))
    return any(gpu.compute_capability == "9.0" for gpu in local_devices("cuda"))


def fits_hopper(rows: Array, gate: Array) -> bool:
    """Whether the kernels take these sizes and dtypes."""
    hidden, ff = gate.shape[1:]
    return (
        rows.dtype == gate.dtype
        and rows.dtype in (jnp.bfloat16, jnp.float16)
        and hidden % BLOCK == 0
        and ff % BLOCK == 0
    )


def grouped_product(
    x: Float[Array, "tokens rows"],
    weight: Float[Array, "experts rows columns"] | Float[Array, "experts columns rows"],
    sizes: Int[Array, "experts"],
    *,
    transposed: bool = False,
) -> Float[Array, "tokens columns"]:
    """`x · weight[expert]` for each expert's rows, or `x · weight[expert]ᵀ`; anything elsewhere."""
    product = sequential_vmap(partial(_grouped_product, transposed))
    # The kernels lose on which mesh axes their operands vary.
    return pvary(product(x, weight, sizes), tuple(varying_axes(x) | varying_axes(weight)))


def outer_product(
    left: Float[Array, "tokens rows"],
    right: Float[Array, "tokens columns"],
    sizes: Int[Array, "experts"],
) -> Float[Array, "experts rows columns"]:
    """`leftᵀ · right` over each expert's rows."""
    product = sequential_vmap(_outer_product)
    return pvary(product(left, right, sizes), tuple(varying_axes(left) | varying_axes(right)))


# Under `jit`, so that a kernel is made once for all layers of the same sizes, which takes a second.
@partial(jax.jit, static_argnums=0)
def _grouped_product(transposed: bool, x: Array, weight: Array, sizes: Array) -> Array:
    # Here, since the module is slow to import and of no use without such a GPU.
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu

    return ragged_dot_mgpu.ragged_dot(
        x, weight, group_sizes=sizes, grid_block_n=8, transpose_rhs=transposed, **_TILES
    )


@jax.jit
def _outer_product(left: Array, right: Array, sizes: Array) -> Array:
    from jax.experimental.pallas.ops.gpu import transposed_ragged_dot_mgpu

    with _devices_of_mesh():
        return transposed_ragged_dot_mgpu.transposed_ragged_dot(
            left, right, group_sizes=sizes, grid_block_n=4, **_TILES
        )


@contextmanager
def _devices_of_mesh() -> Iterator[None]:
    """Where a program is compiled for GPUs that this machine lacks, `jax.devices()` gives those of
    the mesh: the kernel asks it for the number of cores."""
    mesh = mesh_device()
    if mesh is None or local_devices("cuda"):
        yield
        return
    devices = [SimpleNamespace(core_count=mesh.num_cores)]
    with mock.patch.object(jax, "devices", return_value=devices):
        yield
