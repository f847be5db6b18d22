"""The attention core: one function of positions and segments for training, prefill and decode.

Whether a query attends to a key is decided by `mask.attention_mask` alone. The blockwise form is an
online softmax that never holds all scores at once (FlashAttention, https://arxiv.org/abs/2205.14135)
and skips the blocks of keys that no query of a block attends to; the dense form computes the same
in one product. Both are for any device; `cudnn` and `splash` have kernels for GPUs and TPUs.
"""

from collections.abc import Callable
from functools import partial
from typing import get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from llama4_eqx.layers.backends import AttentionBackend, check_backend
from llama4_eqx.layers.collectives import AxisNames, match_vma, psum_over
from llama4_eqx.layers.cudnn import cudnn_attention, fits_cudnn
from llama4_eqx.layers.dropout import dropout
from llama4_eqx.layers.mask import TokenPositions, attention_mask
from llama4_eqx.layers.platforms import by_platform, may_run_on
from llama4_eqx.layers.remat import save_residual
from llama4_eqx.layers.splash import fits_splash, splash_attention

# The fastest on CPUs, for causal and for chunk-local layers: larger blocks fall out of the cache
# and straddle chunks, smaller ones make poor matrix products.
BLOCK = 256
# On GPUs few large products win: twice as fast on an H100.
LARGE_BLOCK = 1024

# Below every score but finite: subtracted from a score of -inf it gives no NaN.
LOWEST = float(jnp.finfo(jnp.float32).min)


def attention(
    q: Float[Array, "batch heads q_seq head_dim"],
    k: Float[Array, "batch kv_heads kv_seq head_dim"],
    v: Float[Array, "batch kv_heads kv_seq head_dim"],
    queries: TokenPositions,
    keys: TokenPositions,
    *,
    chunk_size: int | None,
    scale: float,
    dropout_rate: float = 0.0,
    axis_names: AxisNames = (),
    key: PRNGKeyArray | None = None,
    own_keys: bool = False,
    backend: AttentionBackend | None = None,
) -> Float[Array, "batch heads q_seq head_dim"]:
    """Softmax attention of each query over the keys in its mask; zeros where that is empty.

    Equal runs of query heads share a key head (grouped-query attention). Scores and softmax are
    in float32. Dropout of attention probabilities needs a `key`. Inside `jax.shard_map` the keys
    may be sharded along mesh axes `axis_names`, which needs the dense form. `own_keys` says that
    queries and keys are those of the same tokens.

    `backend` None chooses by the shapes and by the platform that the program is lowered for: dense
    for small problems; cuDNN on GPUs, if this machine has one, for unpadded 16-bit rows without
    dropout; splash on TPUs, if this machine or the mesh has them, for own keys without dropout;
    else blockwise, with larger blocks on such GPUs.
    """
    check_backend(backend, get_args(AttentionBackend), "attention")
    settings = {"chunk_size": chunk_size, "scale": scale}
    dropped = {"dropout_rate": dropout_rate, "key": key}
    small = q.shape[2] == 1 or q.shape[2] * k.shape[2] <= BLOCK**2
    if axis_names or backend == "dense" or (backend is None and small):
        return dense_attention(q, k, v, queries, keys, axis_names=axis_names, **settings, **dropped)
    q, k, v, queries, keys = match_vma(q, k, v, queries, keys)
    not_dropped = key is None or not dropout_rate
    unpadded = queries.contiguous and keys.contiguous and q.shape[2] == k.shape[2]
    for_cudnn = unpadded and not_dropped and fits_cudnn(q, k)
    for_splash = own_keys and not_dropped and fits_splash(q, k)

    def by_cudnn(q, k, v, queries, keys):
        return cudnn_attention(q, k, v, **settings)

    def by_splash(q, k, v, queries, keys):
        return splash_attention(q, k, v, queries, **settings)

    if backend == "cudnn":
        if not for_cudnn:
            raise ValueError(
                'backend="cudnn" takes 16-bit rows that are unpadded documents, without dropout, '
                "and a head_dim of at most 128 that is a multiple of 8: pass None."
            )
        return by_cudnn(q, k, v, queries, keys)
    if backend == "splash":
        if not for_splash:
            raise ValueError(
                'backend="splash" takes bfloat16 or float32 rows without a cache, without dropout, '
                "and a head_dim that is a multiple of 128: pass None."
            )
        return by_splash(q, k, v, queries, keys)
    blockwise = partial(blockwise_attention, **settings, **dropped)
    forms: dict[str, Callable[..., Array]] = {"default": blockwise}
    if backend is None and may_run_on("cuda"):
        large = partial(blockwise, blocks=(LARGE_BLOCK, LARGE_BLOCK))
        forms["cuda"] = by_cudnn if for_cudnn else large
    if backend is None and may_run_on("tpu") and for_splash:
        forms["tpu"] = by_splash
    # Only where there are such devices, since tracing two forms and their gradients takes its time.
    return by_platform(q, k, v, queries, keys, **forms)


def dense_attention(
    q: Float[Array, "batch heads q_seq head_dim"],
    k: Float[Array, "batch kv_heads kv_seq head_dim"],
    v: Float[Array, "batch kv_heads kv_seq head_dim"],
    queries: TokenPositions,
    keys: TokenPositions,
    *,
    chunk_size: int | None,
    scale: float,
    dropout_rate: float = 0.0,
    axis_names: AxisNames = (),
    key: PRNGKeyArray | None = None,
) -> Float[Array, "batch heads q_seq head_dim"]:
    """`attention` with all scores at once: faster for small problems, and the oracle of the
    blockwise form (whose dropout is the same if it has a single pair of blocks)."""
    settings = _Settings(chunk_size, scale, dropout_rate)
    rows, row_tokens = _fold(q, queries, k.shape[1])
    scores = _scores(settings, rows, k, row_tokens, keys)
    top = lax.stop_gradient(scores.max(-1, keepdims=True, initial=LOWEST))
    top = lax.pmax(top, axis_names) if axis_names else top
    weights = jnp.exp(scores - top)
    total = psum_over(weights.sum(-1, keepdims=True), axis_names)
    dropped = _drop(settings, weights, key, 0, 0).astype(v.dtype)
    out = psum_over(_product("bkrs,bksd->bkrd", dropped, v), axis_names)
    out /= jnp.where(total == 0, 1, total)
    return _unfold(out.astype(q.dtype), q.shape[1])


def blockwise_attention(
    q: Float[Array, "batch heads q_seq head_dim"],
    k: Float[Array, "batch kv_heads kv_seq head_dim"],
    v: Float[Array, "batch kv_heads kv_seq head_dim"],
    queries: TokenPositions,
    keys: TokenPositions,
    *,
    chunk_size: int | None,
    scale: float,
    dropout_rate: float = 0.0,
    key: PRNGKeyArray | None = None,
    blocks: tuple[int, int] = (BLOCK, BLOCK),
) -> Float[Array, "batch heads q_seq head_dim"]:
    """`attention` by pairs of blocks, of at most `blocks` queries and keys: memory is linear in the
    lengths, and pairs that the mask leaves empty cost no time, forward or backward.

    Has no forward-mode derivative.
    """
    rows, row_tokens = _fold(q, queries, k.shape[1])
    row_block = _block(q.shape[2], blocks[0]) * (q.shape[1] // k.shape[1])
    kv_block = _block(k.shape[2], blocks[1])
    out = _blockwise(
        _Settings(chunk_size, scale, dropout_rate),
        _into_blocks(rows, row_block, axis=2),
        _into_blocks(k, kv_block, axis=2),
        _into_blocks(v, kv_block, axis=2),
        jax.tree.map(lambda x: _into_blocks(x, row_block, axis=1, fill=-1), row_tokens),
        jax.tree.map(lambda x: _into_blocks(x, kv_block, axis=1, fill=-1), keys),
        key,
    )
    out = jnp.moveaxis(out, 0, 2).reshape(*rows.shape[:2], -1, rows.shape[-1])
    return _unfold(out[:, :, : rows.shape[2]], q.shape[1])


class _Settings(eqx.Module):
    chunk_size: int | None = eqx.field(static=True)
    scale: float = eqx.field(static=True)
    dropout_rate: float = eqx.field(static=True)


def _fold(
    q: Float[Array, "batch heads q_seq head_dim"], queries: TokenPositions, kv_heads: int
) -> tuple[Array, TokenPositions]:
    """Folds the query heads that share a key head into the rows of one head."""
    batch, heads, q_seq, head_dim = q.shape
    if heads % kv_heads:
        raise ValueError(
            f"heads must be a multiple of kv_heads, got {heads} and {kv_heads}: "
            "give k and v a head for each equal group of query heads"
        )
    group = heads // kv_heads
    rows = q.reshape(batch, kv_heads, group, q_seq, head_dim).swapaxes(2, 3)
    rows = rows.reshape(batch, kv_heads, q_seq * group, head_dim)
    return rows, jax.tree.map(lambda x: jnp.repeat(x, group, axis=1), queries)


def _unfold(rows: Array, heads: int) -> Float[Array, "batch heads q_seq head_dim"]:
    batch, kv_heads, count, head_dim = rows.shape
    group = heads // kv_heads
    out = rows.reshape(batch, kv_heads, count // group, group, head_dim).swapaxes(2, 3)
    return out.reshape(batch, heads, count // group, head_dim)


def _block(length: int, limit: int) -> int:
    """The size of the fewest, most even blocks, rounded up to 16 so that their edges tend to be
    those of chunks."""
    even = -(-length // -(-length // limit))
    return min(-(-even // 16) * 16, limit, length)


def _into_blocks(x: Array, block: int, axis: int, fill: int = 0) -> Array:
    """Splits an axis into blocks, the last one padded; the blocks' axis comes first."""
    padding = [(0, -size % block if i == axis else 0) for i, size in enumerate(x.shape)]
    x = jnp.pad(x, padding, constant_values=fill)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :]), axis, 0)


def _at(tokens: TokenPositions, j: Int[Array, ""]) -> TokenPositions:
    return jax.tree.map(lambda x: x[j], tokens)


def _product(subscripts: str, x: Array, y: Array) -> Array:
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)


def _scores(
    settings: _Settings, q: Array, k: Array, queries: TokenPositions, keys: TokenPositions
) -> Array:
    mask = attention_mask(queries, keys, settings.chunk_size)[:, None]
    return jnp.where(mask, _product("bkrd,bksd->bkrs", q, k) * settings.scale, -jnp.inf)


def _drop(
    settings: _Settings, x: Array, key: PRNGKeyArray | None, i: int | Array, j: int | Array
) -> Array:
    """Dropout in a pair of blocks: the same entries each time that the pair is computed."""
    if key is not None:
        key = jax.random.fold_in(jax.random.fold_in(key, i), j)
    return dropout(x, settings.dropout_rate, key)


def _visits(
    queries: TokenPositions, keys: TokenPositions, chunk_size: int | None
) -> tuple[Int[Array, "q_blocks kv_blocks"], Int[Array, " q_blocks"]]:
    """For each block of queries, the blocks of keys, those to visit first, and how many these are.

    A block of keys is skipped if, in every row of the batch, it lies outside the ranges of
    positions and segments that the queries attend to. Blocks of keys may come in any order, since a
    cache is a ring.
    """

    def low(x: Array, of: TokenPositions) -> Array:
        return jnp.where(of.segments < 0, jnp.iinfo(x.dtype).max, x).min(-1)

    def high(x: Array, of: TokenPositions) -> Array:
        return jnp.where(of.segments < 0, jnp.iinfo(x.dtype).min, x).max(-1)

    visit = low(keys.positions, keys) <= high(queries.positions, queries)[:, None]
    visit &= low(keys.segments, keys) <= high(queries.segments, queries)[:, None]
    visit &= high(keys.segments, keys) >= low(queries.segments, queries)[:, None]
    if chunk_size is not None:
        chunk_starts = queries.positions - queries.positions % chunk_size
        visit &= high(keys.positions, keys) >= low(chunk_starts, queries)[:, None]
    visit = visit.any(-1)
    return jnp.argsort(~visit, axis=-1, stable=True), visit.sum(-1)


@jax.custom_vjp
def _blockwise(
    settings: _Settings,
    q: Float[Array, "q_blocks batch kv_heads q_block head_dim"],
    k: Float[Array, "kv_blocks batch kv_heads kv_block head_dim"],
    v: Float[Array, "kv_blocks batch kv_heads kv_block head_dim"],
    queries: TokenPositions,
    keys: TokenPositions,
    key: PRNGKeyArray | None,
) -> Float[Array, "q_blocks batch kv_heads q_block head_dim"]:
    return _forward(settings, q, k, v, queries, keys, key)[0]


def _forward(settings, q, k, v, queries, keys, key):
    def attend(block):
        i, q_i, queries_i, visits, count = block

        def visit(n, state):
            out, top, total = state
            j = visits[n]
            scores = _scores(settings, q_i, k[j], queries_i, _at(keys, j))
            new_top = jnp.maximum(top, scores.max(-1, keepdims=True))
            weights, shrink = jnp.exp(scores - new_top), jnp.exp(top - new_top)
            total = total * shrink + weights.sum(-1, keepdims=True)
            dropped = _drop(settings, weights, key, i, j).astype(v.dtype)
            out = out * shrink + _product("bkrs,bksd->bkrd", dropped, v[j])
            return out, new_top, total

        zeros = jnp.zeros_like(q_i[..., :1], jnp.float32)
        start = jnp.zeros_like(q_i, jnp.float32), zeros + LOWEST, zeros
        out, top, total = lax.fori_loop(0, count, visit, start)
        total = jnp.where(total == 0, 1, total)
        return (out / total).astype(q.dtype), top + jnp.log(total)

    visits = _visits(queries, keys, settings.chunk_size)
    out, logsumexp = lax.map(attend, (jnp.arange(q.shape[0]), q, queries, *visits))
    out, logsumexp = save_residual((out, logsumexp))
    return out, (settings, q, k, v, queries, keys, key, out, logsumexp)


def _backward(residuals, d_out):
    settings, q, k, v, queries, keys, key, out, logsumexp = residuals

    def attend(d_kv, block):
        i, q_i, queries_i, out_i, logsumexp_i, d_out_i, visits, count = block
        # What normalising to a sum of 1 subtracts from the derivative of each row.
        mean = (out_i.astype(jnp.float32) * d_out_i.astype(jnp.float32)).sum(-1, keepdims=True)

        def visit(n, state):
            d_q_i, d_k, d_v = state
            j = visits[n]
            scores = _scores(settings, q_i, k[j], queries_i, _at(keys, j))
            weights = jnp.exp(scores - logsumexp_i)
            dropped = _drop(settings, weights, key, i, j).astype(v.dtype)
            d_weights = _drop(settings, _product("bkrd,bksd->bkrs", d_out_i, v[j]), key, i, j)
            d_scores = (weights * (d_weights - mean) * settings.scale).astype(q.dtype)
            d_q_i += _product("bkrs,bksd->bkrd", d_scores, k[j])
            d_k = d_k.at[j].add(_product("bkrs,bkrd->bkds", d_scores, q_i))
            d_v = d_v.at[j].add(_product("bkrs,bkrd->bkds", dropped, d_out_i))
            return d_q_i, d_k, d_v

        start = jnp.zeros_like(q_i, jnp.float32), *d_kv
        d_q_i, *d_kv = lax.fori_loop(0, count, visit, start)
        return tuple(d_kv), d_q_i.astype(q.dtype)

    visits = _visits(queries, keys, settings.chunk_size)
    blocks = jnp.arange(q.shape[0]), q, queries, out, logsumexp, d_out, *visits
    # The derivatives of k and v are kept transposed: this is the faster product on CPUs.
    zeros = jnp.zeros_like(k.swapaxes(-1, -2), jnp.float32)
    (d_k, d_v), d_q = lax.scan(attend, (zeros, zeros), blocks)
    d_k, d_v = d_k.swapaxes(-1, -2).astype(k.dtype), d_v.swapaxes(-1, -2).astype(v.dtype)
    return None, d_q, d_k, d_v, None, None, None


_blockwise.defvjp(_forward, _backward)
