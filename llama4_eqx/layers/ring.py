"""Ring attention (https://arxiv.org/abs/2310.01889): keys and values travel round the devices that
share a row, so that none holds those of the whole row, which `MeshAxes.all_gather` would take."""

from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from llama4_eqx.layers.blockwise import (
    BLOCK,
    KeyGradients,
    backward,
    forward,
    from_blocks,
    into_blocks,
)
from llama4_eqx.layers.collectives import AxisNames, match_vma
from llama4_eqx.layers.dense_attention import LOWEST, Scoring
from llama4_eqx.layers.mask import TokenPositions
from llama4_eqx.layers.remat import save_residual

T = TypeVar("T")


def ring_attention(
    q: Float[Array, "batch heads seq head_dim"],
    k: Float[Array, "batch kv_heads seq head_dim"],
    v: Float[Array, "batch kv_heads seq head_dim"],
    queries: TokenPositions,
    keys: TokenPositions,
    *,
    axis_names: AxisNames,
    chunk_size: int | None,
    scale: float,
    dropout_rate: float = 0.0,
    key: PRNGKeyArray | None = None,
    blocks: tuple[int, int] = (BLOCK, BLOCK),
) -> Float[Array, "batch heads seq head_dim"]:
    """`attention` inside `jax.shard_map`, where rows are sharded along mesh axes `axis_names`.

    Each device attends to the keys that it holds by `blockwise_attention`, while it sends them on;
    the results are merged by their logsumexp. `key` must differ between the devices. Has no
    forward-mode derivative.
    """
    scoring = Scoring(chunk_size, scale, dropout_rate)
    operands = match_vma(*into_blocks(q, k, v, queries, keys, blocks))
    return from_blocks(_ring(axis_names, scoring, *operands, key), q)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(
    axis_names: AxisNames,
    scoring: Scoring,
    q: Float[Array, "q_blocks batch kv_heads q_block head_dim"],
    k: Float[Array, "kv_blocks batch kv_heads kv_block head_dim"],
    v: Float[Array, "kv_blocks batch kv_heads kv_block head_dim"],
    queries: TokenPositions,
    keys: TokenPositions,
    key: PRNGKeyArray | None,
) -> Float[Array, "q_blocks batch kv_heads q_block head_dim"]:
    return _forward(axis_names, scoring, q, k, v, queries, keys, key)[0]


def _forward(axis_names, scoring, q, k, v, queries, keys, key):
    def visit(state, step):
        out, logsumexp, held = state
        k, v, keys = held
        more, more_logsumexp = forward(scoring, q, k, v, queries, keys, _at_step(key, step))
        total = jnp.logaddexp(logsumexp, more_logsumexp)
        shrink, share = jnp.exp(logsumexp - total), jnp.exp(more_logsumexp - total)
        out = out * shrink[..., None] + more * share[..., None]
        return (out, total, _send(held, axis_names)), None

    zeros = jnp.zeros_like(q, jnp.float32)
    start = zeros, zeros[..., 0] + LOWEST, (k, v, keys)
    (out, logsumexp, _), _ = lax.scan(visit, start, jnp.arange(lax.axis_size(axis_names)))
    out, logsumexp = save_residual((out.astype(q.dtype), logsumexp))
    return out, (scoring, q, k, v, queries, keys, key, out, logsumexp)


def _backward(axis_names, residuals, d_out):
    scoring, q, k, v, queries, keys, key, out, logsumexp = residuals

    def visit(state, step):
        d_q, held, d_kv = state
        k, v, keys = held
        given = scoring, q, k, v, queries, keys, _at_step(key, step), out, logsumexp, d_out
        more, d_kv = backward(*given, d_kv)
        return (d_q + more, *_send((held, d_kv), axis_names)), None

    # After as many steps as there are devices, each one's gradients are back with it.
    start = jnp.zeros_like(q, jnp.float32), (k, v, keys), KeyGradients.zeros(k)
    (d_q, _, d_kv), _ = lax.scan(visit, start, jnp.arange(lax.axis_size(axis_names)))
    return None, d_q.astype(q.dtype), *d_kv.like(k, v), None, None, None


_ring.defvjp(_forward, _backward)


def _send(tree: T, axis_names: AxisNames) -> T:
    """To the next device; the last one's go to the first."""
    size = lax.axis_size(axis_names)
    to_next = [(i, (i + 1) % size) for i in range(size)]
    return jax.tree.map(lambda x: lax.ppermute(x, axis_names, to_next), tree)


def _at_step(key: PRNGKeyArray | None, step: Array) -> PRNGKeyArray | None:
    return None if key is None else jax.random.fold_in(key, step)
