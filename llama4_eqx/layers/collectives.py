"""Collectives for layers inside `jax.shard_map`; no-ops on one device.

Each device runs the layers' own code on its part of the arrays, and a `MeshAxes` names the mesh
axes that shard them. The varying-axes types of `shard_map` (`check_vma=True`) make gradients get
the sums that they need.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
from jax import lax
from jax._src import config
from jax.extend.core import jaxpr_as_fun
from jaxtyping import Array, PRNGKeyArray

from llama4_eqx.axes import axis_words, leaf_name
from llama4_eqx.layers.remat import save_residual

AxisNames = tuple[str, ...]
T = TypeVar("T")


@dataclass(frozen=True)
class MeshAxes:
    """The mesh axes that shard a layer's work, by what they shard.

    `tokens` shard the batch and the sequence, `seq` (a part of `tokens`) the sequence alone; then
    `heads`, inner features `ff`, `experts`, and `slots` of caches. `residual` shard the sequence
    further between attention and feed-forward networks, which `heads` and `ff` are then the same as
    (sequence parallelism, https://arxiv.org/abs/2205.05198). `fsdp_axes` holds, by axis word, those
    that shard parameters in storage only: these are all-gathered layer by layer for use.
    """

    tokens: AxisNames = ()
    seq: AxisNames = ()
    heads: AxisNames = ()
    ff: AxisNames = ()
    experts: AxisNames = ()
    slots: AxisNames = ()
    residual: AxisNames = ()
    fsdp_axes: tuple[tuple[str, AxisNames], ...] = ()

    def all_gather(
        self, x: Array, axis_names: AxisNames, *, axis: int, shared: bool = False
    ) -> Array:
        """The shards of all devices along the mesh axes, concatenated along `axis`.

        Along mesh axes that shard the tokens, each device uses the result for its own tokens, so
        the gradient is reduce-scattered; not if the result is `shared`, used equally by all.
        """
        sharded = (*self.tokens, *self.residual)
        for name in reversed(axis_names):
            to = "varying" if name in sharded and not shared else "invarying"
            x = lax.all_gather(x, name, axis=axis % x.ndim, tiled=True, to=to)
        return x

    def gather_rows(self, x: Array, axis_names: AxisNames) -> Array:
        """A layer's input, of `"*batch seq features"`, for use in different ways by the devices
        along its `heads` or `ff`: gathered if it is sharded along them."""
        if axis_names and self.residual:
            return self.all_gather(x, self.residual, axis=-2)
        return pvary(x, axis_names)

    def sum_rows(self, x: Array, axis_names: AxisNames) -> Array:
        """The sum of such devices' results, `"*batch seq hidden"`; of a gathered input's, each
        device gets its own rows of it."""
        if not (axis_names and self.residual):
            return psum_over(x, axis_names)
        for name in self.residual:
            x = lax.psum_scatter(x, name, scatter_dimension=x.ndim - 2, tiled=True)
        return save_residual(x)

    def gather_params(self, module: T) -> T:
        """The module with its FSDP-sharded parameters all-gathered."""
        fsdp_axes = dict(self.fsdp_axes)
        if not fsdp_axes:
            return module
        words = axis_words(module)

        def gather(path: Any, leaf: Array) -> Array:
            for axis, word in enumerate(words[leaf_name(path)]):
                leaf = self.all_gather(leaf, fsdp_axes.get(word, ()), axis=axis)
            return leaf

        return jax.tree_util.tree_map_with_path(gather, module)


UNSHARDED = MeshAxes()


def pvary(tree: T, axis_names: AxisNames) -> T:
    """Casts replicated values to varying over the mesh axes; the transpose is a psum of their
    gradients."""

    def cast(x: Array) -> Array:
        new = tuple(name for name in axis_names if name not in varying_axes(x))
        return lax.pcast(x, new, to="varying") if new else x

    return jax.tree.map(cast, tree)


def psum_over(x: Array, axis_names: AxisNames) -> Array:
    """The sum over the devices along the mesh axes, saved for the backward pass."""
    return save_residual(lax.psum(x, axis_names)) if axis_names else x


def fold_in_axis_index(key: PRNGKeyArray | None, axis_names: AxisNames) -> PRNGKeyArray | None:
    """A different key on each device along the mesh axes."""
    if not axis_names or key is None:
        return key
    return jax.random.fold_in(key, lax.axis_index(axis_names))


def match_vma(*trees: Any) -> Any:
    """Casts all arrays to vary over the union of their mesh axes, as loop carries must."""
    names = {name for x in jax.tree.leaves(trees) for name in varying_axes(x)}
    return pvary(trees, tuple(sorted(names)))


def call_kernel(function: Callable[..., T], *args: Any) -> T:
    """`function(*args)`, for JAX's own kernels, which don't declare over which mesh axes their
    results vary: over all that the arguments vary over. They promote dtypes, too."""
    leaves, tree = jax.tree.flatten(args)
    names = {name for x in leaves for name in varying_axes(x)}
    with jax.numpy_dtype_promotion("standard"):
        if not names:
            return function(*args)
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]

        def of_leaves(*leaves: Array) -> T:
            return function(*jax.tree.unflatten(tree, leaves))

        with config._check_vma(False):
            jaxpr, out_shape = jax.make_jaxpr(of_leaves, return_shape=True)(*shapes)
            out = jaxpr_as_fun(jaxpr)(*leaves)
    return jax.tree.unflatten(jax.tree.structure(out_shape), pvary(out, tuple(sorted(names))))


def varying_axes(x: Array) -> frozenset[str]:
    """The mesh axes over which a value differs between devices, inside `jax.shard_map`."""
    return jax.typeof(x).manual_axis_type.varying
