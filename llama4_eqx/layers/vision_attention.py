"""The vision encoder's attention: bidirectional over a tile, with RoPE over rows and columns."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from llama4_eqx.layers.dropout import dropout
from llama4_eqx.layers.initializers import normal
from llama4_eqx.layers.linear import project, unproject
from llama4_eqx.layers.remat import save_residual
from llama4_eqx.layers.rope import Rotation, rope_frequencies
from llama4_eqx.layers.sites import NO_SITES, Sites


class VisionAttention(eqx.Module):
    """Full attention between the patches of a tile, all projections with a bias."""

    q_proj: Float[Array, "heads head_dim vision_hidden"]
    k_proj: Float[Array, "heads head_dim vision_hidden"]
    v_proj: Float[Array, "heads head_dim vision_hidden"]
    o_proj: Float[Array, "vision_hidden heads head_dim"]
    q_bias: Float[Array, "heads head_dim"]
    k_bias: Float[Array, "heads head_dim"]
    v_bias: Float[Array, "heads head_dim"]
    o_bias: Float[Array, "vision_hidden"]
    dropout: float = eqx.field(static=True)

    def __init__(
        self,
        vision_hidden: int,
        heads: int,
        *,
        dropout: float,
        init_std: float,
        dtype: DTypeLike,
        key: PRNGKeyArray,
    ) -> None:
        init, head_dim = normal(init_std), vision_hidden // heads
        q_key, k_key, v_key, o_key = jax.random.split(key, 4)
        self.q_proj = init(q_key, (heads, head_dim, vision_hidden), dtype)
        self.k_proj = init(k_key, (heads, head_dim, vision_hidden), dtype)
        self.v_proj = init(v_key, (heads, head_dim, vision_hidden), dtype)
        self.o_proj = init(o_key, (vision_hidden, heads, head_dim), dtype)
        self.q_bias = jnp.zeros((heads, head_dim), dtype)
        self.k_bias = jnp.zeros((heads, head_dim), dtype)
        self.v_bias = jnp.zeros((heads, head_dim), dtype)
        self.o_bias = jnp.zeros(vision_hidden, dtype)
        self.dropout = dropout

    def __call__(
        self,
        x: Float[Array, "*batch patches vision_hidden"],
        rotation: Rotation,
        *,
        sites: Sites = NO_SITES,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*batch patches vision_hidden"]:
        q = rotation(project(x, self.q_proj, self.q_bias))
        k = rotation(project(x, self.k_proj, self.k_bias))
        v = project(x, self.v_proj, self.v_bias)
        if sites.probe.visits("vision_pattern"):
            pattern = sites("vision_pattern", _pattern(q, k))
            out = _attend_by(dropout(pattern, self.dropout, key), v)
            return unproject(out, self.o_proj, self.o_bias)
        q, k, v = (part.reshape(-1, *part.shape[-3:]) for part in (q, k, v))
        keys = None if key is None else jax.random.split(key, len(q))
        attend = partial(_attend, dropout_rate=self.dropout)
        out = lax.platform_dependent(
            (q, k, v, keys),
            # One tile at a time, whose scores fit in a CPU's cache.
            cpu=partial(lax.map, lambda tile: attend(*tile)),
            default=lambda tiles: jax.vmap(attend)(*tiles),
        )
        out = save_residual(out)
        out = out.reshape(*x.shape[:-1], *out.shape[-2:])
        return unproject(out, self.o_proj, self.o_bias)


def rotation_2d(rows: int, columns: int, head_dim: int, theta: float) -> Rotation:
    """The rotation of a tile's patches: the first half of a head's pairs turns with the column, the
    second half with the row, both counted from 1; the class token, which is last, isn't rotated."""
    row, column = np.divmod(np.arange(rows * columns, dtype=np.float32), columns)
    frequencies = rope_frequencies(head_dim // 2, theta)
    angles = [np.outer(1 + index, frequencies) for index in (column, row)]
    angles = np.pad(np.concatenate(angles, axis=-1), ((0, 1), (0, 0)))
    return Rotation(jnp.cos(angles), jnp.sin(angles))


@eqx.filter_checkpoint
def _attend(
    q: Float[Array, "patches heads head_dim"],
    k: Float[Array, "patches heads head_dim"],
    v: Float[Array, "patches heads head_dim"],
    key: PRNGKeyArray | None,
    *,
    dropout_rate: float,
) -> Float[Array, "patches heads head_dim"]:
    """Softmax attention of each patch over its tile; the backward pass recomputes the scores."""
    return _attend_by(dropout(_pattern(q, k), dropout_rate, key), v)


def _pattern(
    q: Float[Array, "*batch patches heads head_dim"],
    k: Float[Array, "*batch patches heads head_dim"],
) -> Float[Array, "*batch heads patches patches"]:
    q, k = (jnp.swapaxes(part, -2, -3) for part in (q, k))
    scores = jnp.einsum("...qk,...sk->...qs", q, k, preferred_element_type=jnp.float32)
    return jax.nn.softmax(scores * q.shape[-1] ** -0.5, axis=-1)


def _attend_by(
    pattern: Float[Array, "*batch heads patches patches"],
    v: Float[Array, "*batch patches heads head_dim"],
) -> Float[Array, "*batch patches heads head_dim"]:
    v = jnp.swapaxes(v, -2, -3)
    return jnp.swapaxes(jnp.einsum("...qs,...sk->...qk", pattern.astype(v.dtype), v), -2, -3)
