"""A small training run that `test_resume.py` kills: `killed_run.py FOLDER LOG`.

Each line of its input, a number of steps, starts the run in a fresh process up to that step. Its id
is printed, and how it ended. It saves every second step and logs each step's loss, to the last bit.
"""

import os
import sys
import traceback
from dataclasses import replace

import equinox as eqx
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint

import llama4_eqx as l4
from llama4_eqx.checkpoints import TrainCheckpointer

CONFIG = l4.Llama4Config(replace(l4.Llama4Config.tiny().text_config, num_hidden_layers=2))
OPTIMIZER = optax.adamw(3e-3)


@eqx.filter_jit
def start():
    model = l4.Llama4(CONFIG, key=jax.random.key(0))
    return model, OPTIMIZER.init(eqx.filter(model, eqx.is_array)), jax.random.key(1)


@eqx.filter_jit(donate="all-except-first")
def train_step(tokens, state):
    model, opt_state, key = state
    key, noise_key = jax.random.split(key)
    noise = jax.random.bernoulli(noise_key, 0.1, tokens.shape)
    inputs = jnp.where(noise, 0, tokens)[:, :-1]

    def loss_function(model):
        logits = model(inputs).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    loss, gradients = eqx.filter_value_and_grad(loss_function)(model)
    updates, opt_state = OPTIMIZER.update(gradients, opt_state, eqx.filter(model, eqx.is_array))
    return (eqx.apply_updates(model, updates), opt_state, key), loss


def run(folder: str, log: str, steps: int) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (50, 17), np.int32)
    data = iter(grain.MapDataset.source(rows).shuffle(seed=1).repeat().batch(2).to_iter_dataset())
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def tell(*words: object) -> None:
        os.write(file, (" ".join(map(str, words)) + "\n").encode())
        os.fsync(file)

    with TrainCheckpointer(folder, max_to_keep=2) as checkpoints:
        resumed = checkpoints.restore(eqx.filter_eval_shape(start), data)
        step, state = resumed or (0, start())
        tell("from", step)
        while step < steps:
            state, loss = train_step(jnp.asarray(next(data)), state)
            step += 1
            tell(step, float(loss).hex())
            if step % 2 == 0:
                checkpoints.save(step, state, data)


if __name__ == "__main__":
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    assert orbax.checkpoint  # imported here, so that each run needn't
    for line in sys.stdin:
        # A fork of a process that has imported everything, but not used it, starts in no time.
        pid = os.fork()
        if pid == 0:
            try:
                run(sys.argv[1], sys.argv[2], int(line))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
