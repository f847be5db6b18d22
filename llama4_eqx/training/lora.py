"""LoRA (https://arxiv.org/abs/2106.09685): training low-rank updates of frozen weights."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from llama4_eqx.argument_checks import (
    check_key,
    check_type,
    float_dtype,
    real_number,
    whole_number,
)
from llama4_eqx.axes import leaf_name, matrix_axes, select
from llama4_eqx.layers.lowrank import LowRank, merged
from llama4_eqx.layers.quantized import is_quantized, weight_shapes
from llama4_eqx.model import Llama4

# Modules whose layers merge `LowRank` leaves themselves.
_LAYERS = ("decoder.blocks.", "vision_model.model.")


class Update(eqx.Module):
    """The factors of one weight's update; see `LowRank`."""

    left: Float[Array, "... rows rank"]
    right: Float[Array, "... rank columns"]


class LoRA(eqx.Module):
    """A model, and low-rank updates of the weights whose names match the patterns of `select`.

        lora = LoRA(model, "decoder.*_proj", rank=8, key=key)

    updates all of the decoder's attention, feed-forward networks and experts, each expert apart.
    Train it with `trainable=select(lora, "updates.*")` and a loss of `lora.attached()`.
    A new LoRA leaves the model's function unchanged: its left factors are zero.
    """

    model: Llama4
    updates: dict[str, Update]
    scale: float = eqx.field(static=True)

    def __init__(
        self,
        model: Llama4,
        *patterns: str,
        rank: int,
        alpha: float | int | None = None,
        dtype: DTypeLike = jnp.float32,
        key: PRNGKeyArray,
    ) -> None:
        """Updates are scaled by `alpha / rank`; `alpha` defaults to twice the rank.

        Raises a `ValueError` for a rank below 1, for no pattern, for a pattern that matches no
        leaf, and for a leaf that isn't a matrix.
        """
        check_type("model", model, Llama4)
        check_key(key)
        rank = whole_number("rank", rank)
        if alpha is not None and not math.isfinite(real_number("alpha", alpha)):
            raise ValueError(f"alpha must be a finite number, but is {alpha}.")
        dtype = float_dtype(dtype)
        if not patterns:
            raise ValueError("A LoRA needs patterns of the weights to update: 'decoder.*_proj'.")
        self.model = model
        self.scale = 2.0 if alpha is None else alpha / rank
        self.updates = {}
        shapes = weight_shapes(model)  # a quantised weight is updated like any other
        selected = jax.tree.leaves(select(shapes, *patterns))
        leaves, matrices = jax.tree_util.tree_leaves_with_path(shapes), matrix_axes(shapes)
        for i, (path, leaf) in enumerate(leaves):
            if not selected[i]:
                continue
            name = leaf_name(path)
            axes = matrices[name]
            if axes is None:
                raise ValueError(f"{name} isn't a matrix: choose patterns that leave it out.")
            lead = [leaf.shape[axis] for axis in axes.stack]
            rows, columns = (math.prod(leaf.shape[a] for a in side) for side in axes[1:])
            right = jax.random.normal(jax.random.fold_in(key, i), (*lead, rank, columns), dtype)
            self.updates[name] = Update(
                jnp.zeros((*lead, rows, rank), dtype), right / math.sqrt(columns)
            )

    def with_updates(self, updates: dict[str, Update]) -> "LoRA":
        """The same model and scale with these updates, by the names of leaves."""
        return eqx.tree_at(lambda lora: lora.updates, self, updates)

    def attached(self) -> Llama4:
        """The model with its updates, for training.

        Layers get `LowRank` leaves, which they merge when they run, and again in the backward pass:
        there is never a second copy of all weights. (On a mesh there is one.)
        """

        def attach(name: str, leaf: Any) -> Any:
            lowrank = self._lowrank(name, leaf)
            in_a_layer = name.startswith(_LAYERS)
            return lowrank if in_a_layer or lowrank is leaf else merged(lowrank)

        return _map_with_names(attach, self.model)

    def merged(self) -> Llama4:
        """A plain model with the updates added to its weights, for saving or generating."""
        return _map_with_names(lambda name, leaf: merged(self._lowrank(name, leaf)), self.model)

    def _lowrank(self, name: str, leaf: Any) -> Any:
        update = self.updates.get(name)
        return leaf if update is None else LowRank(leaf, update.left, update.right, self.scale)


def _map_with_names(function: Any, model: Llama4) -> PyTree:
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(leaf_name(path), leaf), model, is_leaf=is_quantized
    )
