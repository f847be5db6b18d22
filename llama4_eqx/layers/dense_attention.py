"""The dense attention core, with all scores at once, and what the other forms share with it."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from llama4_eqx.layers.collectives import AxisNames, psum_over
from llama4_eqx.layers.dropout import dropout
from llama4_eqx.layers.mask import TokenPositions, attention_mask

# Below every score but finite: subtracted from a score of -inf it gives no NaN.
LOWEST = float(jnp.finfo(jnp.float32).min)


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
    scoring = Scoring(chunk_size, scale, dropout_rate)
    rows, row_tokens = fold(q, queries, k.shape[1])
    scores = scoring.scores(rows, k, row_tokens, keys)
    top = lax.stop_gradient(scores.max(-1, keepdims=True, initial=LOWEST))
    top = lax.pmax(top, axis_names) if axis_names else top
    weights = jnp.exp(scores - top)
    total = psum_over(weights.sum(-1, keepdims=True), axis_names)
    dropped = scoring.drop(weights, key, 0, 0).astype(v.dtype)
    out = psum_over(product("bkrs,bksd->bkrd", dropped, v), axis_names)
    out /= jnp.where(total == 0, 1, total)
    return unfold(out.astype(q.dtype), q.shape[1])


class Scoring(eqx.Module):
    """How queries score keys, and which probabilities are dropped."""

    chunk_size: int | None = eqx.field(static=True)
    scale: float = eqx.field(static=True)
    dropout_rate: float = eqx.field(static=True)

    def scores(
        self,
        q: Float[Array, "batch kv_heads rows head_dim"],
        k: Float[Array, "batch kv_heads kv_seq head_dim"],
        queries: TokenPositions,
        keys: TokenPositions,
    ) -> Float[Array, "batch kv_heads rows kv_seq"]:
        """Scores in float32; -inf outside the mask."""
        mask = attention_mask(queries, keys, self.chunk_size)[:, None]
        return jnp.where(mask, product("bkrd,bksd->bkrs", q, k) * self.scale, -jnp.inf)

    def drop(self, x: Array, key: PRNGKeyArray | None, i: int | Array, j: int | Array) -> Array:
        """Dropout in a pair of blocks: the same entries each time that the pair is computed."""
        if key is not None:
            key = jax.random.fold_in(jax.random.fold_in(key, i), j)
        return dropout(x, self.dropout_rate, key)


def fold(
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


def unfold(rows: Array, heads: int) -> Float[Array, "batch heads q_seq head_dim"]:
    """Undoes `fold`."""
    batch, kv_heads, count, head_dim = rows.shape
    group = heads // kv_heads
    out = rows.reshape(batch, kv_heads, count // group, group, head_dim).swapaxes(2, 3)
    return out.reshape(batch, heads, count // group, head_dim)


def product(subscripts: str, x: Array, y: Array) -> Array:
    """`einsum` with a result in float32."""
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)
