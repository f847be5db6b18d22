"""Keys and values of the tokens that a model has already read.

Each layer's cache is a ring: a token at position p lies in slot `p % slots`. Global layers have a
slot for every token; chunk-local ones never need more than one chunk. What a slot holds follows
from the positions that a row has reached, so no bookkeeping is stored, padding takes no room, and
rows of different lengths share a batch.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from llama4_eqx.layers.mask import Places


class Filled(eqx.Module):
    """The positions of which a row's cache has been told: from `first` up to, not including,
    `before` this call's tokens and `after` them."""

    first: Int[Array, "*batch"]
    before: Int[Array, "*batch"]
    after: Int[Array, "*batch"]


class LayerCache(eqx.Module):
    """One layer's keys and values. Immutable: `append` returns another."""

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

    def append(
        self,
        k: Float[Array, "*batch kv_heads seq head_dim"],
        v: Float[Array, "*batch kv_heads seq head_dim"],
        places: Places,
        after: Int[Array, "*batch"],
    ) -> "LayerCache":
        """Stores the real tokens among these, the newest `slots` of a row where they are more."""
        newest = places.positions >= after[..., None] - self.slots
        stored = newest & (places.segments >= 0)
        slot = jnp.where(stored, places.positions % self.slots, self.slots)  # past the end: dropped

        def put(ring, slot, new):
            return ring.at[:, slot].set(new, mode="drop")

        for _ in slot.shape[:-1]:
            put = jax.vmap(put)
        return type(self)(put(self.k, slot, k), put(self.v, slot, v))

    def places(self, first: Int[Array, "*batch"], end: Int[Array, "*batch"]) -> Places:
        """Which token each slot holds, in rows that have been told positions `first` up to
        `end`."""
        last = end[..., None] - 1
        positions = last - (last - jnp.arange(self.slots, dtype=last.dtype)) % self.slots
        held = positions >= first[..., None]
        return Places(jnp.where(held, positions, 0), jnp.where(held, 0, -1).astype(last.dtype))


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
