"""Splash attention of new tokens to a cache and to themselves."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama4_eqx.layers.blockwise import blockwise_attention
from llama4_eqx.layers.cache import KeysValues
from llama4_eqx.layers.collectives import call_kernel, match_vma
from llama4_eqx.layers.mask import TokenPositions
from llama4_eqx.layers.splash import LANES, LARGEST_BLOCK, splash_kernel


def splash_after_cache(
    q: Float[Array, "batch heads seq head_dim"],
    new: KeysValues,
    past: KeysValues,
    queries: TokenPositions,
    *,
    chunk_size: int | None,
    scale: float,
    interpret: bool = False,
) -> Float[Array, "batch heads seq head_dim"]:
    """`attention` of the `new` tokens of rows to themselves and to the `past` ones of a cache, each
    by the kernel, merged by the logsumexp of their scores.

    The gradient is that of the blockwise form.
    """
    settings = _Settings(chunk_size, scale, interpret)
    operands = match_vma(q, new.k, new.v, past.k, past.v, queries, past.tokens)
    return _after_cache(settings, *operands)


class _Settings(NamedTuple):
    chunk_size: int | None
    scale: float
    interpret: bool


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _after_cache(
    settings: _Settings,
    q: Float[Array, "batch heads seq head_dim"],
    k: Float[Array, "batch kv_heads seq head_dim"],
    v: Float[Array, "batch kv_heads seq head_dim"],
    past_k: Float[Array, "batch kv_heads slots head_dim"],
    past_v: Float[Array, "batch kv_heads slots head_dim"],
    queries: TokenPositions,
    past: TokenPositions,
) -> Float[Array, "batch heads seq head_dim"]:
    ids, past_ids = (_chunk_numbers(tokens, settings.chunk_size) for tokens in (queries, past))
    attend = partial(_with_logsumexp, interpret=settings.interpret)
    scaled = (q.astype(jnp.float32) * settings.scale).astype(q.dtype)
    own, own_logsumexp = attend(scaled, k, v, ids, ids, causal=True)
    old, old_logsumexp = attend(scaled, past_k, past_v, ids, past_ids, causal=False)
    total = jnp.logaddexp(own_logsumexp, old_logsumexp)
    own_share, old_share = jnp.exp(own_logsumexp - total), jnp.exp(old_logsumexp - total)
    out = own * own_share[..., None] + old * old_share[..., None]
    return jnp.where((queries.segments >= 0)[:, None, :, None], out, 0).astype(q.dtype)


def _forward(settings, *operands):
    return _after_cache(settings, *operands), operands


def _backward(settings, operands, d_out):
    *arrays, queries, past = operands

    def blockwise(q, k, v, past_k, past_v):
        keys = KeysValues(past_k, past_v, past).concatenate(KeysValues(k, v, queries))
        options = {"chunk_size": settings.chunk_size, "scale": settings.scale}
        return blockwise_attention(q, keys.k, keys.v, queries, keys.tokens, **options)

    return *jax.vjp(blockwise, *arrays)[1](d_out), None, None


_after_cache.defvjp(_forward, _backward)


def _chunk_numbers(tokens: TokenPositions, chunk_size: int | None) -> Int[Array, "batch seq"]:
    """Of tokens of one document; -1 for padding and empty slots."""
    chunk = tokens.positions // chunk_size if chunk_size else jnp.zeros_like(tokens.positions)
    return jnp.where(tokens.segments < 0, -1, chunk)


def _with_logsumexp(
    q: Float[Array, "batch heads q_seq head_dim"],
    k: Float[Array, "batch kv_heads kv_seq head_dim"],
    v: Float[Array, "batch kv_heads kv_seq head_dim"],
    q_ids: Int[Array, "batch q_seq"],
    kv_ids: Int[Array, "batch kv_seq"],
    *,
    causal: bool,
    interpret: bool,
) -> tuple[Float[Array, "batch heads q_seq head_dim"], Float[Array, "batch heads q_seq"]]:
    """The kernel's result in float32, and the logsumexp of scores, of any number of tokens."""
    q_seq, kv_seq = q.shape[2], k.shape[2]
    blocks = block, kv_block = _block(q_seq), _block(kv_seq)
    q, k, v = _padded(q, 2, block), _padded(k, 2, kv_block), _padded(v, 2, kv_block)
    ids = _padded(q_ids, 1, block, fill=-1), _padded(kv_ids, 1, kv_block, fill=-1)
    settings = {"blocks": blocks, "interpret": interpret}
    run = splash_kernel(q, k, causal=causal, with_logsumexp=True, **settings)
    out, (logsumexp,) = call_kernel(run, q, k, v, *ids)
    return out[:, :, :q_seq].astype(jnp.float32), logsumexp[:, :, :q_seq]


def _block(seq: int) -> int:
    return min(-(-seq // LANES) * LANES, LARGEST_BLOCK)


def _padded(x: Array, axis: int, block: int, fill: int = 0) -> Array:
    widths = [(0, -size % block if i == axis else 0) for i, size in enumerate(x.shape)]
    return jnp.pad(x, widths, constant_values=fill)
