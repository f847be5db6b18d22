"""Dropout, for every layer that has it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


def dropout(x: Float[Array, "..."], rate: float, key: PRNGKeyArray | None) -> Float[Array, "..."]:
    """Sets a share `rate` of the entries to zero and scales the rest by `1 / (1 - rate)`.

    Returns `x` unchanged without a key.
    """
    if key is None or rate == 0:
        return x
    keep_mask = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep_mask, x / (1 - rate), 0)
