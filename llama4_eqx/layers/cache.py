"""Keys and values of tokens read before.

Each layer's cache is a ring buffer: the token at position p is stored in slot `p % slots`. Global
layers have a slot for every token; chunk-local layers never need more than one chunk. What a slot
holds follows from the positions that a row has reached, so no bookkeeping is stored, padding takes
no room, and rows of different lengths share a batch.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from llama4_eqx.layers.collectives import AxisNames, MeshAxes, match_vma
from llama4_eqx.layers.mask import TokenPositions


class CacheSpan(eqx.Module):
    """Positions held per row, half-open: `[start, old_end)` before this call, `[start, new_end)`
    after it, at most `capacity` of them."""

    start: Int[Array, "*batch"]
    old_end: Int[Array, "*batch"]
    new_end: Int[Array, "*batch"]
    capacity: int = eqx.field(static=True)


class KeysValues(eqx.Module):
    """Keys and values to attend to, and the positions of their tokens."""

    k: Float[Array, "*batch kv_heads kv_seq head_dim"]
    v: Float[Array, "*batch kv_heads kv_seq head_dim"]
    tokens: TokenPositions

    def all_gather(
        self, mesh_axes: MeshAxes, axis_names: AxisNames, *, shared: bool = False
    ) -> "KeysValues":
        """Those of all devices along the mesh axes, in order; see `MeshAxes.all_gather`."""
        k, v = (
            mesh_axes.all_gather(x, axis_names, axis=-2, shared=shared) for x in (self.k, self.v)
        )
        tokens = jax.tree.map(
            lambda x: mesh_axes.all_gather(x, axis_names, axis=-1, shared=shared), self.tokens
        )
        return KeysValues(k, v, tokens)

    def concatenate(self, new: "KeysValues") -> "KeysValues":
        """These, followed by the new ones."""
        old, new = match_vma(self, new)
        k, v = (jnp.concatenate(pair, axis=-2) for pair in ((old.k, new.k), (old.v, new.v)))
        positions, segments = (
            jnp.concatenate(pair, axis=-1)
            for pair in (
                (old.tokens.positions, new.tokens.positions),
                (old.tokens.segments, new.tokens.segments),
            )
        )
        return KeysValues(k, v, TokenPositions(positions, segments))


class LayerCache(eqx.Module):
    """One layer's ring of keys and values. Immutable: `update` returns another.

    Inside `jax.shard_map` the slots may be sharded along mesh axes `axis_names`.
    """

    k: Float[Array, "*batch kv_heads slots head_dim"]
    v: Float[Array, "*batch kv_heads slots head_dim"]

    @classmethod
    def empty(
        cls,
        batch_shape: tuple[int, ...],
        *,
        kv_heads: int,
        slots: int,
        head_dim: int,
        dtype: DTypeLike,
    ) -> "LayerCache":
        """A cache that holds nothing."""
        shape = (*batch_shape, kv_heads, slots, head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    @property
    def slots(self) -> int:
        """Tokens that the ring, or this device's shard of it, can hold."""
        return self.k.shape[-2]

    def update(
        self, new: KeysValues, new_end: Int[Array, "*batch"], axis_names: AxisNames = ()
    ) -> "LayerCache":
        """The cache with the real tokens among `new` stored, up to position `new_end`; only a row's
        newest if they are more than the ring has slots."""
        self, new, new_end, first_slot = match_vma(self, new, new_end, self._first_slot(axis_names))
        total = self._total(axis_names)
        positions = new.tokens.positions
        stored = (new.tokens.segments >= 0) & (positions >= new_end[..., None] - total)
        slot = positions % total - first_slot
        slot = jnp.where(stored & (slot >= 0), slot, self.slots)  # past the end: dropped

        def put(ring, slot, new):
            return ring.at[:, slot].set(new, mode="drop")

        for _ in slot.shape[:-1]:
            put = jax.vmap(put)
        return LayerCache(put(self.k, slot, new.k), put(self.v, slot, new.v))

    def read(
        self, start: Int[Array, "*batch"], end: Int[Array, "*batch"], axis_names: AxisNames = ()
    ) -> KeysValues:
        """What the slots hold in rows that span positions `[start, end)`."""
        start, end, first_slot = match_vma(start, end, self._first_slot(axis_names))
        last = end[..., None] - 1
        slot = first_slot + jnp.arange(self.slots, dtype=last.dtype)
        positions = last - (last - slot) % self._total(axis_names)
        held = positions >= start[..., None]
        segments = jnp.where(held, 0, -1).astype(last.dtype)
        return KeysValues(self.k, self.v, TokenPositions(jnp.where(held, positions, 0), segments))

    def _total(self, axis_names: AxisNames) -> int:
        return self.slots * lax.axis_size(axis_names)

    def _first_slot(self, axis_names: AxisNames) -> Int[Array, ""]:
        first = lax.axis_index(axis_names) * self.slots if axis_names else 0
        return jnp.asarray(first, jnp.int32)


class KVCache(eqx.Module):
    """The caches of all layers, arranged as the decoder's layers are, and each row's length.

    Made by `Llama4.empty_cache`. `start` is the position of a row's first token, `length` the
    number of real tokens read since; a row takes at most `capacity` of them. A layer's cache is a
    `LayerCache`, or whatever its own `SequenceMixer` makes.
    """

    blocks: tuple[tuple[PyTree, ...], ...]
    start: Int[Array, "*batch"]
    length: Int[Array, "*batch"]
    capacity: int = eqx.field(static=True)
