"""The blockwise attention core: an online softmax by pairs of blocks, which never holds all scores
(FlashAttention, https://arxiv.org/abs/2205.14135) and skips the blocks of keys that no query of a
block attends to."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from llama4_eqx.layers.dense_attention import LOWEST, Scoring, fold, product, unfold
from llama4_eqx.layers.mask import TokenPositions
from llama4_eqx.layers.remat import save_residual

# The fastest on CPUs, for causal and for chunk-local layers: larger blocks fall out of the cache
# and straddle chunks, smaller ones make poor matrix products.
BLOCK = 256
# On GPUs few large products win: twice as fast on an H100.
LARGE_BLOCK = 1024


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
    scoring = Scoring(chunk_size, scale, dropout_rate)
    out = _blockwise(scoring, *into_blocks(q, k, v, queries, keys, blocks), key)
    return from_blocks(out, q)


def into_blocks(
    q: Float[Array, "batch heads q_seq head_dim"],
    k: Float[Array, "batch kv_heads kv_seq head_dim"],
    v: Float[Array, "batch kv_heads kv_seq head_dim"],
    queries: TokenPositions,
    keys: TokenPositions,
    blocks: tuple[int, int],
) -> tuple[Array, Array, Array, TokenPositions, TokenPositions]:
    """The operands of `forward`, in blocks along a new first axis; the last ones are padded."""
    rows, row_tokens = fold(q, queries, k.shape[1])
    row_block = _block(q.shape[2], blocks[0]) * (q.shape[1] // k.shape[1])
    kv_block = _block(k.shape[2], blocks[1])
    return (
        _cut(rows, row_block, axis=2),
        _cut(k, kv_block, axis=2),
        _cut(v, kv_block, axis=2),
        jax.tree.map(lambda x: _cut(x, row_block, axis=1, fill=-1), row_tokens),
        jax.tree.map(lambda x: _cut(x, kv_block, axis=1, fill=-1), keys),
    )


def from_blocks(
    out: Float[Array, "q_blocks batch kv_heads q_block head_dim"],
    q: Float[Array, "batch heads q_seq head_dim"],
) -> Float[Array, "batch heads q_seq head_dim"]:
    """What `forward` makes of the queries' blocks, with the axes of the queries."""
    batch, heads, q_seq, head_dim = q.shape
    kv_heads = out.shape[2]
    out = jnp.moveaxis(out, 0, 2).reshape(batch, kv_heads, -1, head_dim)
    return unfold(out[:, :, : q_seq * heads // kv_heads], heads)


def _block(length: int, limit: int) -> int:
    """The size of the fewest, most even blocks, rounded up to 16 so that their edges tend to be
    those of chunks."""
    even = -(-length // -(-length // limit))
    return min(-(-even // 16) * 16, limit, length)


def _cut(x: Array, block: int, axis: int, fill: int = 0) -> Array:
    """Splits an axis into blocks, the last one padded; the blocks' axis comes first."""
    padding = [(0, -size % block if i == axis else 0) for i, size in enumerate(x.shape)]
    x = jnp.pad(x, padding, constant_values=fill)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :]), axis, 0)


def _at(tokens: TokenPositions, j: Int[Array, ""]) -> TokenPositions:
    return jax.tree.map(lambda x: x[j], tokens)


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


def forward(
    scoring: Scoring,
    q: Float[Array, "q_blocks batch kv_heads q_block head_dim"],
    k: Float[Array, "kv_blocks batch kv_heads kv_block head_dim"],
    v: Float[Array, "kv_blocks batch kv_heads kv_block head_dim"],
    queries: TokenPositions,
    keys: TokenPositions,
    key: PRNGKeyArray | None,
) -> tuple[
    Float[Array, "q_blocks batch kv_heads q_block head_dim"],
    Float[Array, "q_blocks batch kv_heads q_block"],
]:
    """The attention's output, and the logsumexp of each row's scores."""

    def attend(block):
        i, q_i, queries_i, visits, count = block

        def visit(n, state):
            out, top, total = state
            j = visits[n]
            scores = scoring.scores(q_i, k[j], queries_i, _at(keys, j))
            new_top = jnp.maximum(top, scores.max(-1, keepdims=True))
            weights, shrink = jnp.exp(scores - new_top), jnp.exp(top - new_top)
            total = total * shrink + weights.sum(-1, keepdims=True)
            dropped = scoring.drop(weights, key, i, j).astype(v.dtype)
            out = out * shrink + product("bkrs,bksd->bkrd", dropped, v[j])
            return out, new_top, total

        zeros = jnp.zeros_like(q_i[..., :1], jnp.float32)
        start = jnp.zeros_like(q_i, jnp.float32), zeros + LOWEST, zeros
        out, top, total = lax.fori_loop(0, count, visit, start)
        total = jnp.where(total == 0, 1, total)
        return (out / total).astype(q.dtype), (top + jnp.log(total))[..., 0]

    visits = _visits(queries, keys, scoring.chunk_size)
    return lax.map(attend, (jnp.arange(q.shape[0]), q, queries, *visits))


class KeyGradients(NamedTuple):
    """Gradients of keys and values in float32, transposed: this is the faster product on CPUs."""

    k: Float[Array, "kv_blocks batch kv_heads head_dim kv_block"]
    v: Float[Array, "kv_blocks batch kv_heads head_dim kv_block"]

    @classmethod
    def zeros(cls, k: Float[Array, "kv_blocks batch kv_heads kv_block head_dim"]) -> "KeyGradients":
        zeros = jnp.zeros_like(k.swapaxes(-1, -2), jnp.float32)
        return cls(zeros, zeros)

    def like(self, k: Array, v: Array) -> tuple[Array, Array]:
        """The gradients with the axes and dtypes of keys and values."""
        return self.k.swapaxes(-1, -2).astype(k.dtype), self.v.swapaxes(-1, -2).astype(v.dtype)


def backward(
    scoring: Scoring,
    q: Float[Array, "q_blocks batch kv_heads q_block head_dim"],
    k: Float[Array, "kv_blocks batch kv_heads kv_block head_dim"],
    v: Float[Array, "kv_blocks batch kv_heads kv_block head_dim"],
    queries: TokenPositions,
    keys: TokenPositions,
    key: PRNGKeyArray | None,
    out: Float[Array, "q_blocks batch kv_heads q_block head_dim"],
    logsumexp: Float[Array, "q_blocks batch kv_heads q_block"],
    d_out: Float[Array, "q_blocks batch kv_heads q_block head_dim"],
    d_kv: KeyGradients,
) -> tuple[Float[Array, "q_blocks batch kv_heads q_block head_dim"], KeyGradients]:
    """The gradients of the queries, and those of keys and values added to `d_kv`.

    The keys may be some of those that `out` and `logsumexp` are of.
    """

    def attend(d_kv, block):
        i, q_i, queries_i, out_i, logsumexp_i, d_out_i, visits, count = block
        # What normalising to a sum of 1 subtracts from the derivative of each row.
        mean = (out_i.astype(jnp.float32) * d_out_i.astype(jnp.float32)).sum(-1, keepdims=True)

        def visit(n, state):
            d_q_i, d_kv = state
            j = visits[n]
            scores = scoring.scores(q_i, k[j], queries_i, _at(keys, j))
            weights = jnp.exp(scores - logsumexp_i[..., None])
            dropped = scoring.drop(weights, key, i, j).astype(v.dtype)
            d_weights = scoring.drop(product("bkrd,bksd->bkrs", d_out_i, v[j]), key, i, j)
            d_scores = (weights * (d_weights - mean) * scoring.scale).astype(q.dtype)
            d_k = d_kv.k.at[j].add(product("bkrs,bkrd->bkds", d_scores, q_i))
            d_v = d_kv.v.at[j].add(product("bkrs,bkrd->bkds", dropped, d_out_i))
            return d_q_i + product("bkrs,bksd->bkrd", d_scores, k[j]), KeyGradients(d_k, d_v)

        start = jnp.zeros_like(q_i, jnp.float32), d_kv
        d_q_i, d_kv = lax.fori_loop(0, count, visit, start)
        return d_kv, d_q_i.astype(q.dtype)

    visits = _visits(queries, keys, scoring.chunk_size)
    blocks = jnp.arange(q.shape[0]), q, queries, out, logsumexp, d_out, *visits
    d_kv, d_q = lax.scan(attend, d_kv, blocks)
    return d_q, d_kv


@jax.custom_vjp
def _blockwise(
    scoring: Scoring,
    q: Float[Array, "q_blocks batch kv_heads q_block head_dim"],
    k: Float[Array, "kv_blocks batch kv_heads kv_block head_dim"],
    v: Float[Array, "kv_blocks batch kv_heads kv_block head_dim"],
    queries: TokenPositions,
    keys: TokenPositions,
    key: PRNGKeyArray | None,
) -> Float[Array, "q_blocks batch kv_heads q_block head_dim"]:
    return forward(scoring, q, k, v, queries, keys, key)[0]


def _forward(*operands):
    out, logsumexp = save_residual(forward(*operands))
    return out, (*operands, out, logsumexp)


def _backward(residuals, d_out):
    scoring, q, k, v, queries, keys, key, out, logsumexp = residuals
    d_kv = KeyGradients.zeros(k)
    d_q, d_kv = backward(scoring, q, k, v, queries, keys, key, out, logsumexp, d_out, d_kv)
    return None, d_q, *d_kv.like(k, v), None, None, None


_blockwise.defvjp(_forward, _backward)
