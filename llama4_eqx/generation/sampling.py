"""Samplers: small modules that turn logits into token ids."""

from abc import abstractmethod
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from llama4_eqx.argument_checks import real_number, whole_number


class Sampler(eqx.Module):
    """Chooses each row's next token. Write your own by subclassing."""

    @abstractmethod
    def __call__(
        self, logits: Float[Array, "*batch vocab"], key: PRNGKeyArray
    ) -> Int[Array, "*batch"]:
        """One token id a row."""


class Greedy(Sampler):
    """The most likely token, the first of them in a tie; needs no randomness."""

    def __call__(
        self, logits: Float[Array, "*batch vocab"], key: PRNGKeyArray
    ) -> Int[Array, "*batch"]:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _as_number(name: str, number: ArrayLike) -> Float[Array, ""]:
    if not isinstance(number, Array):
        number = real_number(name, number)
    return jnp.asarray(number, jnp.float32)


def _as_probability(name: str, number: ArrayLike | None) -> Float[Array, ""] | None:
    return None if number is None else _as_number(name, number)


def _as_count(number: int | None) -> int | None:
    return None if number is None else whole_number("top_k", number)


def _is_known(number: Array) -> bool:
    return not isinstance(number, Tracer)


class Sample(Sampler):
    """Draws from `softmax(logits / temperature)` after removing, in this order if given: all but
    the `top_k` likeliest tokens; the least likely ones beyond a total probability of `top_p`; those
    less than `min_p` times as likely as the likeliest. Llama 4's own defaults are
    `Sample(temperature=0.6, top_p=0.9)`. All but `top_k` are traced: other numbers compile nothing
    anew.
    """

    temperature: Float[Array, ""] = eqx.field(
        default=1.0, converter=partial(_as_number, "temperature")
    )
    top_k: int | None = eqx.field(static=True, default=None, converter=_as_count)
    top_p: Float[Array, ""] | None = eqx.field(
        default=None, converter=partial(_as_probability, "top_p")
    )
    min_p: Float[Array, ""] | None = eqx.field(
        default=None, converter=partial(_as_probability, "min_p")
    )

    def __check_init__(self) -> None:
        # Beyond these temperatures float32 logits over- or underflow.
        if _is_known(self.temperature) and not 1e-6 <= self.temperature <= 1e6:
            raise ValueError(
                "temperature must be positive, from 1e-6 to 1e6, but is "
                f"{self.temperature}: use Greedy() for zero."
            )
        for name, value in (("top_p", self.top_p), ("min_p", self.min_p)):
            if value is not None and _is_known(value) and not 0 <= value <= 1:
                raise ValueError(f"{name} is a probability, so from 0 to 1, but is {value}.")

    def __call__(
        self, logits: Float[Array, "*batch vocab"], key: PRNGKeyArray
    ) -> Int[Array, "*batch"]:
        return jax.random.categorical(key, self.filtered(logits), axis=-1).astype(jnp.int32)

    def filtered(self, logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch vocab"]:
        """The float32 logits to draw from: divided by the temperature, and -inf where removed."""
        logits = logits.astype(jnp.float32) / self.temperature
        if self.top_k is not None:
            top_k = min(self.top_k, logits.shape[-1])
            logits = jnp.where(
                logits >= jax.lax.top_k(logits, top_k)[0][..., -1:], logits, -jnp.inf
            )
        if self.top_p is not None:
            descending = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
            probabilities = jax.nn.softmax(descending, axis=-1)
            # A token stays while those likelier than it don't reach top_p yet; the first always
            # does.
            likelier = jnp.cumsum(probabilities, axis=-1) - probabilities
            in_nucleus = (likelier < self.top_p).at[..., 0].set(True)
            least = jnp.min(jnp.where(in_nucleus, descending, jnp.inf), axis=-1, keepdims=True)
            logits = jnp.where(logits >= least, logits, -jnp.inf)
        if self.min_p is not None:
            likeliest = jnp.max(logits, axis=-1, keepdims=True)
            logits = jnp.where(jnp.exp(logits - likeliest) >= self.min_p, logits, -jnp.inf)
        return logits
