"""Beam search: the most probable continuations that a search of limited width finds."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from llama4_eqx.argument_checks import check_type, whole_number
from llama4_eqx.generation.decoding import decode_step, prefill
from llama4_eqx.generation.failures import (
    Failures,
    failures_of_prompt,
    failures_of_step,
    refuse_failures,
)
from llama4_eqx.generation.request import Request
from llama4_eqx.input_checks import TokenIds, mask_of, token_ids
from llama4_eqx.kv_cache import KVCache
from llama4_eqx.model import Llama4

# Below every score but finite, so that differences and quotients are numbers.
_LOWEST = -1e9


class BeamSearch(eqx.Module):
    """What `beam_search` found of each prompt, the best first: texts that end in a stop id, which
    is repeated to the end, or have `max_new_tokens`. The score is the sum of a text's
    log-probabilities, divided by its length to the power of `length_penalty`."""

    tokens: Int[Array, "*batch beams new"]
    scores: Float[Array, "*batch beams"]


def beam_search(
    model: Llama4,
    tokens: TokenIds,
    *,
    beams: int,
    length_penalty: ArrayLike = 1.0,
    **request: Any,
) -> BeamSearch:
    """The `beams` best continuations that a search with as many beams finds for each prompt.

    `request` are other arguments of `Request`, without sampler, samples and readings of a probe;
    processors see log-probabilities. The search of a row ends when the best unfinished text scores
    below the worst of `beams` finished ones, as `transformers` has it with `early_stopping=False`.
    """
    check_type("model", model, Llama4, "a LoRA runs as lora.merged()")
    beams, asked = whole_number("beams", beams), Request(tokens, **request)
    if asked.samples is not None:
        raise ValueError("beam_search takes no samples: it returns all of its beams.")
    bucketed, room = asked.bucketed(model)
    penalty = jnp.asarray(length_penalty, jnp.float32)
    found, failures = _search(model, bucketed, room, beams, penalty)
    tokens = refuse_failures(found.tokens, failures)
    if room > asked.max_new_tokens:
        tokens = jax.device_put(np.asarray(tokens)[..., : asked.max_new_tokens])
    return eqx.tree_at(lambda found: found.tokens, found, tokens)


class _Beams(eqx.Module):
    """Unfinished texts, the best first, what remembers them, and the finished ones so far."""

    tokens: Int[Array, "*batch beams new"]
    scores: Float[Array, "*batch beams"]
    cache: KVCache
    memory: tuple[PyTree, ...]
    finished: BeamSearch
    is_finished: Bool[Array, "*batch beams"]
    improvable: Bool[Array, "*batch"]
    failures: Failures


@eqx.filter_jit
def _search(
    model: Llama4, request: Request, room: int, beams: int, length_penalty: Float[Array, ""]
) -> tuple[BeamSearch, Failures]:
    tokens = token_ids(request.tokens, model.embed_tokens.shape[0])
    *batch, seq = tokens.shape
    given = mask_of("mask", request.mask, tokens.shape)
    mask = jnp.ones(tokens.shape, bool) if given is None else given
    cache = request.cache
    if cache is None:
        cache = model.empty_cache(tuple(batch), seq + room - 1)
    images = {"pixel_values": request.pixel_values, "image_embeddings": request.image_embeddings}
    logits, cache = prefill(model, tokens, cache, mask=given, probe=request.probe, **images)

    def copies(x: Array) -> Array:
        return jnp.repeat(x[..., None, :], beams, axis=-2)

    memory = tuple(
        processor.init(copies(tokens), copies(mask), vocab=logits.shape[-1], max_new_tokens=room)
        for processor in request.processors
    )
    nothing = jnp.zeros((*batch, beams, room), jnp.int32)
    lowest = jnp.full((*batch, beams), _LOWEST, jnp.float32)
    state = _Beams(
        tokens=nothing,
        # All beams are equal at first: the others don't count.
        scores=jnp.where(jnp.arange(beams) == 0, 0.0, lowest),
        cache=cache.repeat(beams),
        memory=memory,
        finished=BeamSearch(nothing, lowest),
        is_finished=jnp.zeros((*batch, beams), bool),
        improvable=jnp.ones(batch, bool),
        failures=failures_of_prompt(mask),
    )
    state = _extended(request, state, copies(logits), jnp.asarray(0), length_penalty)

    def unfinished(carry):
        i, state = carry
        return (i < request.max_new_tokens) & jnp.any(state.improvable)

    def step(carry):
        i, state = carry
        newest = lax.dynamic_index_in_dim(state.tokens, i - 1, axis=-1, keepdims=False)
        logits, cache = decode_step(model, newest, state.cache, request.probe)
        state = eqx.tree_at(lambda state: state.cache, state, cache)
        return i + 1, _extended(request, state, logits, i, length_penalty)

    _, state = lax.while_loop(unfinished, step, (jnp.asarray(1), state))
    return state.finished, state.failures


def _extended(
    request: Request,
    state: _Beams,
    logits: Float[Array, "*batch beams vocab"],
    i: Int[Array, ""],
    length_penalty: Float[Array, ""],
) -> _Beams:
    """The beams with token number i."""
    beams, vocab = logits.shape[-2:]
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    for processor, memory in zip(request.processors, state.memory, strict=True):
        logprobs = processor(logprobs, memory)
    scores = jnp.maximum(state.scores[..., None] + logprobs, 2 * _LOWEST)
    scores, logits = (lax.collapse(x, x.ndim - 2) for x in (scores, logits))
    nothing_yet = state.improvable & ~jnp.any(state.is_finished, axis=-1)
    allowed = jnp.where(scores > _LOWEST, scores, -jnp.inf)
    failures = state.failures | failures_of_step(logits, allowed, nothing_yet)
    # Enough that, if some end, as many beams as before go on.
    count = min(max(2, 1 + len(request.stop_ids)) * beams, beams * vocab)
    scores, index = lax.top_k(scores, count)
    parent, token = index // vocab, index % vocab
    new = (jnp.arange(state.tokens.shape[-1]) >= i)[None, :]
    tokens = jnp.where(new, token[..., None], _of_beams(state.tokens, parent))
    ends = request.is_stop(token) | (i + 1 >= request.max_new_tokens)

    _, best = lax.top_k(jnp.where(ends, scores + _LOWEST, scores), beams)
    running = jnp.where(_of_beams(ends, best), _LOWEST, _of_beams(scores, best))
    best_parent, best_token = _of_beams(parent, best), _of_beams(token, best)

    # Only one of the best few counts as a finished text.
    finishes = ends & (jnp.arange(count) < beams) & state.improvable[..., None]
    final = jnp.where(finishes, scores / (i + 1.0) ** length_penalty, _LOWEST)
    all_scores = jnp.concatenate([state.finished.scores, final], axis=-1)
    all_tokens = jnp.concatenate([state.finished.tokens, tokens], axis=-2)
    all_finished = jnp.concatenate([state.is_finished, finishes], axis=-1)
    finished_scores, of_all = lax.top_k(all_scores, beams)
    is_finished = _of_beams(all_finished, of_all)
    worst = jnp.where(is_finished, finished_scores[..., -1:], _LOWEST)
    possible = running[..., :1] / (i + 1.0) ** length_penalty
    return _Beams(
        tokens=_of_beams(tokens, best),
        scores=running,
        cache=state.cache.take(best_parent),
        memory=tuple(
            processor.update(jax.tree.map(lambda x: _of_beams(x, best_parent), memory), best_token)
            for processor, memory in zip(request.processors, state.memory, strict=True)
        ),
        finished=BeamSearch(_of_beams(all_tokens, of_all), finished_scores),
        is_finished=is_finished,
        improvable=state.improvable & jnp.any(possible > worst, axis=-1),
        failures=failures,
    )


def _of_beams(x: Array, beams: Int[Array, "*batch new"]) -> Array:
    """The values of these beams: an axis of them follows those of the batch."""
    index = beams.reshape(*beams.shape, *[1] * (x.ndim - beams.ndim))
    return jnp.take_along_axis(x, index, axis=beams.ndim - 1)
