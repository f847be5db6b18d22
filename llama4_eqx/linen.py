"""Our modules inside Flax Linen models. Needs the extra `flax`."""

import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from llama4_eqx.axes import axis_words, leaf_name

# Linen's logical axis rules: axis words, and the mesh axis that each is sharded along.
LogicalAxisRules = tuple[tuple[str, str | None], ...]


def as_linen(
    make: Callable[[PRNGKeyArray], eqx.Module],
    *,
    mesh: Mesh | None = None,
    rules: LogicalAxisRules | None = None,
    name: str | None = None,
) -> nn.Module:
    """A Linen module that calls the module `make(key)`, and whose parameters Linen owns.

    Its parameters are the module's array leaves, by their paths (`vision_adapter.mlp.fc1`). Each is
    a `LogicallyPartitioned` box whose axis names are our axis words, so `nn.get_partition_spec` and
    `nn.logical_to_mesh_sharding` work on them; with a `mesh` and `rules` they are constrained to
    it. Linen's `params` key is for `make`, and a `dropout` key, where given, turns dropout on.

        vision = as_linen(lambda key: VisionModel(config, key=key), name="vision_model")
        features = vision(pixel_values)
    """
    return _AsLinen(make, mesh, rules, name=name)


class _AsLinen(nn.Module):
    make: Callable[[PRNGKeyArray], eqx.Module]
    mesh: Mesh | None
    rules: LogicalAxisRules | None

    @nn.compact
    def __call__(self, *args: Any, **options: Any) -> Any:
        shapes = eqx.filter_eval_shape(self.make, jax.random.key(0))
        # Linen wants each name once; the patch's two sides share a word and are never sharded.
        words = {
            leaf: tuple(word if axes.count(word) == 1 else None for word in axes)
            for leaf, axes in axis_words(shapes).items()
        }
        arrays, static = eqx.partition(shapes, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
        paths, structure = jax.tree_util.tree_flatten_with_path(arrays)
        names = [leaf_name(path) for path, _ in paths]
        if self.is_initializing():
            made = eqx.filter(self.make(self.make_rng("params")), eqx.is_array)
            inits = [lambda key, leaf=leaf: leaf for leaf in jax.tree.leaves(made)]
        else:  # Linen compares their shapes with those of the parameters
            inits = [lambda key, leaf=leaf: jnp.zeros(leaf.shape, leaf.dtype) for _, leaf in paths]
        leaves = [
            self.param(n, nn.with_logical_partitioning(init, words[n], self.mesh, self.rules))
            for n, init in zip(names, inits, strict=True)
        ]
        module: Any = eqx.combine(jax.tree.unflatten(structure, leaves), static)
        if self.has_rng("dropout") and "key" in inspect.signature(module.__call__).parameters:
            options["key"] = self.make_rng("dropout")
        return module(*args, **options)
