"""Token positions, and the attention mask that follows from them."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class TokenPositions(eqx.Module):
    """Each token's position in its document, and the document's number within the row (its
    segment); padding and empty cache slots have segment -1, which no query sees.

    `contiguous` is True if it is known at trace time that each row is one unpadded document from
    position 0 on; `one_document` if it is one document from any position on, padded or not.
    """

    positions: Int[Array, "*batch seq"]
    segments: Int[Array, "*batch seq"]
    contiguous: bool = eqx.field(static=True, default=False)
    one_document: bool = eqx.field(static=True, default=False)


def attention_mask(
    queries: TokenPositions, keys: TokenPositions, chunk_size: int | None
) -> Bool[Array, "*batch q_seq kv_seq"]:
    """True where a query attends to a key: one of its own document, not after it and, if
    `chunk_size` is given, in the same chunk of positions (chunks, not a sliding window)."""
    last = queries.positions[..., :, None]
    position, segment = keys.positions[..., None, :], keys.segments[..., None, :]
    mask = (segment == queries.segments[..., :, None]) & (segment >= 0) & (position <= last)
    if chunk_size is not None:
        mask &= position >= last - last % chunk_size
    return mask


def token_positions(
    shape: tuple[int, ...],
    *,
    mask: Bool[Array, "*batch seq"] | None = None,
    segment_ids: Int[Array, "*batch seq"] | None = None,
    positions: Int[Array, "*batch seq"] | None = None,
    start: Int[Array, "*batch"] | None = None,
) -> TokenPositions:
    """The positions of the tokens of a batch of rows.

    `mask` is False at padding. `segment_ids` pack documents into a row: each run of one id is a
    document, negative ids are padding; without them a row is one document. Positions count each
    document's real tokens from 0, but the row's first document from `start`, where a cache holds
    what came before. `positions` overrides the count; without `segment_ids`, a position
    that doesn't rise begins a new document.
    """
    one_document = segment_ids is None and positions is None
    real = jnp.ones(shape, bool) if mask is None else mask
    begins = None
    if segment_ids is not None:
        real &= segment_ids >= 0
        begins = jnp.diff(segment_ids, prepend=segment_ids[..., :1]) != 0
    elif positions is not None:
        begins = _positions_restart(positions, real)
    # Numbered anew: an id that comes back later in the row names another document.
    segments = jnp.zeros(shape, jnp.int32)
    if begins is not None:
        segments = jnp.cumsum(begins, axis=-1, dtype=jnp.int32)
    if positions is None:
        # Unpadded tokens aren't counted: XLA would fold the sum over a constant, for minutes.
        before = jnp.broadcast_to(jnp.arange(shape[-1]), shape)
        if mask is not None or segment_ids is not None:
            before = jnp.cumsum(real, axis=-1, dtype=jnp.int32) - real.astype(jnp.int32)
        first = 0
        if begins is not None:
            first = jax.lax.cummax(jnp.where(begins, before, 0), axis=len(shape) - 1)
        offset = 0 if start is None else jnp.where(first == 0, start[..., None], 0)
        positions = before - first + offset
    return TokenPositions(
        positions=jnp.where(real, positions, 0).astype(jnp.int32),
        segments=jnp.where(real, segments, -1),
        contiguous=one_document and mask is None and start is None,
        one_document=one_document,
    )


def runs_of_chunks(tokens: TokenPositions, chunk_size: int | None) -> Int[Array, "*batch seq"]:
    """A number for each chunk of each document of a row, so that tokens attend to those of the same
    number that aren't after them; -1 for padding. Positions must rise within a document."""
    if chunk_size is None:
        return tokens.segments
    real = tokens.segments >= 0
    segment, chunk = tokens.segments, tokens.positions // chunk_size
    segment_before, chunk_before = (_at_last_real(x, real) for x in (segment, chunk))
    begins = real & ((segment != segment_before) | (chunk != chunk_before))
    return jnp.where(real, jnp.cumsum(begins, axis=-1, dtype=jnp.int32), -1)


def _positions_restart(
    positions: Int[Array, "*batch seq"], real: Bool[Array, "*batch seq"]
) -> Bool[Array, "*batch seq"]:
    """True at real tokens whose position isn't above that of the real token before."""
    return real & (positions <= _at_last_real(positions, real))


def _at_last_real(
    x: Int[Array, "*batch seq"], real: Bool[Array, "*batch seq"]
) -> Int[Array, "*batch seq"]:
    """The value at the last real token before each token; -1 if there is none."""
    axis, index = x.ndim - 1, jnp.arange(x.shape[-1])
    last_real = jax.lax.cummax(jnp.where(real, index, -1), axis=axis)
    before = jnp.concatenate([jnp.full_like(last_real[..., :1], -1), last_real[..., :-1]], axis)
    return jnp.where(before < 0, -1, jnp.take_along_axis(x, jnp.maximum(before, 0), axis=axis))
