"""The cache of a whole model: each layer's own, and how far each row has read."""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Int, PyTree

from llama4_eqx.argument_checks import dtype_name
from llama4_eqx.layers.cache import CacheSpan, LayerCache
from llama4_eqx.layers.mask import TokenPositions, token_positions
from llama4_eqx.run_time_checks import refuse_if

# Of caches of few bits.
_DTYPES = ("int8", "float8_e4m3fn")


class KVCache(eqx.Module):
    """The caches of all layers, arranged as the decoder's layers are, and each row's length.

    Made by `Llama4.empty_cache`. `start` is the position of a row's first token, `length` the
    number of real tokens read since; a row takes at most `capacity` of them. A layer's cache is a
    `LayerCache`, or whatever its own `SequenceMixer` makes. `stacked` says which blocks have a
    leading axis of layers.

    A cache is a value: to keep a prefix for several continuations, keep the cache.
    """

    blocks: tuple[tuple[PyTree, ...], ...]
    start: Int[Array, "*batch"]
    length: Int[Array, "*batch"]
    capacity: int = eqx.field(static=True)
    stacked: tuple[bool, ...] = eqx.field(static=True)

    def quantized(self, dtype: DTypeLike = jnp.int8) -> "KVCache":
        """The cache with its keys and values in int8 or float8, each token's with a scale for each
        head; what is stored later is rounded, too. Other layers' caches stay as they are."""
        if dtype_name(dtype) not in _DTYPES:
            raise ValueError(f"A cache can be {' or '.join(_DTYPES)}, not {dtype_name(dtype)}.")
        if self.dtype is not None:
            raise ValueError(f"The cache is {self.dtype} already.")

        def convert(layer: PyTree) -> PyTree:
            return layer.quantized(dtype) if isinstance(layer, LayerCache) else layer

        blocks = tuple(tuple(map(convert, block)) for block in self.blocks)
        return KVCache(blocks, self.start, self.length, self.capacity, self.stacked)

    @property
    def dtype(self) -> str | None:
        """That of the numbers of a cache of few bits, else None."""
        layers = (layer for block in self.blocks for layer in block)
        few = (layer for layer in layers if getattr(layer, "k_scale", None) is not None)
        return next((jnp.dtype(layer.k.dtype).name for layer in few), None)

    def check_fits(self, empty: "KVCache") -> None:
        """Refuses a cache that isn't of the arrays of a model's `empty` one."""
        if jax.tree.structure(empty) != jax.tree.structure(self) or any(
            a.shape != b.shape
            for a, b in zip(jax.tree.leaves(empty), jax.tree.leaves(self), strict=True)
        ):
            raise ValueError(
                "The cache was made for another model: use this model's empty_cache (that of its "
                "unstacked() form differs, too)."
            )

    def extended(
        self, shape: tuple[int, ...], mask: Bool[Array, "*batch seq"] | None
    ) -> tuple[TokenPositions, CacheSpan, "KVCache"]:
        """The positions of tokens of that shape which continue the cache, the span of positions
        before and after them, and the cache with their number added to its lengths."""
        if self.length.shape != shape[:-1]:
            raise ValueError(
                f"The cache was made for the batch shape {self.length.shape}, but the tokens have "
                f"{shape[:-1]}."
            )
        old_end = self.start + self.length
        placed = token_positions(shape, mask=mask, start=old_end)
        length = self.length + jnp.sum(placed.segments >= 0, axis=-1, dtype=jnp.int32)
        length += refuse_if(
            jnp.any(length > self.capacity),
            f"The cache holds {self.capacity} tokens of a row, and a row would need more: make it "
            "larger with model.empty_cache(batch_shape, capacity).",
        )
        span = CacheSpan(self.start, old_end, self.start + length, self.capacity)
        return placed, span, eqx.tree_at(lambda cache: cache.length, self, length)

    def take(self, rows: Sequence[int] | Int[ArrayLike, "... new"]) -> "KVCache":
        """The cache of these rows, which may repeat: numbers along the last batch axis, for each
        index of the batch axes before it."""
        rows = jnp.asarray(rows)
        batch_shape = self.length.shape
        if not batch_shape or rows.shape[:-1] != batch_shape[:-1]:
            raise ValueError(
                f"rows of shape {rows.shape} don't choose along the last axis of a batch of shape "
                f"{batch_shape}: pass integers of shape {(*batch_shape[:-1], 'new')}."
            )

        def take(x: Array, lead: int) -> Array:
            index = rows.reshape((1,) * lead + rows.shape + (1,) * (x.ndim - lead - rows.ndim))
            return jnp.take_along_axis(x, index, axis=lead + rows.ndim - 1, mode="clip")

        return self._map(take)

    def repeat(self, copies: int) -> "KVCache":
        """The cache with `copies` of each row, along a new last batch axis."""
        axis = self.length.ndim

        def repeat(x: Array, lead: int) -> Array:
            x = jnp.expand_dims(x, lead + axis)
            shape = (*x.shape[: lead + axis], copies, *x.shape[lead + axis + 1 :])
            return jnp.broadcast_to(x, shape)

        return self._map(repeat)

    def rewind(self, length: Int[ArrayLike, "*batch"]) -> "KVCache":
        """The cache when its rows had only the first `length` of their tokens.

        A chunk-local layer holds one chunk. So this refuses at run time to go back into an earlier
        chunk, except to the position where a chunk begins; and always where a layer's cache isn't a
        `LayerCache`.
        """
        length = jnp.broadcast_to(jnp.asarray(length, jnp.int32), self.length.shape)
        end, new_end = self.start + self.length, self.start + length
        lost = jnp.zeros(self.length.shape, bool)
        for layer in (layer for block in self.blocks for layer in block):
            if not isinstance(layer, LayerCache):
                raise ValueError(
                    f"A layer's {type(layer).__name__} can't be rewound: prefill the text anew."
                )
            # A ring of fewer slots than the capacity is one chunk long.
            chunk_begins = new_end - new_end % layer.slots
            needed = jnp.maximum(chunk_begins, self.start)
            lost |= (needed < new_end) & (needed < end - layer.slots)
        wrong = jnp.any((length < 0) | (length > self.length))
        length += refuse_if(wrong, "rewind takes a length from 0 to the cache's own.")
        length += refuse_if(
            jnp.any(lost),
            "A chunk-local layer no longer holds the chunk to go back to: prefill the text anew.",
        )
        return eqx.tree_at(lambda cache: cache.length, self, length)

    def _map(self, function: Callable[[Array, int], Array]) -> "KVCache":
        """`function(array, lead)` of all arrays, `lead` being the number of axes before batch."""
        blocks = tuple(
            jax.tree.map(lambda x, lead=int(stacked): function(x, lead), block)
            for block, stacked in zip(self.blocks, self.stacked, strict=True)
        )
        start, length = function(self.start, 0), function(self.length, 0)
        return KVCache(blocks, start, length, self.capacity, self.stacked)
