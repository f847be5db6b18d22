"""The activation of gated feed-forward networks."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array

Activation = Callable[[Any], Any]
"""An elementwise function, such as `jax.nn.silu`: Llama 4's."""


def gated_product(activation: Activation, gate: Array, up: Array) -> Array:
    """`activation(gate) * up`: SwiGLU with `jax.nn.silu`."""
    return activation(gate) * up


silu: Activation = jax.nn.silu
