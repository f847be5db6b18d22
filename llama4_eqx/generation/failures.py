"""What can go wrong in the loops of generation: none of it is ever answered with token 0."""

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from llama4_eqx.run_time_checks import refuse_if

_SENTENCES = (
    "A row of the prompt has no real token, so nothing can follow: its mask is False throughout.",
    "The model's logits are NaN: its weights or its input are damaged.",
    "The processors forbid every token: let them allow a stop id where the text may end.",
)

# Which of the sentences hold; of all steps so far.
Failures = Bool[Array, "failures"]


def failures_of_prompt(mask: Bool[Array, "*batch seq"]) -> Failures:
    """The failures before the first step."""
    return jnp.stack([jnp.any(~jnp.any(mask, axis=-1)), jnp.asarray(False), jnp.asarray(False)])


def failures_of_step(
    logits: Float[Array, "*batch vocab"],
    allowed: Float[Array, "*batch vocab"],
    unfinished: Bool[Array, "*batch"],
) -> Failures:
    """The failures of a step, of the model's logits and what the processors have left of them."""
    forbidden = jnp.max(allowed, axis=-1) == -jnp.inf
    found = [jnp.any(jnp.isnan(logits)), jnp.any(forbidden & unfinished)]
    return jnp.stack([jnp.asarray(False), *found])


def refuse_failures(tokens: Int[Array, "*shape"], failures: Failures) -> Int[Array, "*shape"]:
    """The tokens, or an error if they were chosen where nothing could be."""
    if isinstance(failures, Tracer):
        for i, sentence in enumerate(_SENTENCES):
            tokens += refuse_if(failures[i], sentence)
        return tokens
    for failed, sentence in zip(np.asarray(failures), _SENTENCES, strict=True):
        if failed:
            raise ValueError(sentence)
    return tokens
