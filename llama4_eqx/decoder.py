"""The stack of decoder layers: a repeating cycle, stacked and scanned, and the layers left over."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from llama4_eqx.config import TextConfig
from llama4_eqx.layers.attention import Attention, TemperatureTuning
from llama4_eqx.layers.cache import KVCache, LayerCache
from llama4_eqx.layers.context import Context
from llama4_eqx.layers.lowrank import merged
from llama4_eqx.layers.mlp import MLP, FeedForward
from llama4_eqx.layers.moe import MoE
from llama4_eqx.layers.norm import RMSNorm
from llama4_eqx.layers.remat import RematPolicy, rematerialise
from llama4_eqx.layers.rope import RotaryEmbedding


class DecoderLayer(eqx.Module):
    """`h = x + self_attn(norm(x))`, then `h + feed_forward(norm(h))`; RoPE or NoPE, and dense or a
    mixture of experts."""

    input_layernorm: RMSNorm
    self_attn: Attention
    post_attention_layernorm: RMSNorm
    feed_forward: FeedForward

    def __init__(
        self, config: TextConfig, layer_id: int, *, dtype: DTypeLike, key: PRNGKeyArray
    ) -> None:
        attention_key, feed_forward_key = jax.random.split(key)
        hidden, init_std = config.hidden_size, config.initializer_range
        nope = config.layer_is_nope(layer_id)
        tuned = nope and config.attn_temperature_tuning
        self.input_layernorm = RMSNorm(hidden, eps=config.rms_norm_eps, dtype=dtype)
        self.post_attention_layernorm = RMSNorm(hidden, eps=config.rms_norm_eps, dtype=dtype)
        self.self_attn = Attention(
            hidden,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            use_rope=not nope,
            chunk_size=config.layer_chunk_size(layer_id),
            qk_norm_eps=config.rms_norm_eps if config.use_qk_norm else None,
            temperature=TemperatureTuning(config.attn_scale, config.floor_scale) if tuned else None,
            bias=config.attention_bias,
            dropout=config.attention_dropout,
            init_std=init_std,
            dtype=dtype,
            key=attention_key,
        )
        if config.layer_is_moe(layer_id):
            self.feed_forward = MoE(
                config.num_local_experts,
                hidden,
                config.intermediate_size,
                top_k=config.num_experts_per_tok,
                init_std=init_std,
                dtype=dtype,
                key=feed_forward_key,
            )
        else:
            self.feed_forward = MLP(
                hidden,
                config.intermediate_size_mlp,
                init_std=init_std,
                dtype=dtype,
                key=feed_forward_key,
            )

    def __call__(
        self,
        x: Float[Array, "*batch seq hidden"],
        context: Context,
        cache: LayerCache | None = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> tuple[
        Float[Array, "*batch seq hidden"],
        LayerCache | None,
        Float[Array, "*batch seq experts"] | None,
    ]:
        """The layer's output, its cache, and its router's logits (None for a dense layer)."""
        attended, cache = self.self_attn(self.input_layernorm(x), context, cache, key=key)
        x = x + attended
        out, router_logits = self.feed_forward(
            self.post_attention_layernorm(x), mesh_axes=context.mesh_axes
        )
        return x + out, cache, router_logits


class DecoderBlock(eqx.Module):
    """One cycle of the layer pattern: the unit that `Decoder` stacks and scans."""

    layers: tuple[DecoderLayer, ...]

    def __init__(
        self, config: TextConfig, layer_ids: range, *, dtype: DTypeLike, key: PRNGKeyArray
    ) -> None:
        keys = jax.random.split(key, len(layer_ids))
        self.layers = tuple(
            DecoderLayer(config, layer_id, dtype=dtype, key=layer_key)
            for layer_id, layer_key in zip(layer_ids, keys, strict=True)
        )

    def __call__(
        self,
        x: Float[Array, "*batch seq hidden"],
        context: Context,
        caches: tuple[LayerCache, ...] | None = None,
        *,
        remat: RematPolicy = "dots",
        key: PRNGKeyArray | None = None,
    ) -> tuple[
        Float[Array, "*batch seq hidden"],
        tuple[LayerCache, ...] | None,
        tuple[Float[Array, "*batch seq experts"], ...],
    ]:
        """The last layer's output, each layer's cache, and each MoE layer's router logits."""
        keys = [None] * len(self.layers) if key is None else jax.random.split(key, len(self.layers))
        router_logits, new_caches = [], []

        @partial(rematerialise, policy=remat)
        def run(layer, x, cache, key):
            layer = merged(context.mesh_axes.gather_params(layer))
            return layer(x, context, cache, key=key)

        for i, layer in enumerate(self.layers):
            cache = None if caches is None else caches[i]
            x, cache, logits = run(layer, x, cache, keys[i])
            new_caches.append(cache)
            if logits is not None:
                router_logits.append(logits)
        return x, None if caches is None else tuple(new_caches), tuple(router_logits)


class Decoder(eqx.Module):
    """All layers and the final norm.

    `blocks` holds the repeats of the smallest cycle of the layer pattern: one `DecoderBlock` whose
    leaves are stacked along a leading `layers` axis and run by `lax.scan`, so that compile time
    doesn't grow with depth. `tail` holds the layers that don't fill a cycle, unrolled: all of an
    irregular pattern, or of an `unstacked` decoder.
    """

    blocks: DecoderBlock | None
    tail: DecoderBlock
    norm: RMSNorm
    rope: RotaryEmbedding

    def __init__(self, config: TextConfig, *, dtype: DTypeLike, key: PRNGKeyArray) -> None:
        blocks_key, tail_key = jax.random.split(key)
        layers, cycle = config.num_hidden_layers, layer_cycle(config)
        repeats = layers // cycle
        self.blocks = None
        if repeats > 1:
            self.blocks = eqx.filter_vmap(
                lambda key: DecoderBlock(config, range(cycle), dtype=dtype, key=key)
            )(jax.random.split(blocks_key, repeats))
        tail = range(repeats * cycle if repeats > 1 else 0, layers)
        self.tail = DecoderBlock(config, tail, dtype=dtype, key=tail_key)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        scaling = config.rope_scaling
        self.rope = RotaryEmbedding(config.head_dim, config.rope_theta)
        if scaling is not None:
            self.rope = RotaryEmbedding(
                config.head_dim,
                config.rope_theta,
                scaling.factor,
                scaling.low_freq_factor,
                scaling.high_freq_factor,
                scaling.original_max_position_embeddings,
            )

    def __call__(
        self,
        x: Float[Array, "*batch seq hidden"],
        context: Context,
        cache: KVCache | None = None,
        *,
        remat: RematPolicy = "dots",
        key: PRNGKeyArray | None = None,
    ) -> tuple[
        Float[Array, "*batch seq hidden"],
        KVCache | None,
        Float[Array, "layers *batch seq experts"],
    ]:
        """The normed hidden states, the cache, and the router's logits of each MoE layer."""
        blocks_key, tail_key = (None, None) if key is None else jax.random.split(key)
        caches = None if cache is None else cache.blocks
        router_logits = []
        if self.blocks is not None:
            arrays, static = eqx.partition(self.blocks, eqx.is_array)
            repeats = self.depth_of_stack
            keys = None if blocks_key is None else jax.random.split(blocks_key, repeats)

            # Caches are carried, and so updated in place; as outputs of the scan they'd be copied.
            def step(carry, repeat):
                (x, caches), (i, arrays, key) = carry, repeat
                block = eqx.combine(arrays, static)
                old = jax.tree.map(lambda all: all[i], caches)
                x, new, logits = block(x, context, old, remat=remat, key=key)
                return (x, jax.tree.map(lambda all, one: all.at[i].set(one), caches, new)), logits

            (x, caches), stacked_logits = lax.scan(
                step, (x, caches), (jnp.arange(repeats), arrays, keys)
            )
            if stacked_logits:
                by_layer = jnp.stack(stacked_logits, axis=1)
                router_logits.append(lax.collapse(by_layer, 0, 2))
        tail_caches = None if cache is None else cache.tail
        x, tail_caches, tail_logits = self.tail(x, context, tail_caches, remat=remat, key=tail_key)
        if tail_logits:
            router_logits.append(jnp.stack(tail_logits))
        if cache is not None:
            cache = eqx.tree_at(lambda c: (c.blocks, c.tail), cache, (caches, tail_caches))
        if router_logits:
            all_logits = jnp.concatenate(router_logits)
        else:
            all_logits = jnp.zeros((0, *x.shape[:-1], 0), x.dtype)
        return context.mesh_axes.gather_params(self.norm)(x), cache, all_logits

    @property
    def depth_of_stack(self) -> int:
        """How many times the cycle in `blocks` repeats."""
        return 0 if self.blocks is None else jax.tree.leaves(self.blocks)[0].shape[0]

    def unstacked_layers(self) -> list[DecoderLayer]:
        """All layers in order, each with arrays of its own."""
        repeats = [
            jax.tree.map(lambda leaf, i=i: leaf[i], self.blocks) for i in range(self.depth_of_stack)
        ]
        return [layer for block in (*repeats, self.tail) for layer in block.layers]

    def unstacked(self) -> "Decoder":
        """The same decoder with every layer in `tail`.

        Compile time grows with depth, but on a CPU decoding is much faster, since a scan copies
        each layer's weights before it uses them.
        """
        layers = tuple(self.unstacked_layers())
        tail = eqx.tree_at(lambda block: block.layers, self.tail, layers)
        return eqx.tree_at(
            lambda d: (d.blocks, d.tail), self, (None, tail), is_leaf=lambda leaf: leaf is None
        )

    def empty_cache(
        self, batch_shape: tuple[int, ...], capacity: int, *, start: int = 0
    ) -> KVCache:
        """See `Llama4.empty_cache`."""

        repeats = self.depth_of_stack
        blocks = () if self.blocks is None else self.blocks.layers
        stacked_shape = (repeats, *batch_shape)
        return KVCache(
            blocks=tuple(layer.self_attn.empty_cache(stacked_shape, capacity) for layer in blocks),
            tail=tuple(
                layer.self_attn.empty_cache(batch_shape, capacity) for layer in self.tail.layers
            ),
            start=jnp.full(batch_shape, start, jnp.int32),
            length=jnp.zeros(batch_shape, jnp.int32),
            capacity=capacity,
        )


def layer_cycle(config: TextConfig) -> int:
    """The length of the smallest cycle that the layers repeat, the last time perhaps in part."""
    kinds = [
        (config.layer_is_nope(i), config.layer_is_moe(i), config.layer_chunk_size(i))
        for i in range(config.num_hidden_layers)
    ]
    return next(
        cycle
        for cycle in range(1, len(kinds) + 1)
        if all(kinds[i] == kinds[i - cycle] for i in range(cycle, len(kinds)))
    )
