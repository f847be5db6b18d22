"""What tests of programs compiled for TPUs and GPUs share."""

import math

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.stages import Compiled

import llama4_eqx as l4
from llama4_eqx.distributed import Rules, abstract_sharded, batch_sharding
from llama4_eqx.distributed.topologies import compile_for_topology
from llama4_eqx.training import init_train_state, make_train_step, next_token_loss


def size(tree) -> int:
    """Bytes of the tree on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def training_step(
    config: l4.TextConfig, mesh: Mesh, rules: Rules, rows: int, seq: int
) -> tuple[Compiled, l4.Llama4]:
    """A step of gradient descent, products in bfloat16, and the sharded model."""
    optimizer = optax.sgd(1e-3)

    def loss_function(model, tokens, key):
        loss = next_token_loss(model, tokens, remat="full", key=key).token
        return loss.total, loss.num_tokens, None

    def make():
        model = l4.Llama4(l4.Llama4Config(config), key=jax.random.key(0))
        return init_train_state(model, optimizer, key=jax.random.key(1))

    state = abstract_sharded(make, mesh, rules)
    step = make_train_step(optimizer, loss_function, compute_dtype=jnp.bfloat16)
    tokens = jax.ShapeDtypeStruct((rows, seq), jnp.int32, sharding=batch_sharding(mesh, rules))
    return compile_for_topology(step.lower(state, tokens), mesh), state.model
