"""How likely a model finds given text, without the logits of all tokens at once."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from llama4_eqx.argument_checks import check_type, whole_number
from llama4_eqx.input_checks import TokenIds, token_ids
from llama4_eqx.model import Llama4

# Rows are padded to whole multiples, so that texts of many lengths share few programs.
_BUCKET = 64


class TokenScores(eqx.Module):
    """Of each token, given those before it in its document: the natural logarithm of its
    probability, and whether it is the likeliest. A document's first token and padding get 0 and
    False."""

    logprobs: Float[Array, "*batch seq"]
    is_greedy: Bool[Array, "*batch seq"]


def token_scores(
    model: Llama4, tokens: TokenIds, *, token_block: int = 1024, **forward: Any
) -> TokenScores:
    """The scores of the tokens. Logits exist for about `token_block` tokens at a time, in float32.

    `forward` are keywords of the model's call: `mask`, `segment_ids`, `pixel_values`, `probe` ….
    """
    tokens = token_ids(tokens, model.config.text_config.vocab_size)
    token_block = whole_number("token_block", token_block)
    output = model(tokens, **forward)
    segments = output.token_positions.segments
    hidden = jnp.moveaxis(output.hidden[..., :-1, :], -2, 0)
    labels = jnp.moveaxis(tokens[..., 1:], -1, 0)

    def score(block):
        hidden, labels = (jnp.moveaxis(x, 0, tokens.ndim - 1) for x in block)
        logits = model.unembed(hidden).astype(jnp.float32)
        label_logits = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
        logprobs = label_logits - jax.nn.logsumexp(logits, axis=-1)
        found = logprobs, labels == jnp.argmax(logits, axis=-1)
        return tuple(jnp.moveaxis(x, -1, 0) for x in found)

    scores = _by_blocks(score, (hidden, labels), max(1, token_block // max(1, labels[:1].size)))
    logprobs, is_greedy = (jnp.moveaxis(x, 0, -1) for x in scores)
    follows = (segments[..., 1:] == segments[..., :-1]) & (segments[..., 1:] >= 0)
    first = [(0, 0)] * (tokens.ndim - 1) + [(1, 0)]
    return TokenScores(
        jnp.pad(jnp.where(follows, logprobs, 0), first), jnp.pad(follows & is_greedy, first)
    )


def token_logprobs(
    model: Llama4, tokens: TokenIds, *, token_block: int = 1024, **forward: Any
) -> Float[Array, "*batch seq"]:
    """The log-probability of each token, in nats; see `token_scores`."""
    return token_scores(model, tokens, token_block=token_block, **forward).logprobs


class Loglikelihood(eqx.Module):
    """Of each continuation: the sum of its tokens' log-probabilities, in nats, and whether greedy
    decoding would give it."""

    total: Float[np.ndarray, "texts"]
    is_greedy: Bool[np.ndarray, "texts"]


def loglikelihood(
    model: Llama4,
    contexts: Sequence[Sequence[int] | TokenIds],
    continuations: Sequence[Sequence[int] | TokenIds],
    *,
    batch_size: int = 8,
) -> Loglikelihood:
    """How likely each continuation is after its context, both as lists of token ids.

    Texts of like lengths share a batch, padded on the right. Raises a `ValueError` for an empty
    context, after which nothing has a probability: begin with the tokenizer's first token.
    """
    check_type("model", model, Llama4, "a LoRA runs as lora.merged()")
    batch_size = whole_number("batch_size", batch_size)
    if len(contexts) != len(continuations):
        raise ValueError(
            f"There are {len(contexts)} contexts for {len(continuations)} continuations: "
            "pass one for each."
        )
    vocab = model.config.text_config.vocab_size
    contexts = [_ids(f"Context {i}", text, vocab) for i, text in enumerate(contexts)]
    continuations = [_ids(f"Continuation {i}", text, vocab) for i, text in enumerate(continuations)]
    empty = [i for i, context in enumerate(contexts) if len(context) == 0]
    if empty:
        raise ValueError(
            f"Context {empty[0]} is empty: begin with the tokenizer's first token, such as bos_id."
        )
    texts = [np.concatenate(both) for both in zip(contexts, continuations, strict=True)]
    total, is_greedy = np.zeros(len(texts), np.float32), np.ones(len(texts), bool)
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        width = -(-len(texts[batch[0]]) // _BUCKET) * _BUCKET
        tokens, mask = np.zeros((batch_size, width), np.int32), np.zeros((batch_size, width), bool)
        for row, i in enumerate(batch):
            tokens[row, : len(texts[i])], mask[row, : len(texts[i])] = texts[i], True
        scores = _scores(model, jnp.asarray(tokens), jnp.asarray(mask))
        logprobs, greedy = np.asarray(scores.logprobs), np.asarray(scores.is_greedy)
        for row, i in enumerate(batch):
            part = slice(len(contexts[i]), len(texts[i]))
            total[i], is_greedy[i] = logprobs[row, part].sum(), greedy[row, part].all()
    return Loglikelihood(total, is_greedy)


def _ids(name: str, text: Any, vocab: int) -> Int[np.ndarray, "seq"]:
    """A text's ids, or a `ValueError` that names the text."""
    ids = np.asarray(text)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(
            f"{name} must be a list of token ids, such as a tokenizer's, not {text!r:.60}."
        )
    beyond = ids[(ids < 0) | (ids >= vocab)]
    if beyond.size:
        raise ValueError(f"{name} has token {beyond[0]}, but ids go from 0 to {vocab - 1}.")
    return ids.astype(np.int32)


@eqx.filter_jit
def _scores(
    model: Llama4, tokens: Int[Array, "*batch seq"], mask: Bool[Array, "*batch seq"]
) -> TokenScores:
    return token_scores(model, tokens, mask=mask)


def _by_blocks(function: Any, arrays: tuple[Array, ...], block: int) -> tuple[Array, ...]:
    """`function` of blocks along the first axis, recomputed for a gradient, and what it gives
    joined again."""
    length = len(arrays[0])
    block = min(block, max(1, length))
    padded = tuple(
        jnp.pad(x, [(0, -length % block)] + [(0, 0)] * (x.ndim - 1)).reshape(
            -1, block, *x.shape[1:]
        )
        for x in arrays
    )
    found = lax.map(jax.checkpoint(function), padded)
    return tuple(x.reshape(-1, *x.shape[2:])[:length] for x in found)
