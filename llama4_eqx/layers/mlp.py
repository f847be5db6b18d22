"""The SwiGLU feed-forward network of dense layers and shared experts."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.nn.initializers import normal
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray


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

    def __call__(self, x: Float[Array, "*batch hidden"]) -> Float[Array, "*batch hidden"]:
        gate = jnp.einsum("...d,fd->...f", x, self.gate_proj)
        up = jnp.einsum("...d,fd->...f", x, self.up_proj)
        return jnp.einsum("...f,df->...d", jax.nn.silu(gate) * up, self.down_proj)
