"""Successive layers of the decoder, run one after another: plain, or stacked and scanned."""

from collections.abc import Hashable, Sequence
from functools import partial
from itertools import takewhile

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from llama4_eqx.decoder_layer import DecoderLayer
from llama4_eqx.layers.collectives import MeshAxes
from llama4_eqx.layers.context import Context
from llama4_eqx.layers.lowrank import merged
from llama4_eqx.layers.moe import experts_weights
from llama4_eqx.layers.probe import LayerNumber, Probe
from llama4_eqx.layers.remat import RematPolicy, rematerialise
from llama4_eqx.layers.scanned import ScannedWeight
from llama4_eqx.layers.sites import NO_SITES, Readings, Sites, in_layer_order

_Caches = tuple[PyTree, ...] | None


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
        probe, context = context.execution.sites.probe, context.with_sites(NO_SITES)
        numbers = range(first_layer, first_layer + self.depth) if probe.edit else None
        if self.repeats is None:
            x, caches, cycle = _run_cycle(
                self.layers, x, context, caches, probe, numbers, remat, key
            )
            return x, caches, in_layer_order(jax.tree.map(lambda value: value[None], cycle))
        run_cycles = _run_cycles if probe.has_functions else _run_cycles_jit
        return run_cycles(self, x, context, caches, probe, numbers, remat, key)


def _run_cycles(
    block: DecoderBlock,
    x: Float[Array, "*batch seq hidden"],
    context: Context,
    caches: _Caches,
    probe: Probe,
    numbers: range | None,
    remat: RematPolicy,
    key: PRNGKeyArray | None,
) -> tuple[Float[Array, "*batch seq hidden"], _Caches, Readings]:
    repeats = block.depth // len(block.layers)
    arrays, static = eqx.partition(block.layers, eqx.is_array)
    # To read a few tokens, experts stay in their stack, of which a step would copy all.
    decodes = caches is not None and context.execution.mesh_axes == MeshAxes()
    stacks, arrays = eqx.partition(arrays, experts_weights(block.layers) if decodes else False)
    keys = None if key is None else jax.random.split(key, repeats)
    of_cycle = None if numbers is None else jnp.reshape(jnp.asarray(numbers), (repeats, -1))

    # Caches are carried, and so updated in place; as outputs of the scan they'd be copied.
    def step(carry, repeat):
        (x, caches), (i, arrays, numbers, key) = carry, repeat
        experts = jax.tree.map(lambda stack: ScannedWeight(stack, i), stacks)
        layers = eqx.combine(arrays, static, experts)
        old = jax.tree.map(lambda all: all[i], caches)
        x, new, cycle = _run_cycle(layers, x, context, old, probe, numbers, remat, key)
        return (x, jax.tree.map(lambda all, one: all.at[i].set(one), caches, new)), cycle

    xs = jnp.arange(repeats), arrays, of_cycle, keys
    (x, caches), cycle = lax.scan(step, (x, caches), xs)
    return x, caches, in_layer_order(cycle)


def _run_cycle(
    layers: tuple[DecoderLayer, ...],
    x: Float[Array, "*batch seq hidden"],
    context: Context,
    caches: _Caches,
    probe: Probe,
    numbers: Sequence[int] | Int[Array, "layers"] | None,
    remat: RematPolicy,
    key: PRNGKeyArray | None,
) -> tuple[Float[Array, "*batch seq hidden"], _Caches, list[Readings]]:
    keys = [None] * len(layers) if key is None else jax.random.split(key, len(layers))
    run_layer = _run_layer if probe.edit else _run_layer_jit
    new_caches, readings = [], []
    for i, layer in enumerate(layers):
        cache = None if caches is None else caches[i]
        number = None if numbers is None else numbers[i]
        x, cache, read = run_layer(layer, x, context, cache, probe, number, remat, keys[i])
        new_caches.append(cache)
        readings.append(read)
    return x, None if caches is None else tuple(new_caches), readings


def _run_layer(
    layer: DecoderLayer,
    x: Float[Array, "*batch seq hidden"],
    context: Context,
    cache: PyTree | None,
    probe: Probe,
    number: LayerNumber | None,
    remat: RematPolicy,
    key: PRNGKeyArray | None,
) -> tuple[Float[Array, "*batch seq hidden"], PyTree | None, Readings]:
    mesh_axes = context.execution.mesh_axes

    @partial(rematerialise, policy=remat)
    def run(layer, x, cache, key):
        layer = merged(mesh_axes.gather_params(layer))
        sites = Sites(probe, layer.sites, layer=number, mesh_axes=mesh_axes)
        x, cache, router_logits = layer(x, context.with_sites(sites), cache, key=key)
        if router_logits is not None:
            sites.readings["router_logits"] = router_logits
        return x, cache, sites.readings

    return run(layer, x, cache, key)


# Equal layers are traced once for all calls, and if there is no `jit` around a call compiled once.
# But a function that edits has to be called each time.
_run_cycles_jit, _run_layer_jit = eqx.filter_jit(_run_cycles), eqx.filter_jit(_run_layer)


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
