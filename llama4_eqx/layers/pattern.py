"""Attention with its pattern in the open, for a probe that reads or edits it."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from llama4_eqx.layers.cache import CacheSpan
from llama4_eqx.layers.collectives import match_vma
from llama4_eqx.layers.dropout import dropout
from llama4_eqx.layers.mask import TokenPositions, attention_mask


def attention_by_pattern(
    q: Float[Array, "*batch heads q_seq head_dim"],
    k: Float[Array, "*batch kv_heads kv_seq head_dim"],
    v: Float[Array, "*batch kv_heads kv_seq head_dim"],
    queries: TokenPositions,
    keys: TokenPositions,
    *,
    chunk_size: int | None,
    scale: float,
    span: CacheSpan | None,
    visit: Callable[
        [Float[Array, "*batch heads q_seq kv_seq"]], Float[Array, "*batch heads q_seq kv_seq"]
    ],
    dropout_rate: float = 0.0,
    key: PRNGKeyArray | None = None,
) -> Float[Array, "*batch heads q_seq head_dim"]:
    """What `blockwise.attention` computes, with all float32 probabilities passed through `visit`.

    There, keys are in the order of the row: with a cache, which is a ring, key `i` is the row's
    token `i` since `span.start`, of `span.capacity`.
    """
    group = q.shape[-3] // k.shape[-3]
    k, v = jnp.repeat(k, group, axis=-3), jnp.repeat(v, group, axis=-3)
    scores = jnp.einsum("...qd,...kd->...qk", q, k, preferred_element_type=jnp.float32)
    mask = attention_mask(queries, keys, chunk_size)[..., None, :, :]
    pattern = softmax_where(scores * scale, mask)
    if span is None:
        pattern = visit(pattern)
    else:
        index = jnp.where(keys.segments < 0, span.capacity, keys.positions - span.start[..., None])
        pattern = _in_key_order(visit(_in_row_order(pattern, index, span.capacity)), index)
    dropped = dropout(pattern, dropout_rate, key).astype(v.dtype)
    out = jnp.einsum("...qk,...kd->...qd", dropped, v, preferred_element_type=jnp.float32)
    return out.astype(q.dtype)


def softmax_where(
    scores: Float[Array, "*batch q_seq kv_seq"], mask: Array
) -> Float[Array, "*batch q_seq kv_seq"]:
    """Softmax over the keys in the mask; zeros where that is empty."""
    scores = jnp.where(mask, scores, -jnp.inf)
    lowest = float(jnp.finfo(jnp.float32).min)
    top = lax.stop_gradient(scores.max(-1, keepdims=True, initial=lowest))
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    return weights / jnp.where(total == 0, 1, total)


def _in_row_order(
    pattern: Float[Array, "*batch heads q_seq kv_seq"],
    index: Int[Array, "*batch kv_seq"],
    size: int,
) -> Float[Array, "*batch heads q_seq size"]:
    index = jnp.broadcast_to(index[..., None, None, :], pattern.shape)
    zeros = jnp.zeros((*pattern.shape[:-1], size), pattern.dtype)
    zeros, index, pattern = match_vma(zeros, index, pattern)
    return jnp.put_along_axis(zeros, index, pattern, axis=-1, inplace=False, mode="drop")


def _in_key_order(
    pattern: Float[Array, "*batch heads q_seq size"], index: Int[Array, "*batch kv_seq"]
) -> Float[Array, "*batch heads q_seq kv_seq"]:
    index = index[..., None, None, :]
    return jnp.take_along_axis(pattern, index, axis=-1, mode="fill", fill_value=0)
