"""Placing trees on a mesh of devices by rules from axis words to mesh axes.

    mesh = jax.make_mesh((2, 4), ("fsdp", "expert"), axis_types=(AxisType.Auto,) * 2)
    model = shard(model, mesh, FSDP | EXPERT_REPLICATED_TOKENS)

The sharded model is called like any other; see `llama4_eqx.distributed.mesh_parallel`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from llama4_eqx.argument_checks import check_type
from llama4_eqx.axes import axis_words, leaf_name
from llama4_eqx.distributed.mesh_parallel import MeshParallel
from llama4_eqx.distributed.rules import Rules, RulesLike
from llama4_eqx.layers.unstacked import is_unstacked
from llama4_eqx.model import Llama4
from llama4_eqx.parallel import Parallel, SingleDevice

T = TypeVar("T")


def shardings(tree: PyTree, mesh: Mesh, rules: RulesLike) -> PyTree:
    """The sharding of each array of the tree; None for all else.

    The tree is a model, a `TrainState` or an optimiser's state, of arrays or of shapes. An axis
    without a rule isn't sharded.

    Raises a `ValueError` that lists every mesh axis that isn't there, every axis whose size the
    devices don't divide, and every array of which two axes would be sharded along one mesh axis.
    """
    check_type("mesh", mesh, Mesh, "make one with jax.make_mesh")
    rules, words, problems = Rules(rules), axis_words(tree), []

    def sharding(path, leaf):
        if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
            return None
        name = leaf_name(path)
        spec = [rules[word] for word in words[name]]
        wrong = _problems(name, leaf.shape, words[name], spec, mesh)
        problems.extend(wrong)
        if wrong:
            return None
        return NamedSharding(mesh, PartitionSpec(*(axes or None for axes in spec)))

    found = jax.tree_util.tree_map_with_path(sharding, tree)
    if problems:
        shown = problems[:20] + [f"and {len(problems) - 20} more"] * (len(problems) > 20)
        raise ValueError("The rules don't fit the mesh:\n- " + "\n- ".join(shown))
    return found


def shard(tree: T, mesh: Mesh, rules: RulesLike) -> T:
    """The tree sharded as `shardings` says, its models running on the mesh.

    With several processes, each must have the whole tree. Errors: as of `shardings`.
    """
    arrays, rest = eqx.partition(with_mesh(tree, mesh, rules), eqx.is_array)
    return eqx.combine(jax.tree.map(_put, arrays, shardings(arrays, mesh, rules)), rest)


def unshard(tree: T) -> T:
    """The tree gathered on this process's first device, its models running there alone.

    With several processes, all must call it. Raises a `TypeError` for PRNG keys.
    """
    arrays, rest = eqx.partition(_with_parallel(tree, SingleDevice()), eqx.is_array)
    whole = multihost_utils.process_allgather(arrays, tiled=True)
    return eqx.combine(jax.tree.map(jnp.asarray, whole), rest)


def device_put_global(tree: T, sharding: NamedSharding) -> T:
    """Shards arrays of which every process has an equal copy, such as a batch."""
    return jax.tree.map(partial(_put, sharding=sharding), tree)


def init_sharded(make: Callable[[], T], mesh: Mesh, rules: RulesLike) -> T:
    """`shard(make(), mesh, rules)`, but each device makes its own shards: no array is ever whole.

    `make` takes nothing: `lambda: Llama4(config, key=key)`, or all of a `TrainState`, or
    `lambda: model.empty_cache((8,), 4096)`. Errors: as of `shardings`.
    """
    shapes, rest = eqx.partition(abstract_sharded(make, mesh, rules), _is_shape)

    def arrays() -> Any:
        return eqx.filter(with_mesh(make(), mesh, rules), eqx.is_array)

    found = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    return eqx.combine(jax.jit(arrays, out_shardings=found)(), rest)


def abstract_sharded(make: Callable[[], T], mesh: Mesh, rules: RulesLike) -> T:
    """The shapes, with shardings, of what `init_sharded` makes: for lowering programs of any size
    for any mesh. Errors: as of `shardings`."""
    tree = with_mesh(eqx.filter_eval_shape(make), mesh, rules)

    def with_sharding(leaf: Any, sharding: NamedSharding | None) -> Any:
        return leaf if sharding is None else leaf.update(sharding=sharding)

    return jax.tree.map(with_sharding, tree, shardings(tree, mesh, rules))


def with_mesh(tree: T, mesh: Mesh, rules: RulesLike) -> T:
    """The tree with its models, of arrays or of shapes, set to run on the mesh; arrays stay where
    they are.

    Raises a `ValueError` for a mesh axis that isn't there, if only some of the experts' mesh axes
    shard the tokens, if the residual stream is sharded otherwise than heads and inner features, and
    for unstacked experts.
    """
    if any(map(is_unstacked, jax.tree.leaves(tree, is_leaf=is_unstacked))):
        raise ValueError(
            "Unstacked experts, a form for one CPU, can't be sharded: shard the model that they "
            "were made from."
        )
    check_type("mesh", mesh, Mesh, "make one with jax.make_mesh")
    rules = Rules(rules)
    for word in rules:
        if unknown := [axis for axis in rules[word] if axis not in mesh.shape]:
            raise ValueError(f"{_sharded_along(word, unknown[0], mesh)}.")
    experts, batch = set(rules["experts"]), set(rules["batch"])
    if not experts <= batch and experts & {*batch, *rules["seq"]}:
        raise ValueError(
            f"experts are sharded along {', '.join(sorted(experts))}, of which some shard the "
            "tokens, but not all shard the batch: let all of them shard the batch, or none."
        )
    residual = rules["residual"]
    if residual and not residual == rules["heads"] == rules["kv_heads"] == rules["ff"]:
        raise ValueError(
            f"residual is sharded along {', '.join(residual)}, along which heads, kv_heads and ff "
            "must be sharded, too, and along no other: pass TENSOR | SEQUENCE."
        )
    return _with_parallel(tree, MeshParallel(mesh, rules))


def batch_sharding(mesh: Mesh, rules: RulesLike) -> NamedSharding:
    """The sharding of tokens, and of any other array of `"batch seq"`."""
    rules = Rules(rules)
    return NamedSharding(mesh, PartitionSpec(rules["batch"] or None, rules["seq"] or None))


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _put(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def _with_parallel(tree: T, parallel: Parallel) -> T:
    def replace(node: Any) -> Any:
        if not isinstance(node, Llama4):
            return node
        return eqx.tree_at(lambda m: m.parallel, node, parallel)

    return jax.tree.map(replace, tree, is_leaf=lambda node: isinstance(node, Llama4))


def _is_shape(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def _sharded_along(word: str, axis: str, mesh: Mesh) -> str:
    return f"{word} is sharded along {axis}, but the mesh has {', '.join(mesh.shape)}"


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
            found.append(f"{name}: {_sharded_along(word, unknown[0], mesh)}")
            continue
        devices = math.prod(mesh.shape[axis] for axis in axes)
        if size % devices:
            found.append(
                f"{name}: {word} of {size} can't be sharded among the {devices} devices of "
                f"{' and '.join(axes)}"
            )
        for axis in axes:
            if axis in taken:
                found.append(f"{name}: both {taken[axis]} and {word} are sharded along {axis}")
            taken[axis] = word
    return found
