"""What optimisers need to know of a model's parameters, from their axis words."""

from typing import Any

import jax
from jaxtyping import PyTree
from optax.contrib import MuonDimensionNumbers

from llama4_eqx.axes import axis_words, leaf_name, matrix_axes

# Sides of a matrix that index something discrete, as those of embeddings, heads and routers do.
_DISCRETE = {"vocab", "patches", "experts"}


def decay_mask(parameters: PyTree) -> PyTree:
    """True for matrices, False for vectors such as norms and biases: `mask` of `optax.adamw`."""
    matrices = matrix_axes(parameters)
    return _map_with_names(lambda name: matrices[name] is not None, parameters)


def muon_dimensions(parameters: PyTree) -> PyTree:
    """The axes that make each weight a matrix: `muon_weight_dimension_numbers` of
    `optax.contrib.muon`.

    None for vectors and for embeddings, heads and routers, which Muon leaves to Adam.
    """
    words, matrices = axis_words(parameters), matrix_axes(parameters)

    def dimensions(name: str) -> MuonDimensionNumbers | None:
        axes = matrices[name]
        if axes is None or _DISCRETE & {words[name][axis] for side in axes[1:] for axis in side}:
            return None
        return MuonDimensionNumbers(axes.rows, axes.columns)

    return _map_with_names(dimensions, parameters)


def _map_with_names(function: Any, parameters: PyTree) -> PyTree:
    return jax.tree_util.tree_map_with_path(lambda path, _: function(leaf_name(path)), parameters)
