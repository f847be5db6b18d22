"""From a prompt to text: prefill, single steps, and the whole loop on the device."""

from collections.abc import Iterator, Sequence
from typing import cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from llama4_eqx.layers.cache import KVCache
from llama4_eqx.model import Llama4
from llama4_eqx.sampling import Greedy, Sampler


@eqx.filter_jit
def prefill(
    model: Llama4,
    tokens: Int[Array, "*batch seq"],
    cache: KVCache,
    *,
    mask: Bool[Array, "*batch seq"] | None = None,
    pixel_values: Float[Array, "tiles channels height width"] | None = None,
    image_embeddings: Float[Array, "tiles image_tokens hidden"] | None = None,
) -> tuple[Float[Array, "*batch vocab"], KVCache]:
    """Reads a prompt or its next piece: the logits after each row's last token, and the cache.

    `mask` is True at real tokens, on whichever side the padding is. A long prompt may come in
    pieces, each with the cache that the last one returned and with the images of its own tokens. Of
    a row without a real token the logits mean nothing.
    """
    hidden, longer, _ = model.hidden_states(
        tokens,
        mask=mask,
        pixel_values=pixel_values,
        image_embeddings=image_embeddings,
        cache=cache,
    )
    if mask is None:
        last = hidden[..., -1, :]
    else:
        seq = tokens.shape[-1]
        index = seq - 1 - jnp.argmax(mask[..., ::-1], axis=-1)
        last = jnp.take_along_axis(hidden, index[..., None, None], axis=-2)[..., 0, :]
    return model.unembed(last), cast(KVCache, longer)


@eqx.filter_jit
def decode_step(
    model: Llama4, token: Int[Array, "*batch"], cache: KVCache
) -> tuple[Float[Array, "*batch vocab"], KVCache]:
    """Reads one token a row: the logits of the next, and the cache."""
    output = model(token[..., None], cache=cache)
    return output.logits[..., 0, :], cast(KVCache, output.cache)


def generate(
    model: Llama4,
    tokens: Int[Array, "*batch seq"],
    *,
    max_new_tokens: int,
    mask: Bool[Array, "*batch seq"] | None = None,
    pixel_values: Float[Array, "tiles channels height width"] | None = None,
    image_embeddings: Float[Array, "tiles image_tokens hidden"] | None = None,
    sampler: Sampler = Greedy(),
    key: PRNGKeyArray | None = None,
    stop_ids: Sequence[int] = (),
) -> Int[Array, "*batch new"]:
    """The continuation of each prompt, `max_new_tokens` long.

    Compiled once for each shape; the loop runs on the device and ends early when every row has met
    one of the `stop_ids`. A stopped row repeats its stop id to the end. Prompts of different
    lengths share a batch with a `mask`. `key` is needed by samplers that draw. On a CPU, pass
    `model.unstacked()`.
    """
    _check_request(max_new_tokens, sampler, key)
    key = jax.random.key(0) if key is None else key
    prompt = _Prompt(tokens, mask, pixel_values, image_embeddings)
    return _generate(model, prompt, max_new_tokens, sampler, key, tuple(stop_ids))


def stream(
    model: Llama4,
    tokens: Int[Array, "*batch seq"],
    *,
    max_new_tokens: int,
    mask: Bool[Array, "*batch seq"] | None = None,
    pixel_values: Float[Array, "tiles channels height width"] | None = None,
    image_embeddings: Float[Array, "tiles image_tokens hidden"] | None = None,
    sampler: Sampler = Greedy(),
    key: PRNGKeyArray | None = None,
    stop_ids: Sequence[int] = (),
) -> Iterator[Int[Array, "*batch"]]:
    """The tokens of `generate`, each as soon as it is known; ends when every row has stopped."""
    _check_request(max_new_tokens, sampler, key)
    key = jax.random.key(0) if key is None else key
    prompt = _Prompt(tokens, mask, pixel_values, image_embeddings)
    state, cache = _begin(model, prompt, max_new_tokens, sampler, key, tuple(stop_ids))
    for left in range(max_new_tokens - 1, -1, -1):
        yield state.token
        if left == 0 or bool(jnp.all(state.stopped)):
            return
        state, cache = _advance_in_place((model, state, sampler, tuple(stop_ids)), cache)


class _Prompt(eqx.Module):
    tokens: Int[Array, "*batch seq"]
    mask: Bool[Array, "*batch seq"] | None
    pixel_values: Float[Array, "tiles channels height width"] | None
    image_embeddings: Float[Array, "tiles image_tokens hidden"] | None


class _State(eqx.Module):
    """One moment of generation: the newest token of each row, not yet read."""

    token: Int[Array, "*batch"]
    stopped: Bool[Array, "*batch"]
    key: PRNGKeyArray


@eqx.filter_jit
def _begin(
    model: Llama4,
    prompt: _Prompt,
    max_new_tokens: int,
    sampler: Sampler,
    key: PRNGKeyArray,
    stop_ids: tuple[int, ...],
) -> tuple[_State, KVCache]:
    *batch_shape, seq = prompt.tokens.shape
    # The last new token is never read, so it needs no room.
    cache = model.empty_cache(tuple(batch_shape), seq + max_new_tokens - 1)
    logits, cache = prefill(
        model,
        prompt.tokens,
        cache,
        mask=prompt.mask,
        pixel_values=prompt.pixel_values,
        image_embeddings=prompt.image_embeddings,
    )
    sample_key, key = jax.random.split(key)
    token = sampler(logits, sample_key)
    return _State(token, _is_stop(token, stop_ids), key), cache


def _advance(
    model: Llama4, state: _State, sampler: Sampler, stop_ids: tuple[int, ...], cache: KVCache
) -> tuple[_State, KVCache]:
    logits, cache = decode_step(model, state.token, cache)
    sample_key, key = jax.random.split(state.key)
    token = jnp.where(state.stopped, state.token, sampler(logits, sample_key))
    return _State(token, state.stopped | _is_stop(token, stop_ids), key), cache


@eqx.filter_jit(donate="all-except-first")
def _advance_in_place(
    kept: tuple[Llama4, _State, Sampler, tuple[int, ...]], cache: KVCache
) -> tuple[_State, KVCache]:
    return _advance(*kept, cache)


@eqx.filter_jit
def _generate(
    model: Llama4,
    prompt: _Prompt,
    max_new_tokens: int,
    sampler: Sampler,
    key: PRNGKeyArray,
    stop_ids: tuple[int, ...],
) -> Int[Array, "*batch new"]:
    state, cache = _begin(model, prompt, max_new_tokens, sampler, key, stop_ids)
    new = jnp.broadcast_to(state.token[..., None], (*state.token.shape, max_new_tokens))

    def unfinished(carry):
        i, state, _, _ = carry
        return (i < max_new_tokens) & ~jnp.all(state.stopped)

    def step(carry):
        i, state, cache, new = carry
        state, cache = _advance(model, state, sampler, stop_ids, cache)
        # From i to the end, so that a loop that ends early leaves each row's stop id repeated.
        new = jnp.where(jnp.arange(max_new_tokens) >= i, state.token[..., None], new)
        return i + 1, state, cache, new

    return lax.while_loop(unfinished, step, (1, state, cache, new))[-1]


def _is_stop(token: Int[Array, "*batch"], stop_ids: tuple[int, ...]) -> Bool[Array, "*batch"]:
    return jnp.isin(token, jnp.asarray(stop_ids, token.dtype))


def _check_request(max_new_tokens: int, sampler: Sampler, key: PRNGKeyArray | None) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, but is {max_new_tokens}.")
    if key is None and not isinstance(sampler, Greedy):
        raise ValueError(
            f"{type(sampler).__name__} draws at random: pass key=jax.random.key(seed)."
        )
