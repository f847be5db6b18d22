"""Where tokens stand, and who sees whom."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Places(eqx.Module):
    """Where each token stands: its position in its own document and which document that is;
    padding and empty cache slots are in document -1, which nobody sees."""

    positions: Int[Array, "*batch seq"]
    segments: Int[Array, "*batch seq"]


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

    `mask` is False at padding, and so are `segment_ids` negative; each other id names one
    unbroken run of tokens, a document (without ids a row is one document, 0). Positions count the
    real tokens of each document from 0, those of a row's first document from `start`: what its
    earlier tokens, now in a cache, have reached. Given `positions` are taken as they are.
    """
    real = jnp.ones(shape, bool) if mask is None else mask
    segments = jnp.zeros(shape, jnp.int32)
    if segment_ids is not None:
        segments = segment_ids.astype(jnp.int32)
        real &= segments >= 0
    if positions is None:
        before = jnp.cumsum(real, axis=-1, dtype=jnp.int32) - real.astype(jnp.int32)
        turns = segments != jnp.roll(segments, 1, axis=-1)
        # Before a row's first real token nothing was counted, so this leaves the first document.
        first = jax.lax.cummax(jnp.where(turns, before, 0), axis=len(shape) - 1)
        resumed = 0 if start is None else jnp.where(first == 0, start[..., None], 0)
        positions = before - first + resumed
    return Places(
        positions=jnp.where(real, positions, 0).astype(jnp.int32),
        segments=jnp.where(real, segments, -1),
    )
