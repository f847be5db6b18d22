"""The attention core: one function of positions and segments for training, prefill and decode.

Whether a query sees a key is decided by `mask.visible` alone. The blockwise form never holds all
scores at once (an online softmax, as in FlashAttention, https://arxiv.org/abs/2205.14135) and
leaves out the blocks of keys that no query of a block can see, wherever these lie; the dense form
is the same in one piece.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from llama4_eqx.layers.across import Axes, alike, leave
from llama4_eqx.layers.mask import Places, visible
from llama4_eqx.layers.remat import kept

# The fastest on CPUs, for causal and chunk-local layers alike: larger blocks fall out of the cache
# and straddle chunks, smaller ones make poor matrix products.
BLOCK = 256

# Below every score but finite: subtracted from a score of -inf it gives no NaN.
LOWEST = float(jnp.finfo(jnp.float32).min)


def attention(
    q: Float[Array, "batch heads q_seq head_dim"],
    k: Float[Array, "batch kv_heads kv_seq head_dim"],
    v: Float[Array, "batch kv_heads kv_seq head_dim"],
    queries: Places,
    keys: Places,
    *,
    chunk_size: int | None,
    scale: float,
    dropout: float = 0.0,
    split: Axes = (),
    key: PRNGKeyArray | None = None,
) -> Float[Array, "batch heads q_seq head_dim"]:
    """Softmax attention of each query over the keys that it sees; zeros where it sees none.

    Equal runs of query heads share a key head (grouped-query attention). Scores and softmax are
    in float32. `dropout` drops single probabilities, and only if there is a `key`. Inside
    `jax.shard_map`, the devices along mesh axes `split` may each have a part of the keys.
    """
    settings = {"chunk_size": chunk_size, "scale": scale, "dropout": dropout, "key": key}
    if split or q.shape[2] == 1 or q.shape[2] * k.shape[2] <= BLOCK**2:
        return dense_attention(q, k, v, queries, keys, split=split, **settings)
    return blockwise_attention(*alike(q, k, v, queries, keys), **settings)


def dense_attention(
    q: Float[Array, "batch heads q_seq head_dim"],
    k: Float[Array, "batch kv_heads kv_seq head_dim"],
    v: Float[Array, "batch kv_heads kv_seq head_dim"],
    queries: Places,
    keys: Places,
    *,
    chunk_size: int | None,
    scale: float,
    dropout: float = 0.0,
    split: Axes = (),
    key: PRNGKeyArray | None = None,
) -> Float[Array, "batch heads q_seq head_dim"]:
    """`attention` in one piece: the faster form of small problems, and the oracle of the other
    one (which drops the same probabilities if it has a single pair of blocks)."""
    settings = _Settings(chunk_size, scale, dropout)
    rows, row_places = _fold(q, queries, k.shape[1])
    scores = _scores(settings, rows, k, row_places, keys)
    top = lax.stop_gradient(scores.max(-1, keepdims=True, initial=LOWEST))
    top = lax.pmax(top, split) if split else top
    weights = jnp.exp(scores - top)
    total = leave(weights.sum(-1, keepdims=True), split)
    kept = _drop(settings, weights, key, 0, 0).astype(v.dtype)
    out = leave(_product("bkrs,bksd->bkrd", kept, v), split) / jnp.where(total == 0, 1, total)
    return _unfold(out.astype(q.dtype), q.shape[1])


def blockwise_attention(
    q: Float[Array, "batch heads q_seq head_dim"],
    k: Float[Array, "batch kv_heads kv_seq head_dim"],
    v: Float[Array, "batch kv_heads kv_seq head_dim"],
    queries: Places,
    keys: Places,
    *,
    chunk_size: int | None,
    scale: float,
    dropout: float = 0.0,
    key: PRNGKeyArray | None = None,
    blocks: tuple[int, int] = (BLOCK, BLOCK),
) -> Float[Array, "batch heads q_seq head_dim"]:
    """`attention` by blocks of at most so many queries and keys: memory is linear in the lengths,
    and only pairs of blocks in which something may be seen cost time, forward and backward.

    Has no forward-mode derivative.
    """
    rows, row_places = _fold(q, queries, k.shape[1])
    row_block = _block(q.shape[2], blocks[0]) * (q.shape[1] // k.shape[1])
    kv_block = _block(k.shape[2], blocks[1])
    out = _blockwise(
        _Settings(chunk_size, scale, dropout),
        _split(rows, row_block, axis=2),
        _split(k, kv_block, axis=2),
        _split(v, kv_block, axis=2),
        jax.tree.map(lambda x: _split(x, row_block, axis=1, fill=-1), row_places),
        jax.tree.map(lambda x: _split(x, kv_block, axis=1, fill=-1), keys),
        key,
    )
    out = jnp.moveaxis(out, 0, 2).reshape(*rows.shape[:2], -1, rows.shape[-1])
    return _unfold(out[:, :, : rows.shape[2]], q.shape[1])


class _Settings(eqx.Module):
    chunk_size: int | None = eqx.field(static=True)
    scale: float = eqx.field(static=True)
    dropout: float = eqx.field(static=True)


def _fold(
    q: Float[Array, "batch heads q_seq head_dim"], queries: Places, kv_heads: int
) -> tuple[Array, Places]:
    """Makes the query heads that share a key head into rows of one head, each with its place."""
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
    """Shares a length evenly among the fewest blocks, in steps of 16 so as to keep to the edges
    of chunks where that costs little."""
    even = -(-length // -(-length // limit))
    return min(-(-even // 16) * 16, limit, length)


def _split(x: Array, block: int, axis: int, fill: int = 0) -> Array:
    """Cuts an axis into blocks, the last one filled up; the number of the block comes first."""
    padding = [(0, -size % block if i == axis else 0) for i, size in enumerate(x.shape)]
    x = jnp.pad(x, padding, constant_values=fill)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :]), axis, 0)


def _at(places: Places, j: Int[Array, ""]) -> Places:
    return jax.tree.map(lambda x: x[j], places)


def _product(subscripts: str, x: Array, y: Array) -> Array:
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)


def _scores(settings: _Settings, q: Array, k: Array, queries: Places, keys: Places) -> Array:
    seen = visible(queries, keys, settings.chunk_size)[:, None]
    return jnp.where(seen, _product("bkrd,bksd->bkrs", q, k) * settings.scale, -jnp.inf)


def _drop(
    settings: _Settings, x: Array, key: PRNGKeyArray | None, i: int | Array, j: int | Array
) -> Array:
    """Dropout in a pair of blocks: whenever it is visited, the same entries fall."""
    if key is None or settings.dropout == 0:
        return x
    pair_key = jax.random.fold_in(jax.random.fold_in(key, i), j)
    kept = jax.random.bernoulli(pair_key, 1 - settings.dropout, x.shape)
    return jnp.where(kept, x / (1 - settings.dropout), 0)


def _visits(
    queries: Places, keys: Places, chunk_size: int | None
) -> tuple[Int[Array, "q_blocks kv_blocks"], Int[Array, " q_blocks"]]:
    """For each block of queries: the blocks of keys with those that it must visit first, and how
    many these are. Every other block lies, in all rows of the batch, outside the ranges of
    positions and segments that the queries see. Blocks of keys may come in any order: a cache may
    be a ring.
    """

    def low(x: Array, of: Places) -> Array:
        return jnp.where(of.segments < 0, jnp.iinfo(x.dtype).max, x).min(-1)

    def high(x: Array, of: Places) -> Array:
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
    queries: Places,
    keys: Places,
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
            kept = _drop(settings, weights, key, i, j).astype(v.dtype)
            out = out * shrink + _product("bkrs,bksd->bkrd", kept, v[j])
            return out, new_top, total

        zeros = jnp.zeros_like(q_i[..., :1], jnp.float32)
        start = jnp.zeros_like(q_i, jnp.float32), zeros + LOWEST, zeros
        out, top, total = lax.fori_loop(0, count, visit, start)
        total = jnp.where(total == 0, 1, total)
        return (out / total).astype(q.dtype), top + jnp.log(total)

    visits = _visits(queries, keys, settings.chunk_size)
    out, logsumexp = lax.map(attend, (jnp.arange(q.shape[0]), q, queries, *visits))
    out, logsumexp = kept((out, logsumexp))
    return out, (settings, q, k, v, queries, keys, key, out, logsumexp)


def _backward(residuals, d_out):
    settings, q, k, v, queries, keys, key, out, logsumexp = residuals

    def attend(d_kv, block):
        i, q_i, queries_i, out_i, logsumexp_i, d_out_i, visits, count = block
        # The part of each row's derivative that normalising to a sum of 1 takes away.
        mean = (out_i.astype(jnp.float32) * d_out_i.astype(jnp.float32)).sum(-1, keepdims=True)

        def visit(n, state):
            d_q_i, d_k, d_v = state
            j = visits[n]
            scores = _scores(settings, q_i, k[j], queries_i, _at(keys, j))
            weights = jnp.exp(scores - logsumexp_i)
            kept = _drop(settings, weights, key, i, j).astype(v.dtype)
            d_weights = _drop(settings, _product("bkrd,bksd->bkrs", d_out_i, v[j]), key, i, j)
            d_scores = (weights * (d_weights - mean) * settings.scale).astype(q.dtype)
            d_q_i += _product("bkrs,bksd->bkrd", d_scores, k[j])
            d_k = d_k.at[j].add(_product("bkrs,bkrd->bkds", d_scores, q_i))
            d_v = d_v.at[j].add(_product("bkrs,bkrd->bkds", kept, d_out_i))
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
