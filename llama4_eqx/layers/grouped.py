"""The experts' SwiGLU over rows sorted by expert: one meaning, several ways to compute it."""

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

Backend = Literal["dense", "ragged", "blocked"]


def grouped_mlp(
    rows: Float[Array, "tokens hidden"],
    gate_up_proj: Float[Array, "experts hidden 2 ff"],
    down_proj: Float[Array, "experts ff hidden"],
    group_sizes: Int[Array, "experts"],
    *,
    backend: Backend | None = None,
) -> Float[Array, "tokens hidden"]:
    """Sends each row through its expert: `(silu(x gate) * (x up)) down`.

    The first `group_sizes[0]` rows belong to expert 0, the next `group_sizes[1]` to expert 1, and so on. Any sizes
    do: nothing is dropped. Rows after the last group belong to nobody, give zeros and get no gradient.

    `backend` says how to compute it; None takes the platform's fastest (`default_backend`).
    """
    if backend is None:
        backend = default_backend()
    if backend not in _BACKENDS:
        raise ValueError(f"backend must be None or one of {get_args(Backend)}; got {backend!r}.")
    gate_up = gate_up_proj.reshape(*gate_up_proj.shape[:2], -1)
    return _BACKENDS[backend](rows, gate_up, down_proj, group_sizes)
