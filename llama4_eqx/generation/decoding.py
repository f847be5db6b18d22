"""From a prompt to new tokens: prefill, single steps, and the whole loop on the device."""

from collections.abc import Iterator
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from llama4_eqx.generation.failures import (
    Failures,
    failures_of_prompt,
    failures_of_step,
    refuse_failures,
)
from llama4_eqx.generation.request import Request, with_request
from llama4_eqx.input_checks import TokenIds, mask_of, token_ids
from llama4_eqx.kv_cache import KVCache
from llama4_eqx.layers.probe import Probe
from llama4_eqx.layers.sites import Readings
from llama4_eqx.model import Llama4, Output


@eqx.filter_jit
def prefill(
    model: Llama4, tokens: TokenIds, cache: KVCache, **forward: Any
) -> tuple[Float[Array, "*batch vocab"], KVCache]:
    """Reads a prompt or its next part: the logits after each row's last token, and the cache.

    `forward` are keywords of the model's call: `mask`, `pixel_values`, `image_embeddings`, `probe`,
    of which only edits have an effect here. A long prompt may be read in parts, each with the cache
    that the last call returned and the images of its own tokens. The logits of a row without a real
    token are meaningless.
    """
    output = model(tokens, cache=cache, **forward)
    mask = mask_of("mask", forward.get("mask"), np.shape(tokens))
    return _last_logits(model, output, mask), cast(KVCache, output.cache)


@eqx.filter_jit
def decode_step(
    model: Llama4, token: Int[ArrayLike, "*batch"], cache: KVCache, probe: Probe | None = None
) -> tuple[Float[Array, "*batch vocab"], KVCache]:
    """Reads one token of each row: the logits of the next, and the cache. A probe's edits apply."""
    output = model(jnp.asarray(token)[..., None], cache=cache, probe=probe)
    return output.logits[..., 0, :], cast(KVCache, output.cache)


class Generation(eqx.Module):
    """What `generate_output` returns. `*batch` ends in an axis of samples if they were asked for.

    `tokens` are those of `generate`; of each row the first `lengths` are new, with the stop id.
    `logprobs` are the natural logarithms of the probabilities that the model gave them, before
    processors and sampler; 0 after a row's end. `readings` have what the probe read of the prompt
    and of each new token but the last, which the model hasn't read, joined along `seq`: zeros for
    the rows' last steps if all of them ended early. `cache` holds the same tokens, and the repeated
    stop ids of rows that ended before others.
    """

    tokens: Int[Array, "*batch new"]
    lengths: Int[Array, "*batch"]
    logprobs: Float[Array, "*batch new"]
    readings: Readings
    cache: KVCache


@with_request
def generate(model: Llama4, request: Request) -> Int[Array, "*batch new"]:
    """The continuation of each prompt, `max_new_tokens` long: `generate(model, tokens,
    max_new_tokens=100)`, with the arguments of `Request`.

    The loop runs on the device. It is compiled for the batch's shape and for lengths rounded up, so
    that prompts of all lengths share a few programs. A row that has stopped repeats its stop id to
    the end. Pass `model.unstacked()`, or on a CPU `model.unstacked(experts=True)`: it is faster.
    """
    return _generation(model, request).tokens


@with_request
def generate_output(model: Llama4, request: Request) -> Generation:
    """`generate`, and with the tokens how probable each was, what the probe read, and the cache."""
    return _generation(model, request)


@with_request
def stream(model: Llama4, request: Request) -> Iterator[Int[Array, "*batch"]]:
    """Yields the tokens of `generate` one step at a time, until every row has stopped."""
    bucketed, room = request.bucketed(model)
    state, cache, _ = _begin(model, bucketed, room)
    for left in range(request.max_new_tokens - 1, -1, -1):
        yield refuse_failures(state.token, state.failures)
        if left == 0 or bool(jnp.all(state.stopped)):
            return
        state, cache = _advance_in_place((model, bucketed, state), cache)


class _State(eqx.Module):
    """One moment of generation: each row's newest token, which the model hasn't read yet."""

    token: Int[Array, "*batch"]
    logprob: Float[Array, "*batch"]
    stopped: Bool[Array, "*batch"]
    failures: Failures
    memory: tuple[PyTree, ...]  # the processors' states
    key: PRNGKeyArray


def _last_logits(
    model: Llama4, output: Output, mask: Bool[ArrayLike, "*batch seq"] | None
) -> Float[Array, "*batch vocab"]:
    """The logits after each row's last real token."""
    if mask is None:
        return model.unembed(output.hidden[..., -1, :])
    index = output.hidden.shape[-2] - 1 - jnp.argmax(jnp.flip(mask, axis=-1), axis=-1)
    return model.unembed(jnp.take_along_axis(output.hidden, index[..., None, None], -2)[..., 0, :])


@eqx.filter_jit
def _begin(model: Llama4, request: Request, room: int) -> tuple[_State, KVCache, Readings]:
    """The state after the prompt, its cache with room for the new tokens, and what was read."""
    tokens = token_ids(request.tokens, model.embed_tokens.shape[0])
    *batch_shape, seq = tokens.shape
    mask, cache = mask_of("mask", request.mask, tokens.shape), request.cache
    if cache is None:  # the last new token is never read, so it needs no room
        cache = model.empty_cache(tuple(batch_shape), seq + room - 1)
    output = model(
        tokens,
        cache=cache,
        mask=mask,
        pixel_values=request.pixel_values,
        image_embeddings=request.image_embeddings,
        probe=request.probe,
    )
    logits = _last_logits(model, output, mask)
    cache, readings = cast(KVCache, output.cache), output.readings
    mask = jnp.ones(tokens.shape, bool) if mask is None else mask
    if request.samples is not None:
        logits, tokens, mask = (_copies(x, request.samples, -1) for x in (logits, tokens, mask))
        cache = cache.repeat(request.samples)
        readings = {
            site: _copies(x, request.samples, axis)
            for (site, x), axis in zip(readings.items(), _seq_axes(model, readings), strict=True)
        }
    memory = tuple(
        processor.init(tokens, mask, vocab=logits.shape[-1], max_new_tokens=room)
        for processor in request.processors
    )
    key = jax.random.key(0) if request.key is None else request.key
    nothing = _State(
        token=jnp.zeros(logits.shape[:-1], jnp.int32),
        logprob=jnp.zeros(logits.shape[:-1]),
        stopped=jnp.zeros(logits.shape[:-1], bool),
        failures=failures_of_prompt(mask),
        memory=memory,
        key=key,
    )
    return _choose(request, nothing, logits), cache, readings


def _choose(request: Request, old: _State, logits: Float[Array, "*batch vocab"]) -> _State:
    """The state with each row's next token; rows that have stopped repeat their last."""
    allowed = logits
    for processor, memory in zip(request.processors, old.memory, strict=True):
        allowed = processor(allowed.astype(jnp.float32), memory)
    sample_key, key = jax.random.split(old.key)
    token = jnp.where(old.stopped, old.token, request.sampler(allowed, sample_key))
    probabilities = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    logprob = jnp.take_along_axis(probabilities, token[..., None], axis=-1)[..., 0]
    return _State(
        token=token,
        logprob=jnp.where(old.stopped, 0, logprob),
        stopped=old.stopped | request.is_stop(token),
        failures=old.failures | failures_of_step(logits, allowed, ~old.stopped),
        memory=tuple(
            processor.update(memory, token)
            for processor, memory in zip(request.processors, old.memory, strict=True)
        ),
        key=key,
    )


def _advance(
    model: Llama4, request: Request, state: _State, cache: KVCache
) -> tuple[_State, KVCache, Readings]:
    output = model(state.token[..., None], cache=cache, probe=request.probe)
    state = _choose(request, state, output.logits[..., 0, :])
    return state, cast(KVCache, output.cache), output.readings


@eqx.filter_jit(donate="all-except-first")
def _advance_in_place(
    not_donated: tuple[Llama4, Request, _State], cache: KVCache
) -> tuple[_State, KVCache]:
    return _advance(*not_donated, cache)[:2]


def _generation(model: Llama4, request: Request) -> Generation:
    bucketed, room = request.bucketed(model)
    found, failures = _generate(model, bucketed, room)
    tokens, asked = refuse_failures(found.tokens, failures), request.max_new_tokens
    readings, logprobs = found.readings, found.logprobs
    if room > asked:  # cut in NumPy: JAX would compile a slice of each length
        tokens, logprobs = (jax.device_put(np.asarray(x)[..., :asked]) for x in (tokens, logprobs))
        axes = _seq_axes(model, readings)
        for (site, x), axis in zip(readings.items(), axes, strict=True):
            x = np.asarray(x)
            end = x.shape[axis] - (room - asked)
            readings[site] = jax.device_put(np.moveaxis(np.moveaxis(x, axis, 0)[:end], 0, axis))
    return Generation(tokens, found.lengths, logprobs, readings, found.cache)


@eqx.filter_jit
def _generate(model: Llama4, request: Request, room: int) -> tuple[Generation, Failures]:
    state, cache, readings = _begin(model, request, room)
    axes = dict(zip(readings, _seq_axes(model, readings), strict=True))
    seq = {site: x.shape[axes[site]] for site, x in readings.items()}
    readings = {
        site: _padded(x, room - 1, axes[site]) if room > 1 else x for site, x in readings.items()
    }
    steps = jnp.arange(room)
    tokens = jnp.broadcast_to(state.token[..., None], (*state.token.shape, room))
    logprobs = jnp.where(steps == 0, state.logprob[..., None], 0)
    lengths = jnp.ones(state.token.shape, jnp.int32)

    def unfinished(carry):
        i, state, *_ = carry
        return (i < request.max_new_tokens) & ~jnp.all(state.stopped)

    def step(carry):
        i, state, cache, tokens, logprobs, lengths, readings = carry
        lengths += (~state.stopped).astype(jnp.int32)
        state, cache, read = _advance(model, request, state, cache)
        # From i to the end, so that a loop that ends early leaves each row's stop id repeated.
        tokens = jnp.where(steps >= i, state.token[..., None], tokens)
        logprobs = jnp.where(steps == i, state.logprob[..., None], logprobs)
        readings = {
            site: lax.dynamic_update_slice_in_dim(
                x, read[site], seq[site] + i - 1, x.ndim + axes[site]
            )
            for site, x in readings.items()
        }
        return i + 1, state, cache, tokens, logprobs, lengths, readings

    carry = (1, state, cache, tokens, logprobs, lengths, readings)
    _, state, cache, tokens, logprobs, lengths, readings = lax.while_loop(unfinished, step, carry)
    return Generation(tokens, lengths, logprobs, readings, cache), state.failures


def _seq_axes(model: Llama4, readings: Readings) -> list[int]:
    """The axis of tokens of each reading, counted from the end."""
    sites = model.sites()
    axes = []
    for site in readings:
        words = sites[site].split()
        if words[:2] != ["*batch", "seq"]:
            raise ValueError(
                f"What {site!r} shows, {sites[site]!r}, can't be joined over the steps of a "
                "generation: read it in a forward call of the whole text."
            )
        axes.append(1 - len(words))
    return axes


def _copies(x: Array, copies: int, axis: int) -> Array:
    """The array with a new axis of copies before `axis`, which is counted from the end."""
    x = jnp.expand_dims(x, x.ndim + axis)
    return jnp.repeat(x, copies, axis=axis - 1)


def _padded(x: Array, end: int, axis: int) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, end)
    return jnp.pad(x, widths)
