"""What layers say to each other where their work is split among devices.

Inside `jax.shard_map` each device runs the layers' own code on the parts of arrays that it holds,
and an `Across` names the mesh axes that cut them. By default it names none, and all of this does
nothing. The types of `shard_map` (`check_vma`) tell what varies among devices, so that gradients
get the sums that they need.
"""

from dataclasses import dataclass
from typing import Any, TypeVar

import jax
from jax import lax
from jaxtyping import Array, PRNGKeyArray

from llama4_eqx.axes import axis_words, leaf_name
from llama4_eqx.layers.remat import kept

Axes = tuple[str, ...]
T = TypeVar("T")


@dataclass(frozen=True)
class Across:
    """The mesh axes among whose devices the work is split: the tokens of a batch (`tokens`, of
    which `seq` cut the sequence), `heads`, inner features `ff`, `experts`, and `slots` of caches.

    What is cut in `stored` only, by axis word, is gathered layer by layer to be used whole.
    """

    tokens: Axes = ()
    seq: Axes = ()
    heads: Axes = ()
    ff: Axes = ()
    experts: Axes = ()
    slots: Axes = ()
    stored: tuple[tuple[str, Axes], ...] = ()

    def gathered(self, x: Array, axes: Axes, *, axis: int, shared: bool = False) -> Array:
        """The parts of all devices along the mesh axes, side by side.

        Unless it is `shared`, along axes that cut the tokens each device has its own use for it,
        and gets a part of the sum of their gradients.
        """
        for name in reversed(axes):
            to = "varying" if name in self.tokens and not shared else "invarying"
            x = lax.all_gather(x, name, axis=axis % x.ndim, tiled=True, to=to)
        return x

    def whole(self, module: T) -> T:
        """The module with all that is only `stored` in parts."""
        stored = dict(self.stored)
        if not stored:
            return module
        words = axis_words(module)

        def gather(path: Any, leaf: Array) -> Array:
            for axis, word in enumerate(words[leaf_name(path)]):
                leaf = self.gathered(leaf, stored.get(word, ()), axis=axis)
            return leaf

        return jax.tree_util.tree_map_with_path(gather, module)


ALONE = Across()


def enter(tree: T, axes: Axes) -> T:
    """What is the same on the devices along `axes`, where each will use it in its own way: its
    gradient is the sum of theirs."""

    def cast(x: Array) -> Array:
        new = tuple(axis for axis in axes if axis not in _varying(x))
        return lax.pcast(x, new, to="varying") if new else x

    return jax.tree.map(cast, tree)


def leave(x: Array, axes: Axes) -> Array:
    """The sum of what the devices along `axes` have computed."""
    return kept(lax.psum(x, axes)) if axes else x


def own_key(key: PRNGKeyArray | None, axes: Axes) -> PRNGKeyArray | None:
    """Another key on each device along the mesh axes."""
    return jax.random.fold_in(key, lax.axis_index(axes)) if axes and key is not None else key


def alike(*trees: Any) -> Any:
    """The trees with all arrays varying along the same mesh axes, as loops ask for."""
    return enter(
        trees, tuple(sorted({axis for x in jax.tree.leaves(trees) for axis in _varying(x)}))
    )


def _varying(x: Array) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying
