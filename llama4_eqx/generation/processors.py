"""Logits processors: penalties, bans and constraints, some of which remember what was written.

They are applied in order, before the sampler. The state of each is a pytree that travels through
the loop, so a processor is a pure function of it.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from llama4_eqx.argument_checks import whole_number

Logits = Float[Array, "*batch vocab"]
Tokens = Int[Array, "*batch seq"]
Mask = Bool[Array, "*batch seq"]
NewTokens = Int[Array, "*batch"]
# States of processors: which tokens a row has, how often, how many so far, and its whole text.
Seen = Bool[Array, "*batch vocab"]
Counts = Int[Array, "*batch vocab"]
Steps = Int[Array, "*batch"]
TextAndSteps = tuple[Int[Array, "*batch size"], Steps]


class LogitsProcessor(eqx.Module):
    """Changes the logits that a token is chosen from. Write your own by subclassing: one without
    memory only needs `__call__`."""

    def init(self, tokens: Tokens, mask: Mask, *, vocab: int, max_new_tokens: int) -> PyTree:
        """The state after the prompt, of whose `tokens` those in `mask` are real; its arrays begin
        with `*batch`. At most `max_new_tokens` will follow."""
        return None

    @abstractmethod
    def __call__(self, logits: Logits, state: PyTree) -> Logits:
        """The logits of the next token, -inf where it is forbidden."""

    def update(self, state: PyTree, token: NewTokens) -> PyTree:
        """The state after one more token of each row."""
        return state


class RepetitionPenalty(LogitsProcessor):
    """Divides the positive logits of tokens in the prompt or the continuation by `penalty`, and
    multiplies negative ones: above 1 it discourages repetition (https://arxiv.org/abs/1909.05858).
    """

    penalty: ArrayLike

    def __check_init__(self) -> None:
        _check_penalty(self, lambda penalty: penalty > 0, "a positive number")

    def init(self, tokens: Tokens, mask: Mask, *, vocab: int, max_new_tokens: int) -> Seen:
        return _counts(tokens, mask, vocab) > 0

    def __call__(self, logits: Logits, state: Seen) -> Logits:
        penalty = jnp.asarray(self.penalty, logits.dtype)
        return jnp.where(state, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)

    def update(self, state: Seen, token: NewTokens) -> Seen:
        return state | _one_hot(token, state.shape[-1])


class PresencePenalty(LogitsProcessor):
    """Subtracts `penalty` from the logits of tokens that the continuation has; the prompt's don't
    count."""

    penalty: ArrayLike

    def __check_init__(self) -> None:
        _check_penalty(self, lambda penalty: True, "a number")

    def init(self, tokens: Tokens, mask: Mask, *, vocab: int, max_new_tokens: int) -> Counts:
        return jnp.zeros((*tokens.shape[:-1], vocab), jnp.int32)

    def __call__(self, logits: Logits, state: Counts) -> Logits:
        return logits - jnp.asarray(self.penalty, logits.dtype) * (state > 0).astype(logits.dtype)

    def update(self, state: Counts, token: NewTokens) -> Counts:
        return state + _one_hot(token, state.shape[-1]).astype(state.dtype)


class FrequencyPenalty(PresencePenalty):
    """Subtracts `penalty` for each time that the continuation has the token; the prompt's don't
    count."""

    def __call__(self, logits: Logits, state: Counts) -> Logits:
        return logits - jnp.asarray(self.penalty, logits.dtype) * state.astype(logits.dtype)


class BannedTokens(LogitsProcessor):
    """Never chooses one of `token_ids`."""

    token_ids: tuple[int, ...] = eqx.field(static=True, converter=lambda ids: _as_ids(ids, least=0))

    def __call__(self, logits: Logits, state: None) -> Logits:
        _check_ids("BannedTokens", self.token_ids, logits.shape[-1])
        return logits.at[..., np.asarray(self.token_ids, np.int32)].set(-jnp.inf)


class ForcedTokens(LogitsProcessor):
    """Begins the continuation with `token_ids`; -1 leaves a place free."""

    token_ids: tuple[int, ...] = eqx.field(
        static=True, converter=lambda ids: _as_ids(ids, least=-1)
    )

    def init(self, tokens: Tokens, mask: Mask, *, vocab: int, max_new_tokens: int) -> Steps:
        return jnp.zeros(tokens.shape[:-1], jnp.int32)

    def __call__(self, logits: Logits, state: Steps) -> Logits:
        _check_ids("ForcedTokens", [i for i in self.token_ids if i != -1], logits.shape[-1])
        ids = jnp.asarray((*self.token_ids, -1), jnp.int32)
        forced = ids[jnp.minimum(state, len(self.token_ids))][..., None]
        allowed = (forced == jnp.arange(logits.shape[-1])) | (forced < 0)
        return jnp.where(allowed, logits, -jnp.inf)

    def update(self, state: Steps, token: NewTokens) -> Steps:
        return state + 1


class NoRepeatNgram(LogitsProcessor):
    """Never completes `size` tokens in a row that the prompt and continuation already have."""

    size: int = eqx.field(static=True, converter=lambda size: whole_number("size", size))

    def init(self, tokens: Tokens, mask: Mask, *, vocab: int, max_new_tokens: int) -> TextAndSteps:
        order = jnp.argsort(~mask, axis=-1, stable=True)  # real tokens first
        text = jnp.take_along_axis(tokens, order, axis=-1)
        room = [(0, 0)] * (tokens.ndim - 1) + [(0, max_new_tokens)]
        return jnp.pad(text, room), jnp.sum(mask, axis=-1, dtype=jnp.int32)

    def __call__(self, logits: Logits, state: TextAndSteps) -> Logits:
        def forbidden(text: Array, length: Array) -> Array:
            before = self.size - 1
            starts = jnp.arange(max(text.shape[-1] - before, 0))
            # The places where the last `size - 1` tokens stand, and a token follows.
            same = starts + before < length
            for i in range(before):
                same &= text[starts + i] == text[length - before + i]
            same &= length >= before
            none = jnp.zeros(logits.shape[-1], bool)
            return none.at[text[starts + before]].max(same)

        banned = jnp.vectorize(forbidden, signature="(s),()->(v)")(*state)
        return jnp.where(banned, -jnp.inf, logits)

    def update(self, state: TextAndSteps, token: NewTokens) -> TextAndSteps:
        text, length = state
        here = jnp.arange(text.shape[-1]) == length[..., None]
        return jnp.where(here, token[..., None], text), length + 1


class Automaton(LogitsProcessor):
    """Keeps to a language: in state s token t is allowed if `transitions[s, t]` isn't negative, and
    leads to that state. Each row begins in state `start`.

    Allow the stop ids where the text may end. A table of whole vocabularies is as large as states ×
    vocabulary; a constraint that computes its transitions is a `LogitsProcessor` of your own.
    """

    transitions: Int[Array, "states vocab"] = eqx.field(converter=jnp.asarray)
    start: int = eqx.field(static=True, default=0)

    def __check_init__(self) -> None:
        table = self.transitions
        if table.ndim != 2 or not jnp.issubdtype(table.dtype, jnp.integer):
            raise ValueError(
                "transitions must be integers, states × vocabulary, but are "
                f"{table.dtype} of shape {table.shape}."
            )
        if not isinstance(table, Tracer) and table.size and table.max() >= len(table):
            raise ValueError(
                f"The automaton has states 0 to {len(table) - 1}, but a transition leads to state "
                f"{table.max()}."
            )

    def init(self, tokens: Tokens, mask: Mask, *, vocab: int, max_new_tokens: int) -> Steps:
        states, width = self.transitions.shape
        if width != vocab or not 0 <= self.start < states:
            raise ValueError(
                f"The automaton has {states} states, tokens 0 to {width - 1} and starts in state "
                f"{self.start}, but needs that state and the vocabulary's {vocab} tokens."
            )
        return jnp.full(tokens.shape[:-1], self.start, jnp.int32)

    def __call__(self, logits: Logits, state: Steps) -> Logits:
        return jnp.where(self.transitions[state] >= 0, logits, -jnp.inf)

    def update(self, state: Steps, token: NewTokens) -> Steps:
        return self.transitions[state, token].astype(state.dtype)


def _as_ids(token_ids: Any, *, least: int) -> tuple[int, ...]:
    ids = [token_ids] if np.ndim(token_ids) == 0 else token_ids
    return tuple(whole_number("A token id", i, least=least, is_int32=True) for i in ids)


def _check_penalty(
    processor: RepetitionPenalty | PresencePenalty,
    fits: Callable[[np.ndarray], Any],
    description: str,
) -> None:
    penalty = processor.penalty
    if isinstance(penalty, Tracer):
        return
    number = np.asarray(penalty)
    is_number = jnp.issubdtype(number.dtype, jnp.number)
    if not is_number or not np.all(np.isfinite(number) & fits(number)):
        raise ValueError(
            f"{type(processor).__name__}'s penalty must be {description}, not {penalty!r}."
        )


def _check_ids(name: str, token_ids: Sequence[int], vocab: int) -> None:
    beyond: Any = [i for i in token_ids if not 0 <= i < vocab]
    if beyond:
        raise ValueError(f"{name}: token {beyond[0]} isn't in the vocabulary, 0 to {vocab - 1}.")


def _one_hot(token: Int[Array, "*batch"], vocab: int) -> Bool[Array, "*batch vocab"]:
    return token[..., None] == jnp.arange(vocab)


def _counts(
    tokens: Int[Array, "*batch seq"], mask: Bool[Array, "*batch seq"], vocab: int
) -> Int[Array, "*batch vocab"]:
    def count(tokens: Array, mask: Array) -> Array:
        return jnp.zeros(vocab, jnp.int32).at[tokens].add(mask.astype(jnp.int32))

    return jnp.vectorize(count, signature="(s),(s)->(v)")(tokens, mask)
