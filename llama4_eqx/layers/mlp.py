"""The dense feed-forward network."""

from typing import ClassVar

import equinox as eqx
import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from llama4_eqx.layers.activation import Activation, gated_product, silu
from llama4_eqx.layers.context import PLAIN, Execution
from llama4_eqx.layers.initializers import normal
from llama4_eqx.layers.interfaces import FeedForward
from llama4_eqx.layers.linear import linear


class MLP(FeedForward):
    """`down(activation(gate(x)) * up(x))`, of dense layers and shared experts."""

    gate_proj: Float[Array, "ff hidden"]
    up_proj: Float[Array, "ff hidden"]
    down_proj: Float[Array, "hidden ff"]
    activation: Activation = eqx.field(static=True)
    takes_row_shards: ClassVar[bool] = True

    def __init__(
        self,
        hidden: int,
        ff: int,
        *,
        activation: Activation = silu,
        init_std: float,
        dtype: DTypeLike,
        key: PRNGKeyArray,
    ) -> None:
        init = normal(init_std)
        gate_key, up_key, down_key = jax.random.split(key, 3)
        self.gate_proj = init(gate_key, (ff, hidden), dtype)
        self.up_proj = init(up_key, (ff, hidden), dtype)
        self.down_proj = init(down_key, (hidden, ff), dtype)
        self.activation = activation

    def __call__(
        self, x: Float[Array, "*batch hidden"], *, execution: Execution = PLAIN
    ) -> tuple[Float[Array, "*batch hidden"], None]:
        mesh_axes = execution.mesh_axes
        x = mesh_axes.gather_rows(x, mesh_axes.ff)
        gate, up = linear(x, self.gate_proj), linear(x, self.up_proj)
        out = linear(gated_product(self.activation, gate, up), self.down_proj)
        return mesh_axes.sum_rows(out, mesh_axes.ff), None
