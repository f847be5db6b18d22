"""Saves that `test_saving.py` kills: `killed_save.py FOLDER`.

Each line of its input is the number of a system call and the way to save. A forked process saves a
model to the folder and kills itself just before that call; how it ended is printed. -9 is a kill.
"""

import errno
import os
import signal
import sys

import equinox as eqx
import jax
import numpy as np

import llama4_eqx as l4
from llama4_eqx.checkpoints import folder_replacement

# What Python reports before calls that open files or change folders.
CALLS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.chmod"} | {
    "ctypes.dlsym"  # before renameat2
}
CONFIG = l4.Llama4Config(
    l4.TextConfig(
        **vars(l4.Llama4Config.tiny().text_config)
        | {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "vocab_size": 16}
    )
)


def tiny_model(value: float) -> l4.Llama4:
    """All weights have this value."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = eqx.filter_eval_shape(l4.Llama4, CONFIG, key=key)
    return jax.tree.map(lambda leaf: np.full(leaf.shape, value, leaf.dtype), shapes)


def kill_before_call(number: int) -> None:
    seen = 0

    def count(event: str, _: object) -> None:
        nonlocal seen
        if event in CALLS:
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def no_exchange(*_: object) -> None:
    raise OSError(errno.EINVAL, "the file system has no exchange")


if __name__ == "__main__":
    model, folder = tiny_model(2.0), sys.argv[1]
    for line in sys.stdin:
        number, way = line.split()
        pid = os.fork()
        if pid == 0:
            if way == "inside":
                os.chdir(folder)
            if way == "no-exchange":
                folder_replacement._exchange = no_exchange
            jax.process_index()  # starts JAX
            kill_before_call(int(number))
            try:
                l4.save_checkpoint(model, folder, max_shard_bytes=1000, overwrite=True)
            finally:
                os._exit(0 if sys.exc_info()[0] is None else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
