"""The attention of a layer's queries to the keys that it gathered: which form computes it, by what
the call is for."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from llama4_eqx.layers.attention_core import attention
from llama4_eqx.layers.backends import AttentionBackend
from llama4_eqx.layers.cache import KeysValues
from llama4_eqx.layers.collectives import AxisNames, varying_axes
from llama4_eqx.layers.context import Context, Execution
from llama4_eqx.layers.cudnn import fits_cudnn
from llama4_eqx.layers.mask import TokenPositions
from llama4_eqx.layers.platforms import by_platform, may_run_on
from llama4_eqx.layers.ring import ring_attention
from llama4_eqx.layers.splash import fits_splash
from llama4_eqx.layers.splash_after_cache import splash_after_cache

# Bytes of keys and values that a device gathers; more are sent round, which takes no such memory.
MOST_GATHERED = 2**30


class Attended(eqx.Module):
    """The keys that the queries of a call attend to.

    They are sharded along mesh axes `axis_names`; or this device's of a row that is sharded along
    `ring`. `are_own` says that they are the queries' own tokens. `past` has those of a cache from
    before several new tokens.
    """

    keys: KeysValues
    past: KeysValues | None = None
    axis_names: AxisNames = eqx.field(static=True, default=())
    ring: AxisNames = eqx.field(static=True, default=())
    are_own: bool = eqx.field(static=True, default=False)


def attend(
    q: Float[Array, "*batch heads q_seq head_dim"],
    new: KeysValues,
    attended: Attended,
    context: Context,
    *,
    chunk_size: int | None,
    scale: float,
    dropout_rate: float,
    key: PRNGKeyArray | None,
) -> Float[Array, "*batch heads q_seq head_dim"]:
    """`attention` of queries whose own tokens have `new` keys."""
    backend, tokens, keys = context.execution.backends.attention, context.tokens, attended.keys
    settings = {"chunk_size": chunk_size, "scale": scale}
    dropped = {"dropout_rate": dropout_rate, "key": key}
    operands = q, keys.k, keys.v, tokens, keys.tokens
    if attended.ring:
        run = partial(ring_attention, axis_names=attended.ring, **settings, **dropped)
        return _over_one_batch_axis(run, *operands)

    def run(q, k, v, queries, keys, *, own_keys):
        options = {"axis_names": attended.axis_names, "own_keys": own_keys, "backend": backend}
        core = partial(attention, **options, **settings, **dropped)
        return _over_one_batch_axis(core, q, k, v, queries, keys)

    forms: dict[str, Callable[..., Array]] = {"default": partial(run, own_keys=attended.are_own)}
    if (key is not None and dropout_rate > 0) or context.execution.mesh_axes.seq:
        return forms["default"](*operands)  # no kernel drops, or has rows in parts
    if attended.past is not None and _splash_reads_cache(q, new.k, backend):
        merge, cached = partial(splash_after_cache, **settings), (new, attended.past, tokens)
        forms["tpu"] = lambda q, *_: _over_one_batch_axis(merge, q, *cached)
    if not _may_be_plain_rows(q, new.k, tokens, backend):
        return by_platform(*operands, **forms)
    plain = replace(tokens, contiguous=True)
    return lax.cond(
        _are_plain_rows(context),
        lambda: run(q, new.k, new.v, plain, plain, own_keys=True),
        lambda: by_platform(*operands, **forms),
    )


def sends_keys_round(new: KeysValues, execution: Execution) -> bool:
    """Whether keys that other devices need are sent round rather than gathered."""
    backend, axis_names = execution.backends.attention, execution.mesh_axes.seq
    if not axis_names or backend not in (None, "ring"):
        return False
    size = (new.k.nbytes + new.v.nbytes) * lax.axis_size(axis_names)
    return backend == "ring" or size > MOST_GATHERED


def _splash_reads_cache(q: Array, k: Array, backend: AttentionBackend | None) -> bool:
    """Whether it pays to have a form for TPUs that merges what a cache and new tokens give."""
    return backend in (None, "ring") and may_run_on("tpu") and fits_splash(q, k)


def _may_be_plain_rows(
    q: Array, k: Array, tokens: TokenPositions, backend: AttentionBackend | None
) -> bool:
    """Whether it pays to ask `_are_plain_rows` when the program runs."""
    if backend is not None or tokens.contiguous or not tokens.one_document or q.shape[-2] == 1:
        return False
    on_gpu = may_run_on("cuda") and fits_cudnn(q, k) and not varying_axes(q)
    return on_gpu or (may_run_on("tpu") and fits_splash(q, k))


def _are_plain_rows(context: Context) -> Bool[Array, ""]:
    """Whether each row is one document from position 0 on, with padding at its end if anywhere: the
    causal mask alone then keeps real tokens from seeing padding, and there are kernels for it."""
    segments = context.tokens.segments
    plain = jnp.all(segments[..., 1:] <= segments[..., :-1])
    return plain if context.span is None else plain & jnp.all(context.span.old_end == 0)


def _over_one_batch_axis(
    function: Callable[..., Array],
    q: Float[Array, "*batch heads q_seq head_dim"],
    *operands: PyTree,
    **options: object,
) -> Float[Array, "*batch heads q_seq head_dim"]:
    """Calls `function`, whose operands have one batch axis, with any number of them."""
    batch_shape = q.shape[:-3]
    size = math.prod(batch_shape)
    flat = jax.tree.map(
        lambda leaf: leaf.reshape(size, *leaf.shape[len(batch_shape) :]), (q, *operands)
    )
    out = function(*flat, **options)
    return out.reshape(*batch_shape, *out.shape[1:])
