"""Coordinating the processes of one program, on the host."""

import errno
import json
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def connect(*, heartbeat: int = 20) -> None:
    """Initialises `jax.distributed` if `JAX_COORDINATOR_ADDRESS` is set.

    `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` are the number of processes and this one's index; they
    may be missing where JAX detects the scheduler (Slurm, Open MPI, Kubernetes, Cloud TPUs). Call
    it before anything else of JAX.

    When a process dies, the others notice at once, or after `heartbeat` seconds without a sign of
    life; JAX then ends them with a message. Start all of them again to resume from the last
    checkpoint.
    """
    if "JAX_COORDINATOR_ADDRESS" not in os.environ:
        return
    count, number = os.environ.get("JAX_NUM_PROCESSES"), os.environ.get("JAX_PROCESS_ID")
    jax.distributed.initialize(
        num_processes=None if count is None else int(count),
        process_id=None if number is None else int(number),
        heartbeat_timeout_seconds=heartbeat,
    )


def allgather_json(value: Any) -> list[Any]:
    """The values of all processes, on all of them; a value is anything that JSON can hold."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = np.max(multihost_utils.process_allgather(np.int32(len(text))))
    padded = np.pad(text, (0, size - len(text)), constant_values=ord(" "))
    return [json.loads(bytes(row)) for row in multihost_utils.process_allgather(padded)]


def run_on_all_processes(action: Callable[[], Any]) -> None:
    """Runs `action`, which every process must do, and waits for all of them.

    If it fails on one process, all raise: that one its own error, the others an `OSError` that
    names the error and the process.
    """
    failure = None
    try:
        action()
    except Exception as error:  # raised below, so that the others aren't left waiting
        failure = error
    described = None
    if failure is not None:
        number = getattr(failure, "errno", None) or errno.EIO
        described = number, getattr(failure, "strerror", None) or str(failure)
    failures = allgather_json(described)
    if failure is not None:
        raise failure
    for process, other in enumerate(failures):
        if other is not None:
            raise OSError(other[0], f"{other[1]} (on process {process})")
