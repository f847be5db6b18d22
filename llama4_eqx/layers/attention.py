"""Grouped-query attention of the text decoder, for both of its layer kinds."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.nn.initializers import normal
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from llama4_eqx.layers.across import ALONE, Across, Axes, enter, leave, own_key
from llama4_eqx.layers.blockwise import attention
from llama4_eqx.layers.cache import Filled, Keys, LayerCache
from llama4_eqx.layers.linear import project, unproject
from llama4_eqx.layers.mask import Places
from llama4_eqx.layers.norm import rms_normalize
from llama4_eqx.layers.rope import Rotation


class TemperatureTuning(eqx.Module):
    """Sharpens attention as the context grows: queries at position p are scaled by
    `1 + attn_scale · log(1 + floor((p + 1) / floor_scale))`."""

    attn_scale: float = eqx.field(static=True)
    floor_scale: int = eqx.field(static=True)

    def __call__(
        self,
        q: Float[Array, "*batch seq heads head_dim"],
        positions: Int[Array, "*batch seq"],
    ) -> Float[Array, "*batch seq heads head_dim"]:
        # Whole steps are counted in integers: no float rounds a long position across a step.
        steps = ((positions + 1) // self.floor_scale).astype(jnp.float32)
        scale = 1 + self.attn_scale * jnp.log1p(steps)
        return (q.astype(jnp.float32) * scale[..., None, None]).astype(q.dtype)


class Attention(eqx.Module):
    """Causal grouped-query attention, `softmax(q · k / √head_dim) · v`.

    RoPE layers turn queries and keys and then, where `qk_norm_eps` is set, normalise them. NoPE
    layers do neither, but may tune the temperature. With a `chunk_size`, a query sees only keys of
    its own chunk of absolute positions: not a sliding window.
    """

    q_proj: Float[Array, "heads head_dim hidden"]
    k_proj: Float[Array, "kv_heads head_dim hidden"]
    v_proj: Float[Array, "kv_heads head_dim hidden"]
    o_proj: Float[Array, "hidden heads head_dim"]
    q_bias: Float[Array, "heads head_dim"] | None
    k_bias: Float[Array, "kv_heads head_dim"] | None
    v_bias: Float[Array, "kv_heads head_dim"] | None
    o_bias: Float[Array, "hidden"] | None
    use_rope: bool = eqx.field(static=True)
    chunk_size: int | None = eqx.field(static=True)
    qk_norm_eps: float | None = eqx.field(static=True)
    temperature: TemperatureTuning | None
    dropout: float = eqx.field(static=True)

    def __init__(
        self,
        hidden: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        use_rope: bool,
        chunk_size: int | None,
        qk_norm_eps: float | None,
        temperature: TemperatureTuning | None,
        bias: bool,
        dropout: float,
        init_std: float,
        dtype: DTypeLike,
        key: PRNGKeyArray,
    ) -> None:
        init = normal(init_std)
        q_key, k_key, v_key, o_key = jax.random.split(key, 4)
        self.q_proj = init(q_key, (heads, head_dim, hidden), dtype)
        self.k_proj = init(k_key, (kv_heads, head_dim, hidden), dtype)
        self.v_proj = init(v_key, (kv_heads, head_dim, hidden), dtype)
        self.o_proj = init(o_key, (hidden, heads, head_dim), dtype)
        self.q_bias = jnp.zeros((heads, head_dim), dtype) if bias else None
        self.k_bias = jnp.zeros((kv_heads, head_dim), dtype) if bias else None
        self.v_bias = jnp.zeros((kv_heads, head_dim), dtype) if bias else None
        self.o_bias = jnp.zeros(hidden, dtype) if bias else None
        self.use_rope = use_rope
        self.chunk_size = chunk_size
        self.qk_norm_eps = qk_norm_eps
        self.temperature = temperature
        self.dropout = dropout

    def __call__(
        self,
        x: Float[Array, "*batch seq hidden"],
        places: Places,
        rotation: Rotation,
        cache: LayerCache | None = None,
        filled: Filled | None = None,
        *,
        across: Across = ALONE,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "*batch seq hidden"], LayerCache | None]:
        """The layer's output, and its cache with these tokens in it."""
        x = enter(x, across.heads)
        q = project(x, self.q_proj, self.q_bias)
        k = project(x, self.k_proj, self.k_bias)
        v = project(x, self.v_proj, self.v_bias)
        if self.use_rope:
            q, k = rotation(q), rotation(k)
            if self.qk_norm_eps is not None:
                q, k = rms_normalize(q, self.qk_norm_eps), rms_normalize(k, self.qk_norm_eps)
        elif self.temperature is not None:
            q = self.temperature(q, places.positions)

        q, k, v = (jnp.swapaxes(part, -2, -3) for part in (q, k, v))  # heads before seq
        keys, split = Keys(k, v, places), ()
        if cache is not None and filled is not None:
            cache, keys, split = self._recall(cache, filled, keys, across)
        elif not self._keeps_to_itself(places):
            keys = keys.gathered(across, across.seq)
        out = _over_one_batch_axis(
            attention,
            q,
            keys.k,
            keys.v,
            places,
            keys.places,
            chunk_size=self.chunk_size,
            scale=self.q_proj.shape[1] ** -0.5,
            dropout=self.dropout,
            split=split,
            key=own_key(key, (*across.tokens, *across.heads)),
        )
        out = leave(unproject(jnp.swapaxes(out, -2, -3), self.o_proj, None), across.heads)
        return out if self.o_bias is None else out + self.o_bias, cache

    def _keeps_to_itself(self, places: Places) -> bool:
        """Whether no token sees one of another device, if each has a part of the sequence."""
        if self.chunk_size is None or not places.in_order:
            return False
        return places.positions.shape[-1] % self.chunk_size == 0

    def _recall(
        self, cache: LayerCache, filled: Filled, new: Keys, across: Across
    ) -> tuple[LayerCache, Keys, Axes]:
        """The new cache, and the keys to attend to with the mesh axes along which they are cut."""
        new = new.gathered(across, across.seq, shared=True)
        longer = cache.append(new, filled.after, across.slots)
        single = new.k.shape[-2] == 1
        if self.chunk_size is None or single:
            held = longer.keys(filled.first, filled.after, across.slots)
            if single:
                return longer, held, across.slots
            return longer, held.gathered(across, across.slots), ()
        # Several tokens may cross a chunk's edge and overwrite keys that the earlier of them
        # still need: attend to the old ring and the new tokens instead.
        old = cache.keys(filled.first, filled.before, across.slots)
        return longer, old.gathered(across, across.slots).followed_by(new), ()


def _over_one_batch_axis(function, q, k, v, queries, keys, **options):
    """Calls `function`, which takes one batch axis, on any leading batch axes."""
    batch_shape = q.shape[:-3]
    size = math.prod(batch_shape)
    q, k, v, queries, keys = jax.tree.map(
        lambda leaf: leaf.reshape(size, *leaf.shape[len(batch_shape) :]), (q, k, v, queries, keys)
    )
    out = function(q, k, v, queries, keys, **options)
    return out.reshape(*batch_shape, *out.shape[1:])
