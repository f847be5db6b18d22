"""Grouped-query attention of the text decoder, for RoPE and NoPE layers."""

from functools import partial
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from llama4_eqx.layers.attend import Attended, attend, sends_keys_round
from llama4_eqx.layers.cache import CacheSpan, KeysValues, LayerCache
from llama4_eqx.layers.collectives import MeshAxes, fold_in_axis_index
from llama4_eqx.layers.context import Context
from llama4_eqx.layers.initializers import normal
from llama4_eqx.layers.interfaces import SequenceMixer
from llama4_eqx.layers.linear import project, unproject
from llama4_eqx.layers.mask import TokenPositions
from llama4_eqx.layers.norm import rms_normalize
from llama4_eqx.layers.pattern import attention_by_pattern


class TemperatureTuning(eqx.Module):
    """Sharpens attention as the context grows: scales queries at position p by
    `1 + attn_scale · log(1 + floor((p + 1) / floor_scale))`."""

    attn_scale: float = eqx.field(static=True)
    floor_scale: int = eqx.field(static=True)

    def __call__(
        self,
        q: Float[Array, "*batch seq heads head_dim"],
        positions: Int[Array, "*batch seq"],
    ) -> Float[Array, "*batch seq heads head_dim"]:
        # Whole steps are counted in integers: no float rounds a long position up to the next step.
        steps = ((positions + 1) // self.floor_scale).astype(jnp.float32)
        scale = 1 + self.attn_scale * jnp.log1p(steps)
        return (q.astype(jnp.float32) * scale[..., None, None]).astype(q.dtype)


class Attention(SequenceMixer):
    """Causal grouped-query attention, `softmax(q · k / √head_dim) · v`.

    RoPE layers rotate queries and keys and then, if `qk_norm_eps` is set, normalise them. NoPE
    layers do neither, but may tune the temperature. With a `chunk_size`, a query attends only to
    keys of its own chunk of absolute positions: not a sliding window.
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
    takes_row_shards: ClassVar[bool] = True
    sites: ClassVar[dict[str, str]] = {
        "q": "*batch seq heads head_dim",
        "k": "*batch seq kv_heads head_dim",
        "v": "*batch seq kv_heads head_dim",
        "pattern": "*batch heads q_seq kv_seq",
        "head_out": "*batch seq heads head_dim",
    }

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
        context: Context,
        cache: LayerCache | None = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "*batch seq hidden"], LayerCache | None]:
        """The layer's output, and its cache with these tokens stored."""
        mesh_axes, sites = context.execution.mesh_axes, context.execution.sites
        x = mesh_axes.gather_rows(x, mesh_axes.heads)
        q = project(x, self.q_proj, self.q_bias)
        k = project(x, self.k_proj, self.k_bias)
        v = project(x, self.v_proj, self.v_bias)
        if self.use_rope:
            q, k = context.rotation(q), context.rotation(k)
            if self.qk_norm_eps is not None:
                q, k = rms_normalize(q, self.qk_norm_eps), rms_normalize(k, self.qk_norm_eps)
        elif self.temperature is not None:
            q = self.temperature(q, context.tokens.positions)

        q, k, v = sites("q", q), sites("k", k), sites("v", v)
        q, k, v = (jnp.swapaxes(part, -2, -3) for part in (q, k, v))  # heads before seq
        show_pattern = sites.probe.visits("pattern")
        new = KeysValues(k, v, context.tokens)
        if cache is not None and context.span is not None:
            cache, attended = self._with_cache(
                cache, context.span, new, mesh_axes, gather_slots=show_pattern
            )
        elif self._chunks_are_local(context.tokens) and not show_pattern:
            attended = Attended(new, are_own=True)
        elif not show_pattern and sends_keys_round(new, context.execution):
            attended = Attended(new, ring=mesh_axes.seq)
        else:
            attended = Attended(new.all_gather(mesh_axes, mesh_axes.seq), are_own=not mesh_axes.seq)
        settings = {
            "chunk_size": self.chunk_size,
            "scale": self.q_proj.shape[1] ** -0.5,
            "dropout_rate": self.dropout,
            "key": fold_in_axis_index(key, (*mesh_axes.tokens, *mesh_axes.heads)),
        }
        if show_pattern:
            keys, visit = attended.keys, partial(sites, "pattern")
            operands = q, keys.k, keys.v, context.tokens, keys.tokens
            out = attention_by_pattern(*operands, span=context.span, visit=visit, **settings)
        else:
            out = attend(q, new, attended, context, **settings)
        out = sites("head_out", jnp.swapaxes(out, -2, -3))
        out = unproject(out, self.o_proj, None)
        out = mesh_axes.sum_rows(out, mesh_axes.heads)
        return out if self.o_bias is None else out + self.o_bias, cache

    def empty_cache(self, batch_shape: tuple[int, ...], capacity: int) -> LayerCache:
        """A cache for rows of at most `capacity` tokens: one chunk of them if the layer is
        chunk-local."""
        kv_heads, head_dim = self.k_proj.shape[-3:-1]
        return LayerCache.empty(
            batch_shape,
            kv_heads=kv_heads,
            slots=min(self.chunk_size or capacity, capacity),
            head_dim=head_dim,
            dtype=self.k_proj.dtype,
        )

    def _chunks_are_local(self, tokens: TokenPositions) -> bool:
        """Whether every chunk lies on one device, if the sequence is sharded."""
        if self.chunk_size is None or not tokens.contiguous:
            return False
        return tokens.positions.shape[-1] % self.chunk_size == 0

    def _with_cache(
        self,
        cache: LayerCache,
        span: CacheSpan,
        new: KeysValues,
        mesh_axes: MeshAxes,
        *,
        gather_slots: bool,
    ) -> tuple[LayerCache, Attended]:
        """The updated cache, and the keys to attend to."""
        slots = mesh_axes.slots
        new = new.all_gather(mesh_axes, mesh_axes.seq, shared=True)
        updated = cache.update(new, span.new_end, slots)
        single = new.k.shape[-2] == 1
        if self.chunk_size is None or single:
            held = updated.read(span.start, span.new_end, slots)
            if single and not gather_slots:
                return updated, Attended(held, axis_names=slots)
            held = held.all_gather(mesh_axes, slots)
            return updated, Attended(held, past=held.before(span.old_end))
        # Several tokens may cross a chunk's edge and overwrite keys that the earlier of them
        # still need: attend to the old ring and the new tokens instead.
        old = cache.read(span.start, span.old_end, slots).all_gather(mesh_axes, slots)
        return updated, Attended(old.concatenate(new), past=old)
