"""Keys and values of the tokens that a model has already read.

Each layer's cache is a ring: a token at position p lies in slot `p % slots`. Global layers have a
slot for every token; chunk-local ones never need more than one chunk. What a slot holds follows
from the positions that a row has reached, so no bookkeeping is stored, padding takes no room, and
rows of different lengths share a batch.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from llama4_eqx.layers.across import Across, Axes, alike
from llama4_eqx.layers.mask import Places


class Filled(eqx.Module):
    """The positions of which a row's cache has been told: from `first` up to, not including,
    `before` this call's tokens and `after` them."""

    first: Int[Array, "*batch"]
    before: Int[Array, "*batch"]
    after: Int[Array, "*batch"]


class Keys(eqx.Module):
    """What queries attend to: keys and values, and where their tokens stand."""

    k: Float[Array, "*batch kv_heads kv_seq head_dim"]
    v: Float[Array, "*batch kv_heads kv_seq head_dim"]
    places: Places

    def gathered(self, across: Across, axes: Axes, *, shared: bool = False) -> "Keys":
        """Those of all devices along the mesh axes, in order."""
        k, v = (across.gathered(x, axes, axis=-2, shared=shared) for x in (self.k, self.v))
        places = jax.tree.map(
            lambda x: across.gathered(x, axes, axis=-1, shared=shared), self.places
        )
        return Keys(k, v, places)

    def followed_by(self, new: "Keys") -> "Keys":
        old, new = alike(self, new)
        k, v = (jnp.concatenate(pair, axis=-2) for pair in ((old.k, new.k), (old.v, new.v)))
        places = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=-1), old.places, new.places)
        return Keys(k, v, places)


class LayerCache(eqx.Module):
    """One layer's keys and values. Immutable: `append` returns another.

    Inside `jax.shard_map` its slots may be cut along mesh axes `cut`; each device has its part.
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
        shape = (*batch_shape, kv_heads, slots, head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    @property
    def slots(self) -> int:
        return self.k.shape[-2]

    def append(self, new: Keys, after: Int[Array, "*batch"], cut: Axes = ()) -> "LayerCache":
        """Stores the real tokens among these, the newest of a row where they are more than all
        slots; a row has then been told positions up to `after`."""
        self, new, after, first_slot = alike(self, new, after, self._first_slot(cut))
        positions = new.places.positions
        stored = (new.places.segments >= 0) & (positions >= after[..., None] - self._total(cut))
        slot = positions % self._total(cut) - first_slot
        slot = jnp.where(stored & (slot >= 0), slot, self.slots)  # past the end: dropped

        def put(ring, slot, new):
            return ring.at[:, slot].set(new, mode="drop")

        for _ in slot.shape[:-1]:
            put = jax.vmap(put)
        return LayerCache(put(self.k, slot, new.k), put(self.v, slot, new.v))

    def keys(self, first: Int[Array, "*batch"], end: Int[Array, "*batch"], cut: Axes = ()) -> Keys:
        """What the slots hold in rows that have been told positions `first` up to `end`."""
        first, end, first_slot = alike(first, end, self._first_slot(cut))
        last = end[..., None] - 1
        slot = first_slot + jnp.arange(self.slots, dtype=last.dtype)
        positions = last - (last - slot) % self._total(cut)
        held = positions >= first[..., None]
        segments = jnp.where(held, 0, -1).astype(last.dtype)
        return Keys(self.k, self.v, Places(jnp.where(held, positions, 0), segments))

    def _total(self, cut: Axes) -> int:
        return self.slots * lax.axis_size(cut)

    def _first_slot(self, cut: Axes) -> Int[Array, ""]:
        return jnp.asarray(lax.axis_index(cut) * self.slots if cut else 0, jnp.int32)


class KVCache(eqx.Module):
    """Every layer's cache, in the decoder's own shape, and how far each row has come.

    Made by `Llama4.empty_cache`. `start` is the position of a row's first token, `length` the
    number of real tokens read since; a row takes at most `capacity` of them.
    """

    blocks: tuple[LayerCache, ...]
    tail: tuple[LayerCache, ...]
    start: Int[Array, "*batch"]
    length: Int[Array, "*batch"]
    capacity: int = eqx.field(static=True)
