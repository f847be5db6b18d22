"""Where tokens stand, and who sees whom."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Places(eqx.Module):
    """Where each token stands: its position in its own document and which document that is;
    padding and empty cache slots are in document -1, which nobody sees.

    `in_order` says that a row is known, while tracing, to be one document from position 0 on."""

    positions: Int[Array, "*batch seq"]
    segments: Int[Array, "*batch seq"]
    in_order: bool = eqx.field(static=True, default=False)


def visible(
    queries: Places, keys: Places, chunk_size: int | None
) -> Bool[Array, "*batch q_seq kv_seq"]:
    """Whether each query sees each key: one of its own document, not after it and, if
    `chunk_size` is given, in the same chunk of positions (chunks, not a sliding window)."""
    last = queries.positions[..., :, None]
    position, segment = keys.positions[..., None, :], keys.segments[..., None, :]
    seen = (segment == queries.segments[..., :, None]) & (segment >= 0) & (position <= last)
    if chunk_size is not None:
        seen &= position >= last - last % chunk_size
    return seen


def places(
    shape: tuple[int, ...],
    *,
    mask: Bool[Array, "*batch seq"] | None = None,
    segment_ids: Int[Array, "*batch seq"] | None = None,
    positions: Int[Array, "*batch seq"] | None = None,
    start: Int[Array, "*batch"] | None = None,
) -> Places:
    """Places the tokens of rows of text.

    `mask` is False at padding. `segment_ids` pack documents into a row: each run of one id is a
    document, negative ids are padding; without them a row is one document. Positions count the
    real tokens of each document from 0, those of a row's first one from `start` (where a cache
    holds what came before). Given `positions` are taken as they are.
    """
    in_order = all(given is None for given in (mask, segment_ids, positions, start))
    real = jnp.ones(shape, bool) if mask is None else mask
    turns = jnp.zeros(shape, bool)
    if segment_ids is not None:
        real &= segment_ids >= 0
        turns = jnp.diff(segment_ids, prepend=segment_ids[..., :1]) != 0
    # Numbered anew: an id that comes back later in the row names another document.
    segments = jnp.cumsum(turns, axis=-1, dtype=jnp.int32)
    if positions is None:
        count = real.astype(jnp.int32)
        before = jnp.cumsum(count, axis=-1) - count
        first = jax.lax.cummax(jnp.where(turns, before, 0), axis=len(shape) - 1)
        resumed = 0 if start is None else jnp.where(first == 0, start[..., None], 0)
        positions = before - first + resumed
    return Places(
        positions=jnp.where(real, positions, 0).astype(jnp.int32),
        segments=jnp.where(real, segments, -1),
        in_order=in_order,
    )
