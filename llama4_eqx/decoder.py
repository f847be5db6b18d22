"""The stack of decoder layers: a repeating cycle, stacked and scanned, and the layers left over."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from llama4_eqx.decoder_block import DecoderBlock
from llama4_eqx.decoder_layer import DecoderLayer
from llama4_eqx.kv_cache import KVCache
from llama4_eqx.layers.context import Context
from llama4_eqx.layers.moe import Experts
from llama4_eqx.layers.norm import RMSNorm
from llama4_eqx.layers.remat import RematPolicy
from llama4_eqx.layers.rope import RotaryEmbedding
from llama4_eqx.layers.sites import Readings, concatenated
from llama4_eqx.text_config import TextConfig


class Decoder(eqx.Module):
    """All layers and the final norm.

    The layers are blocks, run one after another. A new decoder has one that repeats the smallest
    cycle of the layer pattern, stacked and scanned, and one of the layers that don't fill a cycle:
    all of an irregular pattern.
    """

    blocks: tuple[DecoderBlock, ...]
    norm: RMSNorm
    rope: RotaryEmbedding

    def __init__(self, config: TextConfig, *, dtype: DTypeLike, key: PRNGKeyArray) -> None:
        blocks_key, tail_key = jax.random.split(key)
        layers, cycle = config.num_hidden_layers, layer_cycle(config)
        repeats = layers // cycle

        def make(layer_ids: range, key: PRNGKeyArray) -> tuple[DecoderLayer, ...]:
            return tuple(
                DecoderLayer(config, layer_id, dtype=dtype, key=layer_key)
                for layer_id, layer_key in zip(
                    layer_ids, jax.random.split(key, len(layer_ids)), strict=True
                )
            )

        blocks = []
        if repeats > 1:
            keys = jax.random.split(blocks_key, repeats)
            stacked = eqx.filter_vmap(lambda key: make(range(cycle), key))(keys)
            blocks.append(DecoderBlock(stacked, repeats))
        tail = range(repeats * cycle if repeats > 1 else 0, layers)
        if tail:
            blocks.append(DecoderBlock(make(tail, tail_key)))
        self.blocks = tuple(blocks)
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
    ) -> tuple[Float[Array, "*batch seq hidden"], KVCache | None, Readings]:
        """The normed hidden states, the cache, and what is read of the layers, each with a leading
        axis of layers: the router's logits of each MoE layer always, and a probe's sites."""
        keys = [None] * len(self.blocks) if key is None else jax.random.split(key, len(self.blocks))
        caches, readings, first_layer = [], [], 0
        for i, block in enumerate(self.blocks):
            old = None if cache is None else cache.blocks[i]
            x, new, read = block(x, context, old, first_layer=first_layer, remat=remat, key=keys[i])
            caches.append(new)
            readings.append(read)
            first_layer += block.depth
        if cache is not None:
            cache = eqx.tree_at(lambda c: c.blocks, cache, tuple(caches))
        no_router = {"router_logits": jnp.zeros((0, *x.shape[:-1], 0), x.dtype)}
        x = context.execution.mesh_axes.gather_params(self.norm)(x)
        return x, cache, no_router | concatenated(readings)

    def layers(self) -> list[DecoderLayer]:
        """All layers in order, each with arrays of its own."""
        return [block.layer(i) for block in self.blocks for i in range(block.depth)]

    def sites(self) -> dict[str, str]:
        """The sites that some layer shows to a probe, and their axes."""
        layers = [layer for block in self.blocks for layer in block.layers]
        return {site: words for layer in layers for site, words in layer.sites.items()}

    def unstacked(self, *, experts: bool = False) -> "Decoder":
        """The same decoder with each layer's weights as separate arrays; with `experts`, each
        expert's, too.

        Compile time grows with depth, but decoding is much faster, and training on CPUs somewhat,
        since a scan copies each layer's weights before it uses them, and a CPU an expert's.
        """
        block = DecoderBlock(tuple(self.layers()))
        if experts:
            block = jax.tree.map(
                lambda node: node.unstacked() if isinstance(node, Experts) else node,
                block,
                is_leaf=lambda node: isinstance(node, Experts),
            )
        return eqx.tree_at(lambda decoder: decoder.blocks, self, (block,))

    def empty_cache(
        self, batch_shape: tuple[int, ...], capacity: int, *, start: int = 0
    ) -> KVCache:
        """See `Llama4.empty_cache`."""

        def of_block(block: DecoderBlock) -> tuple[PyTree, ...]:
            shape = batch_shape if block.repeats is None else (block.repeats, *batch_shape)
            return tuple(layer.self_attn.empty_cache(shape, capacity) for layer in block.layers)

        return KVCache(
            blocks=tuple(of_block(block) for block in self.blocks),
            start=jnp.full(batch_shape, start, jnp.int32),
            length=jnp.zeros(batch_shape, jnp.int32),
            capacity=capacity,
            stacked=tuple(block.repeats is not None for block in self.blocks),
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
