"""The SwiGLU feed-forward network of dense layers and shared experts."""

import equinox as eqx
import jax
from jax.nn.initializers import normal
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from llama4_eqx.layers.across import ALONE, Across, enter, leave
from llama4_eqx.layers.linear import linear


class MLP(eqx.Module):
    """`down(silu(gate(x)) * up(x))`."""

    gate_proj: Float[Array, "ff hidden"]
    up_proj: Float[Array, "ff hidden"]
    down_proj: Float[Array, "hidden ff"]

    def __init__(
        self, hidden: int, ff: int, *, init_std: float, dtype: DTypeLike, key: PRNGKeyArray
    ) -> None:
        init = normal(init_std)
        gate_key, up_key, down_key = jax.random.split(key, 3)
        self.gate_proj = init(gate_key, (ff, hidden), dtype)
        self.up_proj = init(up_key, (ff, hidden), dtype)
        self.down_proj = init(down_key, (hidden, ff), dtype)

    def __call__(
        self, x: Float[Array, "*batch hidden"], *, across: Across = ALONE
    ) -> Float[Array, "*batch hidden"]:
        x = enter(x, across.ff)
        gate, up = linear(x, self.gate_proj), linear(x, self.up_proj)
        return leave(linear(jax.nn.silu(gate) * up, self.down_proj), across.ff)
