"""How a cache is sharded on a mesh: by the axis words of what each layer keeps."""

import math
from typing import Any

import equinox as eqx
import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from llama4_eqx.axes import axis_words, leaf_name
from llama4_eqx.decoder import Decoder
from llama4_eqx.kv_cache import KVCache
from llama4_eqx.layers.collectives import AxisNames, MeshAxes


def common_slots(cache: KVCache) -> int:
    """The greatest common divisor of all caches' slots."""
    words = axis_words(cache.blocks)
    return math.gcd(
        *(
            leaf.shape[axis - len(words[leaf_name(path)])]
            for path, leaf in jax.tree_util.tree_leaves_with_path(cache.blocks)
            for axis, word in enumerate(words[leaf_name(path)])
            if word == "slots"
        )
    )


def cache_specs(
    decoder: Decoder, cache: KVCache, lead: tuple[AxisNames | None, ...], mesh_axes: MeshAxes
) -> Any:
    """By the axis words of the caches: a layer's begins with the batch, after the repeats of a
    stacked block."""
    words, of_row = axis_words(cache.blocks), P(*lead[:-1])
    sharded = {"heads": mesh_axes.heads, "kv_heads": mesh_axes.heads, "slots": mesh_axes.slots}

    def spec(path: Any, leaf: Array, repeats: int | None) -> P:
        stack = [] if repeats is None else [None]
        inner = leaf.ndim - len(stack) - len(of_row)
        ends = words[leaf_name(path)][-inner:] if inner else ()
        return P(*stack, *of_row, *(sharded.get(word) or None for word in ends))

    repeats = [block.repeats for block in decoder.blocks]
    blocks = jax.tree_util.tree_map_with_path(
        lambda path, leaf: spec(path, leaf, repeats[path[0].idx]), cache.blocks
    )
    return eqx.tree_at(lambda c: (c.blocks, c.start, c.length), cache, (blocks, of_row, of_row))
