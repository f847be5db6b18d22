"""From a prompt to new tokens: prefill, single steps, and the whole loop on the device."""

import operator
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from llama4_eqx.generation.sampling import Greedy, Sampler
from llama4_eqx.input_checks import TokenIds, token_ids
from llama4_eqx.layers.cache import KVCache
from llama4_eqx.layers.probe import Probe
from llama4_eqx.model import Llama4
from llama4_eqx.run_time_checks import refuse_if

P = ParamSpec("P")
T = TypeVar("T")


@eqx.filter_jit
def prefill(
    model: Llama4, tokens: TokenIds, cache: KVCache, **forward: Any
) -> tuple[Float[Array, "*batch vocab"], KVCache]:
    """Reads a prompt or its next part: the logits after each row's last token, and the cache.

    `forward` are keywords of the model's call: `mask`, `pixel_values`, `image_embeddings`, `probe`,
    of which only edits have an effect here. A long
    prompt may be read in parts, each with the cache that the last call returned and the images of
    its own tokens. The logits of a row without a real token are meaningless.
    """
    output = model(tokens, cache=cache, **forward)
    mask = forward.get("mask")
    if mask is None:
        last = output.hidden[..., -1, :]
    else:
        index = mask.shape[-1] - 1 - jnp.argmax(mask[..., ::-1], axis=-1)
        last = jnp.take_along_axis(output.hidden, index[..., None, None], axis=-2)[..., 0, :]
    return model.unembed(last), cast(KVCache, output.cache)


@eqx.filter_jit
def decode_step(
    model: Llama4, token: Int[Array, "*batch"], cache: KVCache, probe: Probe | None = None
) -> tuple[Float[Array, "*batch vocab"], KVCache]:
    """Reads one token of each row: the logits of the next, and the cache. A probe's edits apply."""
    output = model(token[..., None], cache=cache, probe=probe)
    return output.logits[..., 0, :], cast(KVCache, output.cache)


def _as_stop_ids(stop_ids: Any) -> tuple[int, ...]:
    if stop_ids is None:
        return ()
    ids = [stop_ids] if np.ndim(stop_ids) == 0 else stop_ids
    return tuple(operator.index(i) for i in ids)


class Request(eqx.Module):
    """What to continue, and how: the arguments of `generate` and `stream`.

    `mask` (True at real tokens, padding on any side) lets prompts of different lengths share a
    batch; `pixel_values` or `image_embeddings` are those of the model's call. Generation ends when
    every row has met one of the `stop_ids`. Samplers that draw need a `key`. The edits of a `probe`
    apply to the prompt and to each step: write them as an `Edit`, since each new plain function is
    compiled anew.
    """

    tokens: TokenIds
    _: KW_ONLY
    max_new_tokens: int = eqx.field(converter=operator.index)
    mask: Bool[Array, "*batch seq"] | None = None
    pixel_values: Float[Array, "tiles channels height width"] | None = None
    image_embeddings: Float[Array, "tiles image_tokens hidden"] | None = None
    sampler: Sampler = Greedy()
    key: PRNGKeyArray | None = None
    stop_ids: tuple[int, ...] = eqx.field(default=(), converter=_as_stop_ids)
    probe: Probe | None = None

    def __check_init__(self) -> None:
        if np.shape(self.tokens)[-1:] == (0,):
            raise ValueError("A prompt needs at least one token.")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, but is {self.max_new_tokens}.")
        if self.key is None and not isinstance(self.sampler, Greedy):
            raise ValueError(
                f"{type(self.sampler).__name__} draws at random: pass key=jax.random.key(seed)."
            )

    def is_stop(self, token: Int[Array, "*batch"]) -> Bool[Array, "*batch"]:
        """Whether each token is one of the stop ids."""
        return jnp.isin(token, jnp.asarray(self.stop_ids, token.dtype))


def _with_request(
    run: Callable[[Llama4, Request], T], request: Callable[P, Request] = Request
) -> Callable[Concatenate[Llama4, P], T]:
    """`run(model, request)` as a function of the model and the request's arguments."""

    @wraps(run)
    def call(model: Llama4, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return run(model, request(*args, **kwargs))

    return call


@_with_request
def generate(model: Llama4, request: Request) -> Int[Array, "*batch new"]:
    """The continuation of each prompt, `max_new_tokens` long: `generate(model, tokens,
    max_new_tokens=100)`, with the arguments of `Request`.

    Compiled once for each shape; the loop runs on the device. A row that has stopped repeats its
    stop id to the end. On a CPU, pass `model.unstacked()`.
    """
    new, all_numbers = _generate(model, request)
    return _with_numbers(new, all_numbers)


@_with_request
def stream(model: Llama4, request: Request) -> Iterator[Int[Array, "*batch"]]:
    """Yields the tokens of `generate` one step at a time, until every row has stopped."""
    state, cache = _begin(model, request)
    for left in range(request.max_new_tokens - 1, -1, -1):
        yield _with_numbers(state.token, state.all_numbers)
        if left == 0 or bool(jnp.all(state.stopped)):
            return
        state, cache = _advance_in_place((model, request, state), cache)


class _State(eqx.Module):
    """One moment of generation: each row's newest token, which the model hasn't read yet."""

    token: Int[Array, "*batch"]
    stopped: Bool[Array, "*batch"]
    all_numbers: Bool[Array, ""]  # no logit so far was NaN
    key: PRNGKeyArray


def _with_numbers(
    tokens: Int[Array, "*batch"], all_numbers: Bool[Array, ""]
) -> Int[Array, "*batch"]:
    """The tokens, or an error where they were chosen among logits that aren't numbers."""
    sentence = "The model's logits are NaN: its weights or its input are damaged."
    if isinstance(all_numbers, Tracer):
        return tokens + refuse_if(~all_numbers, sentence)
    if not bool(all_numbers):
        raise ValueError(sentence)
    return tokens


@eqx.filter_jit
def _begin(model: Llama4, request: Request) -> tuple[_State, KVCache]:
    tokens = token_ids(request.tokens, model.embed_tokens.shape[0])
    *batch_shape, seq = tokens.shape
    # The last new token is never read, so it needs no room.
    cache = model.empty_cache(tuple(batch_shape), seq + request.max_new_tokens - 1)
    logits, cache = prefill(
        model,
        tokens,
        cache,
        mask=request.mask,
        pixel_values=request.pixel_values,
        image_embeddings=request.image_embeddings,
        probe=request.probe,
    )
    key = jax.random.key(0) if request.key is None else request.key
    sample_key, key = jax.random.split(key)
    token = request.sampler(logits, sample_key)
    return _State(token, request.is_stop(token), ~jnp.any(jnp.isnan(logits)), key), cache


def _advance(
    model: Llama4, request: Request, state: _State, cache: KVCache
) -> tuple[_State, KVCache]:
    logits, cache = decode_step(model, state.token, cache, request.probe)
    sample_key, key = jax.random.split(state.key)
    token = jnp.where(state.stopped, state.token, request.sampler(logits, sample_key))
    all_numbers = state.all_numbers & ~jnp.any(jnp.isnan(logits))
    return _State(token, state.stopped | request.is_stop(token), all_numbers, key), cache


@eqx.filter_jit(donate="all-except-first")
def _advance_in_place(
    not_donated: tuple[Llama4, Request, _State], cache: KVCache
) -> tuple[_State, KVCache]:
    return _advance(*not_donated, cache)


@eqx.filter_jit
def _generate(model: Llama4, request: Request) -> tuple[Int[Array, "*batch new"], Bool[Array, ""]]:
    state, cache = _begin(model, request)
    steps = request.max_new_tokens
    new = jnp.broadcast_to(state.token[..., None], (*state.token.shape, steps))

    def unfinished(carry):
        i, state, _, _ = carry
        return (i < steps) & ~jnp.all(state.stopped)

    def step(carry):
        i, state, cache, new = carry
        state, cache = _advance(model, request, state, cache)
        # From i to the end, so that a loop that ends early leaves each row's stop id repeated.
        new = jnp.where(jnp.arange(steps) >= i, state.token[..., None], new)
        return i + 1, state, cache, new

    _, state, _, new = lax.while_loop(unfinished, step, (1, state, cache, new))
    return new, state.all_numbers
