"""What several processes of one program have to tell each other on the host."""

import errno
import json
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def connect(*, heartbeat: int = 20) -> None:
    """Joins the other processes of this program, if `JAX_COORDINATOR_ADDRESS` tells of any.

    `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` say how many there are, and which of them this is; they
    may be missing where JAX knows the scheduler (Slurm, Open MPI, Kubernetes, Cloud TPUs). To be
    called before anything of JAX is used.

    Of a process that dies the others learn at once or when nothing was heard of it for `heartbeat`
    seconds. Whatever they do then, JAX ends them with a message that says so. Start all again to go
    on from the last checkpoint.
    """
    if "JAX_COORDINATOR_ADDRESS" not in os.environ:
        return
    count, number = os.environ.get("JAX_NUM_PROCESSES"), os.environ.get("JAX_PROCESS_ID")
    jax.distributed.initialize(
        num_processes=None if count is None else int(count),
        process_id=None if number is None else int(number),
        heartbeat_timeout_seconds=heartbeat,
    )


def gathered(value: Any) -> list[Any]:
    """What each process has to tell (anything that JSON can hold), on all of them."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = np.max(multihost_utils.process_allgather(np.int32(len(text))))
    padded = np.pad(text, (0, size - len(text)), constant_values=ord(" "))
    return [json.loads(bytes(row)) for row in multihost_utils.process_allgather(padded)]


def together(action: Callable[[], Any]) -> None:
    """Does it on every process, and waits until all have done it.

    Where it fails on one, all raise: that one its own error, and the others an `OSError` that tells
    of it.
    """
    failure = None
    try:
        action()
    except Exception as error:  # which mustn't keep the others waiting
        failure = error
    told = None
    if failure is not None:
        number = getattr(failure, "errno", None) or errno.EIO
        told = number, getattr(failure, "strerror", None) or str(failure)
    failures = gathered(told)
    if failure is not None:
        raise failure
    for process, theirs in enumerate(failures):
        if theirs is not None:
            raise OSError(theirs[0], f"{theirs[1]} (on process {process})")
