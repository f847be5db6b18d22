"""Experts' weights of one layer, left in the stack of all layers that a scan runs over."""

import equinox as eqx
from jax import lax
from jaxtyping import Array, Float, Int


class ScannedWeight(eqx.Module):
    """The experts of one layer, in place of a slice of the stack.

    A scan hands each step a copy of its slice: of all experts, where a few tokens meet but a few of
    them. On CPUs that takes ten times as long as the products of one token.
    """

    stack: Float[Array, "layers experts rows columns"]
    layer: Int[Array, ""]

    def __len__(self) -> int:
        return self.stack.shape[1]

    def __getitem__(self, expert: Int[Array, ""]) -> Float[Array, "rows columns"]:
        start = (self.layer, expert, 0, 0)
        size = (1, 1, *self.stack.shape[2:])
        return lax.dynamic_slice(self.stack, start, size)[0, 0]

    def stacked(self) -> Float[Array, "experts rows columns"]:
        """The layer's own stack of experts."""
        return lax.dynamic_index_in_dim(self.stack, self.layer, keepdims=False)
