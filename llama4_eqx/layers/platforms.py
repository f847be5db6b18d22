"""Which platform a program is for."""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
from jax import lax


@cache
def local_devices(platform: str) -> tuple[Any, ...]:
    """This machine's devices of the platform: `"cpu"`, `"cuda"` or `"tpu"`."""
    try:
        return tuple(jax.devices(platform))
    except RuntimeError:  # there is none
        return ()


def may_run_on(platform: str) -> bool:
    """Whether it pays to trace a form for the platform: this machine has such a device, or the mesh
    that the program is for, perhaps to be compiled for ahead of time."""
    return bool(local_devices(platform)) or _mesh_platform() == platform


def by_platform(*operands: Any, **forms: Callable[..., Any]) -> Any:
    """`lax.platform_dependent`, but inside `jax.shard_map` on a mesh of TPUs or GPUs no form of
    another platform is traced."""
    if (platform := _mesh_platform()) in ("tpu", "cuda"):
        return forms.get(platform, forms["default"])(*operands)
    if len(forms) == 1:
        return forms["default"](*operands)
    return lax.platform_dependent(*operands, **forms)


def mesh_device() -> Any:
    """What the mesh's devices are, inside `jax.shard_map`, or None: a `device_kind` and more."""
    return jax.sharding.get_abstract_mesh().abstract_device


def _mesh_platform() -> str | None:
    device = mesh_device()
    return None if device is None else {"gpu": "cuda"}.get(device.platform, device.platform)
