"""Which axis of a parameter lies along which axis of a mesh of devices.

A rule goes from an axis word, as the annotations have it, to the mesh axes that cut it. A table of
rules is a dict, so two presets together are `FSDP | EXPERT`, and a table of one's own is as good.

    mesh = jax.make_mesh((2, 4), ("fsdp", "expert"), axis_types=(AxisType.Auto,) * 2)
    model = shard(model, mesh, FSDP | EXPERT)

The model then runs on the mesh as it does on one device: see `llama4_eqx.parallel`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import equinox as eqx
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from llama4_eqx.axes import axis_words, leaf_name
from llama4_eqx.model import Llama4
from llama4_eqx.parallel import MeshParallel

Rules = Mapping[str, str | tuple[str, ...] | None]
T = TypeVar("T")


class Preset(Mapping[str, tuple[str, ...]]):
    """A table of rules. `a | b` has those of both: what both cut is cut along the axes of both.

    To replace a rule, write a table of your own: `{**FSDP, "vision_hidden": None}`.
    """

    def __init__(self, **rules: str | tuple[str, ...] | None) -> None:
        self._rules = rules

    def __getitem__(self, word: str) -> tuple[str, ...]:
        return _as_tuple(self._rules[word])

    def __iter__(self) -> Iterator[str]:
        return iter(self._rules)

    def __len__(self) -> int:
        return len(self._rules)

    def __or__(self, other: Rules) -> "Preset":
        axes = {w: (*_mesh_axes(self, w), *_mesh_axes(other, w)) for w in (*self, *other)}
        return Preset(**{word: tuple(dict.fromkeys(names)) for word, names in axes.items()})

    def __ror__(self, other: Rules) -> "Preset":
        return Preset(**other) | self


# Each device has all parameters and some rows of the batch.
DATA = Preset(batch="data")
# Each device has some rows of the batch and a part of every matrix, which is gathered for use.
FSDP = Preset(batch="fsdp", hidden="fsdp", vision_hidden="fsdp")
# Each device has some heads and some of the inner features of feed-forward networks.
TENSOR = Preset(heads="tensor", kv_heads="tensor", ff="tensor", vision_ff="tensor", vocab="tensor")
# Each device has some experts. All along the axis have the same tokens, and sum what their experts
# say.
EXPERT = Preset(experts="expert")
# Each device has some experts and some rows of the batch; tokens are sent to their experts.
EXCHANGE = Preset(experts="expert", batch="expert")
# Each device has a part of every sequence, and of the slots of a cache.
CONTEXT = Preset(seq="context", slots="context")


def shardings(tree: PyTree, mesh: Mesh, rules: Rules) -> PyTree:
    """For each array of the tree where it lies; None for all else.

    The tree is a model, a `TrainState` or the state of an optimiser, of arrays or of shapes. An
    axis without a rule isn't cut.

    Raises a `ValueError` for a mesh axis that isn't there, for an axis that the devices don't
    divide, and for two axes of one array that would lie along one mesh axis; it names them all.
    """
    words, problems = axis_words(tree), []

    def place(path, leaf):
        if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
            return None
        name = leaf_name(path)
        spec = [_mesh_axes(rules, word) for word in words[name]]
        wrong = _problems(name, leaf.shape, words[name], spec, mesh)
        problems.extend(wrong)
        if wrong:
            return None
        return NamedSharding(mesh, PartitionSpec(*(axes or None for axes in spec)))

    placed = jax.tree_util.tree_map_with_path(place, tree)
    if problems:
        shown = problems[:20] + [f"and {len(problems) - 20} more"] * (len(problems) > 20)
        raise ValueError("The rules don't fit the mesh:\n- " + "\n- ".join(shown))
    return placed


def shard(tree: T, mesh: Mesh, rules: Rules) -> T:
    """The tree with its arrays where `shardings` says, and with its models at work on the mesh.

    Errors: as of `shardings`.
    """
    arrays, rest = eqx.partition(on_mesh(tree, mesh, rules), eqx.is_array)
    return eqx.combine(jax.device_put(arrays, shardings(arrays, mesh, rules)), rest)


def born_sharded(make: Callable[[], T], mesh: Mesh, rules: Rules) -> T:
    """What `shard(make(), mesh, rules)` is, made where it lies: no array is ever whole.

    `make` takes nothing: `lambda: Llama4(config, key=key)`, or all of a `TrainState`, or
    `lambda: model.empty_cache((8,), 4096)`. Errors: as of `shardings`.
    """
    shapes, rest = eqx.partition(laid_out(make, mesh, rules), _is_shape)

    def arrays() -> Any:
        return eqx.filter(on_mesh(make(), mesh, rules), eqx.is_array)

    places = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    return eqx.combine(jax.jit(arrays, out_shardings=places)(), rest)


def laid_out(make: Callable[[], T], mesh: Mesh, rules: Rules) -> T:
    """What `born_sharded` would make, by shapes that know where they lie: to lower a program of
    any size for any mesh. Errors: as of `shardings`."""
    tree = on_mesh(eqx.filter_eval_shape(make), mesh, rules)

    def lay(leaf: Any, place: NamedSharding | None) -> Any:
        return leaf if place is None else leaf.update(sharding=place)

    return jax.tree.map(lay, tree, shardings(tree, mesh, rules))


def on_mesh(tree: T, mesh: Mesh, rules: Rules) -> T:
    """The tree with its models, of arrays or of shapes, at work on the mesh; arrays stay.

    Raises a `ValueError` for a mesh axis that isn't there, and where only some of the experts' axes
    cut the tokens.
    """
    for word in rules:
        if unknown := [axis for axis in _mesh_axes(rules, word) if axis not in mesh.shape]:
            there = ", ".join(mesh.shape)
            raise ValueError(f"{word} is to lie along {unknown[0]}, but the mesh has {there}.")
    experts, batch = set(_mesh_axes(rules, "experts")), set(_mesh_axes(rules, "batch"))
    if not experts <= batch and experts & {*batch, *_mesh_axes(rules, "seq")}:
        raise ValueError(
            f"experts lie along {', '.join(sorted(experts))}, of which some cut the tokens, but "
            "not all cut the batch: let all of them cut the batch, or none."
        )
    parallel = MeshParallel(mesh, tuple((word, _mesh_axes(rules, word)) for word in rules))

    def tell(node: Any) -> Any:
        if not isinstance(node, Llama4):
            return node
        return eqx.tree_at(lambda m: m.parallel, node, parallel, is_leaf=lambda x: x is None)

    return jax.tree.map(tell, tree, is_leaf=lambda node: isinstance(node, Llama4))


def batch_sharding(mesh: Mesh, rules: Rules) -> NamedSharding:
    """Where tokens lie, and all else that is `"batch seq"`."""
    axes = (_mesh_axes(rules, word) or None for word in ("batch", "seq"))
    return NamedSharding(mesh, PartitionSpec(*axes))


def _is_shape(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def _mesh_axes(rules: Rules, word: str) -> tuple[str, ...]:
    return _as_tuple(rules.get(word))


def _as_tuple(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def _problems(
    name: str,
    shape: tuple[int, ...],
    words: tuple[str, ...],
    spec: list[tuple[str, ...]],
    mesh: Mesh,
) -> list[str]:
    found, taken = [], {}
    for word, size, axes in zip(words, shape, spec, strict=True):
        unknown = [axis for axis in axes if axis not in mesh.shape]
        if unknown:
            there = ", ".join(mesh.shape)
            found.append(f"{name}: {word} is to lie along {unknown[0]}, but the mesh has {there}")
            continue
        devices = math.prod(mesh.shape[axis] for axis in axes)
        if size % devices:
            found.append(
                f"{name}: {word} of {size} can't be cut among the {devices} devices of "
                f"{' and '.join(axes)}"
            )
        for axis in axes:
            if axis in taken:
                found.append(f"{name}: both {taken[axis]} and {word} are to lie along {axis}")
            taken[axis] = word
    return found
