"""Which axis of a parameter lies along which axis of a mesh of devices.

A rule goes from an axis word, as the annotations have it, to the mesh axes that cut it. A table of
rules is a dict, so two presets together are `FSDP | EXPERT`, and a table of one's own is as good.

    mesh = jax.make_mesh((2, 4), ("fsdp", "expert"), axis_types=(AxisType.Auto,) * 2)
    model = shard(model, mesh, FSDP | EXPERT)

The model then runs on the mesh as it does on one device: see `llama4_eqx.parallel`.

How a preset scales is told below by what each of the `n` devices along its axis sends in a step of
training, in bytes, and by its operations for each of them. A device has `T` tokens; numbers have
`b` bytes; `P` are parameters, of which a token meets `A`; `o = (n - 1) / n` is the others' part.
For a forward call alone see `examples/plan.py`, which counts for any model and mesh.

There is no preset for a pipeline. Cutting parameters further while sending little is what FSDP,
TENSOR and EXCHANGE do already, without devices that idle while a pipeline fills: by
`examples/plan.py maverick`, parameters and optimiser take 27 GiB a device on 256. It would send
less where links between pods are slow; DATA sends `2 · o · P · b` a step over those.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
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


DATA = Preset(batch="data")
"""Each device has all parameters and some rows of the batch.

Sends the gradients' sum: `2 · o · P · b`. Operations per byte: `3 · A · T / (o · P · b)`, on any
number of devices.
"""

FSDP = Preset(batch="fsdp", hidden="fsdp", vision_hidden="fsdp")
"""Each device has some rows of the batch and a part of every matrix, which is gathered for use.

Sends the parameters twice, and the gradients' sum in parts: `3 · o · P · b`, where the head counts
for two thirds and the embedding's table not at all: `2 · o · T · hidden · b` of its rows are sent.
Operations per byte: `2 · A · T / (o · P · b)`, on any number of devices.
"""

TENSOR = Preset(heads="tensor", kv_heads="tensor", ff="tensor", vision_ff="tensor", vocab="tensor")
"""Each device has some heads and some of the inner features of feed-forward networks.

Sends two sums in each layer, and two of their gradients, and one of the embedding and the head:
`(4 · layers + 2) · 2 · o · T · hidden · b`. Operations per byte:
`3 · A / ((4 · layers + 2) · (n - 1) · hidden · b)`, less with each device and whatever the tokens.
"""

EXPERT = Preset(experts="expert")
"""Each device has some experts. All along the axis have the same tokens, and sum what their experts
say.

Sends one sum in each MoE layer and one of its gradients, `4 · o · T · hidden · b`, and the router
twice, `2 · o · experts · hidden · b`. Operations of experts per byte:
`4.5 · top_k · ff / ((n - 1) · b)`, less with each device and whatever the tokens.
"""

EXCHANGE = Preset(experts="expert", batch="expert")
"""Each device has some experts and some rows of the batch; tokens are sent to their experts.

Sends tokens there and back in each MoE layer, and their gradients, with half as much room again as
balanced ones need: `4 · 1.5 · o · top_k · T · hidden · b`; the router's parts, gathered and summed:
`3 · o · experts · hidden · b`; and the gradients of all `P` that aren't experts': `2 · o · P · b`.
Operations of experts per byte of tokens: `3 · ff / (o · b)`, on any number of devices.
"""

CONTEXT = Preset(seq="context", slots="context")
"""Each device has a part of every sequence, and of the slots of a cache.

Sends the keys and values of each global layer twice, and the sums of their gradients once:
`3 · 2 · (n - 1) · T · kv_heads · head_dim · b`; of a chunk-local layer nothing, if no chunk is cut;
and the gradients as DATA does. Operations of attention per byte:
`n · T · heads / ((n - 1) · kv_heads · b)`, on any number of devices.
"""


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

    Of several processes, each must have the whole tree. Errors: as of `shardings`.
    """
    arrays, rest = eqx.partition(on_mesh(tree, mesh, rules), eqx.is_array)
    return eqx.combine(jax.tree.map(_put, arrays, shardings(arrays, mesh, rules)), rest)


def unshard(tree: T) -> T:
    """The whole tree on this process's first device, its models working there alone.

    With several processes, all must call it. Errors: of PRNG keys, a `TypeError`.
    """
    arrays, rest = eqx.partition(_with_parallel(tree, None), eqx.is_array)
    whole = multihost_utils.process_allgather(arrays, tiled=True)
    return eqx.combine(jax.tree.map(jnp.asarray, whole), rest)


def spread(tree: T, sharding: NamedSharding) -> T:
    """Arrays that every process has alike, such as a batch, with each part where it is to lie."""
    return jax.tree.map(partial(_put, sharding=sharding), tree)


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
    return _with_parallel(tree, parallel)


def batch_sharding(mesh: Mesh, rules: Rules) -> NamedSharding:
    """Where tokens lie, and all else that is `"batch seq"`."""
    axes = (_mesh_axes(rules, word) or None for word in ("batch", "seq"))
    return NamedSharding(mesh, PartitionSpec(*axes))


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _put(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def _with_parallel(tree: T, parallel: MeshParallel | None) -> T:
    def tell(node: Any) -> Any:
        if not isinstance(node, Llama4):
            return node
        return eqx.tree_at(lambda m: m.parallel, node, parallel, is_leaf=lambda x: x is None)

    return jax.tree.map(tell, tree, is_leaf=lambda node: isinstance(node, Llama4))


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
