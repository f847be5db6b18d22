"""The stack of decoder layers: a repeating cycle, stacked and scanned, and the layers left over."""

from collections.abc import Hashable, Sequence
from functools import partial
from itertools import takewhile

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from llama4_eqx.decoder_layer import DecoderLayer
from llama4_eqx.kv_cache import KVCache
from llama4_eqx.layers.collectives import MeshAxes
from llama4_eqx.layers.context import Context
from llama4_eqx.layers.lowrank import merged
from llama4_eqx.layers.moe import Experts, experts_weights
from llama4_eqx.layers.norm import RMSNorm
from llama4_eqx.layers.probe import LayerNumber
from llama4_eqx.layers.remat import RematPolicy, rematerialise
from llama4_eqx.layers.rope import RotaryEmbedding
from llama4_eqx.layers.scanned import ScannedWeight
from llama4_eqx.layers.sites import Readings, concatenated, in_layer_order
from llama4_eqx.text_config import TextConfig


class DecoderBlock(eqx.Module):
    """Successive layers: a cycle of them whose leaves are stacked along a leading `layers` axis and
    run by `lax.scan`, so that compile time doesn't grow with depth; or, if `repeats` is None, plain
    layers run once."""

    layers: tuple[DecoderLayer, ...]
    repeats: int | None = eqx.field(static=True, default=None)

    @property
    def depth(self) -> int:
        """The number of layers, with all repeats."""
        return len(self.layers) * (1 if self.repeats is None else self.repeats)

    def layer(self, number: int) -> DecoderLayer:
        """One of the layers, counted from the block's first, with arrays of its own."""
        repeat, i = divmod(number, len(self.layers))
        if self.repeats is None:
            return self.layers[i]
        return jax.tree.map(lambda leaf: leaf[repeat], self.layers[i])

    def __call__(
        self,
        x: Float[Array, "*batch seq hidden"],
        context: Context,
        caches: tuple[PyTree, ...] | None = None,
        *,
        first_layer: int = 0,
        remat: RematPolicy = "dots",
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "*batch seq hidden"], tuple[PyTree, ...] | None, Readings]:
        """The last layer's output, each layer's cache, and what is read of the layers, the router's
        logits always. `first_layer` is the number of the block's first layer."""
        if self.repeats is None:
            x, caches, cycle = self._run_cycle(
                self.layers, x, context, caches, first_layer=first_layer, remat=remat, key=key
            )
            return x, caches, in_layer_order(jax.tree.map(lambda value: value[None], cycle))
        arrays, static = eqx.partition(self.layers, eqx.is_array)
        # To read a few tokens, experts stay in their stack, of which a step would copy all.
        decodes = caches is not None and context.execution.mesh_axes == MeshAxes()
        stacks, arrays = eqx.partition(arrays, experts_weights(self.layers) if decodes else False)
        keys = None if key is None else jax.random.split(key, self.repeats)
        probe = context.execution.sites.probe

        # Caches are carried, and so updated in place; as outputs of the scan they'd be copied.
        def step(carry, repeat):
            (x, caches), (i, arrays, key) = carry, repeat
            experts = jax.tree.map(lambda stack: ScannedWeight(stack, i), stacks)
            x, new, cycle = self._run_cycle(
                eqx.combine(arrays, static, experts),
                x,
                context,
                jax.tree.map(lambda all: all[i], caches),
                first_layer=first_layer + i * len(self.layers) if probe.edit else 0,
                remat=remat,
                key=key,
            )
            return (x, jax.tree.map(lambda all, one: all.at[i].set(one), caches, new)), cycle

        repeats = jnp.arange(self.repeats), arrays, keys
        (x, caches), cycle = lax.scan(step, (x, caches), repeats)
        return x, caches, in_layer_order(cycle)

    def _run_cycle(
        self,
        layers: tuple[DecoderLayer, ...],
        x: Float[Array, "*batch seq hidden"],
        context: Context,
        caches: tuple[PyTree, ...] | None,
        *,
        first_layer: LayerNumber,
        remat: RematPolicy,
        key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "*batch seq hidden"], tuple[PyTree, ...] | None, list[Readings]]:
        keys = [None] * len(layers) if key is None else jax.random.split(key, len(layers))
        mesh_axes = context.execution.mesh_axes
        new_caches, readings = [], []

        @partial(rematerialise, policy=remat)
        def run(layer, x, cache, key, i):
            layer = merged(mesh_axes.gather_params(layer))
            sites = context.execution.sites.of_layer(first_layer + i, layer.sites, mesh_axes)
            x, cache, router_logits = layer(x, context.with_sites(sites), cache, key=key)
            if router_logits is not None:
                sites.readings["router_logits"] = router_logits
            return x, cache, sites.readings

        for i, layer in enumerate(layers):
            cache = None if caches is None else caches[i]
            x, cache, read = run(layer, x, cache, keys[i], i)
            new_caches.append(cache)
            readings.append(read)
        return x, None if caches is None else tuple(new_caches), readings


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


def stacked(layers: Sequence[DecoderLayer]) -> tuple[DecoderBlock, ...]:
    """Blocks of the layers, in order: wherever a cycle of layers repeats, they are stacked.

    Layers repeat others that have the same modules, settings and shapes.
    """
    kinds = [_kind(layer) for layer in layers]
    blocks: list[DecoderBlock] = []
    single: list[DecoderLayer] = []
    start = 0
    while start < len(layers):
        cycle, repeats = _longest_run(kinds[start:])
        if repeats == 1:
            single.append(layers[start])
            start += 1
            continue
        if single:
            blocks.append(DecoderBlock(tuple(single)))
            single = []
        positions = [layers[start + i : start + cycle * repeats : cycle] for i in range(cycle)]
        stacks = tuple(jax.tree.map(lambda *leaves: jnp.stack(leaves), *each) for each in positions)
        blocks.append(DecoderBlock(stacks, repeats))
        start += cycle * repeats
    return (*blocks, DecoderBlock(tuple(single))) if single else tuple(blocks)


def _kind(layer: DecoderLayer) -> Hashable:
    arrays, static = eqx.partition(layer, eqx.is_array)
    shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(arrays))
    return jax.tree.structure(arrays), shapes, tuple(jax.tree.leaves(static))


def _longest_run(kinds: Sequence[Hashable]) -> tuple[int, int]:
    """The cycle and repeats, at the beginning, that cover most; of those the smallest cycle."""

    def repeats(cycle: int) -> int:
        same = takewhile(lambda i: kinds[i] == kinds[i - cycle], range(cycle, len(kinds)))
        return 1 + sum(1 for _ in same) // cycle

    runs = [(cycle * repeats(cycle), cycle) for cycle in range(1, len(kinds) // 2 + 1)]
    covered, cycle = max(
        (run for run in runs if run[0] > run[1]), key=lambda run: (run[0], -run[1]), default=(1, 1)
    )
    return cycle, covered // cycle


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
