"""One layer's keys and values of tokens read before.

They are in a ring buffer: the token at position p is stored in slot `p % slots`. Global layers
have a slot for every token; chunk-local layers never need more than one chunk. What a slot holds
follows from the positions that a row has reached, so no bookkeeping is stored, padding takes no
room, and rows of different lengths share a batch.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from llama4_eqx.layers.collectives import AxisNames, MeshAxes, match_vma
from llama4_eqx.layers.mask import TokenPositions
from llama4_eqx.layers.platforms import by_platform
from llama4_eqx.layers.quantized import LARGEST


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
        if not axis_names:
            return self
        k, v = (
            mesh_axes.all_gather(x, axis_names, axis=-2, shared=shared) for x in (self.k, self.v)
        )
        tokens = jax.tree.map(
            lambda x: mesh_axes.all_gather(x, axis_names, axis=-1, shared=shared), self.tokens
        )
        return KeysValues(k, v, tokens)

    def before(self, end: Int[Array, "*batch"]) -> "KeysValues":
        """These, with all from position `end` on marked as empty."""
        positions = self.tokens.positions
        segments = jnp.where(positions < end[..., None], self.tokens.segments, -1)
        return KeysValues(self.k, self.v, TokenPositions(positions, segments))

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

    Those of few bits have a scale for each token and head. Inside `jax.shard_map` the slots may be
    sharded along mesh axes `axis_names`.
    """

    k: Num[Array, "*batch kv_heads slots head_dim"]
    v: Num[Array, "*batch kv_heads slots head_dim"]
    k_scale: Float[Array, "*batch kv_heads slots"] | None = None
    v_scale: Float[Array, "*batch kv_heads slots"] | None = None

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

    def quantized(self, dtype: DTypeLike) -> "LayerCache":
        """The same keys and values in int8 or float8."""
        (k, k_scale), (v, v_scale) = (_rounded(x, dtype) for x in (self.k, self.v))
        return LayerCache(k, v, k_scale, v_scale)

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
        stored = LayerCache(new.k, new.v)
        if self.k_scale is not None:
            stored = stored.quantized(self.k.dtype)
        if slot.shape[-1] > 1:
            return _put(self, slot, stored)
        return by_platform(self, slot, stored, cpu=_put_one_in_place, default=_put)

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
        k, v = _scaled(self.k, self.k_scale), _scaled(self.v, self.v_scale)
        return KeysValues(k, v, TokenPositions(jnp.where(held, positions, 0), segments))

    def _total(self, axis_names: AxisNames) -> int:
        return self.slots * lax.axis_size(axis_names)

    def _first_slot(self, axis_names: AxisNames) -> Int[Array, ""]:
        first = lax.axis_index(axis_names) * self.slots if axis_names else 0
        return jnp.asarray(first, jnp.int32)


def _put(rings: LayerCache, slot: Int[Array, "*batch seq"], new: LayerCache) -> LayerCache:
    """The rings with new keys and values in these slots; those past the end are dropped."""

    def put(ring: Array, slot: Array, new: Array) -> Array:
        return ring.at[:, slot].set(new, mode="drop")

    for _ in slot.shape[:-1]:
        put = jax.vmap(put)
    return jax.tree.map(lambda ring, new: put(ring, slot, new), rings, new)


def _put_one_in_place(
    rings: LayerCache, slot: Int[Array, "*batch seq"], new: LayerCache
) -> LayerCache:
    """`_put` of one token, and of a second one that is dropped.

    XLA's CPU compiler takes a single write for a slice, computes it anew wherever the ring is read
    or returned, and copies the ring for each. Two writes it makes in place.
    """
    past_the_end = jnp.full_like(slot, rings.slots)
    axis = slot.ndim  # that of tokens, after the heads
    return _put(
        rings,
        jnp.concatenate([slot, past_the_end], axis=-1),
        jax.tree.map(lambda x: jnp.concatenate([x, x], axis=axis), new),
    )


def _rounded(
    x: Float[Array, "*shape head_dim"], dtype: DTypeLike
) -> tuple[Num[Array, "*shape head_dim"], Float[Array, "*shape"]]:
    """Numbers of few bits, and their scales in the dtype that they stand for."""
    top = LARGEST[jnp.dtype(dtype).name]
    largest = jnp.max(jnp.abs(x), axis=-1).astype(jnp.float32)
    scale = jnp.where(largest == 0, 1, largest / top).astype(x.dtype)
    numbers = jnp.clip(x.astype(jnp.float32) / scale[..., None].astype(jnp.float32), -top, top)
    numbers = jnp.round(numbers) if jnp.issubdtype(dtype, jnp.integer) else numbers
    return numbers.astype(dtype), scale


def _scaled(
    numbers: Num[Array, "*shape head_dim"], scale: Float[Array, "*shape"] | None
) -> Float[Array, "*shape head_dim"]:
    return numbers if scale is None else numbers.astype(scale.dtype) * scale[..., None]
