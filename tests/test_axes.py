"""Axis words and what follows from them: subclasses, string annotations, matrices, decay masks."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float

import llama4_eqx as l4
from llama4_eqx.axes import axis_words, leaf_name, matrix_axes
from llama4_eqx.checkpoints.tensor_names import tensors
from llama4_eqx.distributed import Rules, shard, shardings
from llama4_eqx.training import decay_mask, muon_dimensions
from tests.toys import MULTIMODAL, SCOUT


class Gated(l4.MLP):
    """A subclass with a field of its own beside those that it inherits."""

    scale: Float[Array, "ff"]

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.scale = jnp.ones(sizes[1])


class Quoted(eqx.Module):
    """Annotations as `from __future__ import annotations` leaves them."""

    weight: 'Float[Array, "ff hidden"]'
    bias: 'Float[Array, "ff"] | None'
    inner: "Gated"


def gated():
    return Gated(8, 16, init_std=0.1, dtype=jnp.float32, key=jax.random.key(0))


WORDS = {
    "gate_proj": ("ff", "hidden"),
    "up_proj": ("ff", "hidden"),
    "down_proj": ("hidden", "ff"),
    "scale": ("ff",),
}


def test_inherited_fields_keep_their_words():
    assert axis_words(gated()) == WORDS


def test_annotations_that_are_strings():
    module = Quoted(jnp.ones((16, 8)), None, gated())
    inner = {f"inner.{name}": words for name, words in WORDS.items()}
    assert axis_words(module) == {"weight": ("ff", "hidden"), **inner}


def test_a_class_local_to_a_function():
    class Local(eqx.Module):
        weight: 'Float[Array, "hidden ff"]'
        part: "Part"

    class Part(eqx.Module):
        bias: Float[Array, "ff"]

    module = Local(jnp.ones((2, 3)), Part(jnp.ones(3)))
    assert axis_words(module) == {"weight": ("hidden", "ff"), "part.bias": ("ff",)}


def test_containers_and_stacks():
    stacked = eqx.filter_vmap(lambda key: Gated(8, 16, init_std=0.1, dtype=jnp.float32, key=key))(
        jax.random.split(jax.random.key(0), 3)
    )
    tree = {"a": (stacked, jnp.ones((2, 2))), "b": optax.adam(0.1).init(gated())}
    words = axis_words(tree)
    assert words["a.0.down_proj"] == ("layers", "hidden", "ff")
    assert words["a.1"] == ("unnamed", "unnamed")
    assert words["b.0.mu.down_proj"] == ("hidden", "ff")
    names = {leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}
    assert set(words) == names


def test_arrays_without_words_are_named():
    class Bare(eqx.Module):
        weight: Array

    with pytest.raises(ValueError, match=r"^weight has no annotation that names its axes"):
        axis_words(Bare(jnp.ones(2)))


def test_a_subclass_is_sharded_like_its_base():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    model = l4.Llama4(l4.Llama4Config(replace(SCOUT, moe_layers=())), key=jax.random.key(0))
    module = Gated(64, 128, init_std=0.1, dtype=jnp.float32, key=jax.random.key(1))
    model = eqx.tree_at(lambda m: m.decoder.blocks[0].layers, model.unstacked(), ())
    model = eqx.tree_at(lambda m: m.decoder.blocks[0].layers, model, (module,))
    rules = Rules(ff="x")
    places = shardings(model, mesh, rules).decoder.blocks[0].layers[0]
    assert places.gate_proj.spec == PartitionSpec(("x",), None)
    assert places.scale.spec == PartitionSpec(("x",))
    placed = shard(model, mesh, rules).decoder.blocks[0].layers[0]
    assert placed.down_proj.sharding == places.down_proj


def test_matrices_are_the_checkpoints():
    """Each leaf that a checkpoint holds as a matrix, or experts as several, is one here."""
    model = eqx.filter_eval_shape(l4.Llama4, MULTIMODAL, key=jax.random.key(0))
    leaves, matrices = jax.tree_util.tree_leaves_with_path(model), matrix_axes(model)
    for tensor in tensors(model):
        path, leaf = leaves[tensor.leaf]
        axes = matrices[leaf_name(path)]
        shape = tuple(jnp.prod(jnp.array(joined)).item() for joined in tensor.axes)
        if len(shape) < 2:
            assert axes is None
            continue
        sides = [jnp.prod(jnp.array([leaf.shape[a] for a in side])).item() for side in axes[1:]]
        assert tuple(sides) == shape[-2:]
        assert sorted((*axes.stack, *axes.rows, *axes.columns)) == list(range(leaf.ndim))


def test_what_optimisers_are_told():
    model = l4.Llama4(MULTIMODAL, key=jax.random.key(0))
    decayed, muon = decay_mask(model), muon_dimensions(model)
    layer = decayed.decoder.blocks[0].layers[0]
    assert layer.self_attn.q_proj
    assert layer.feed_forward.router
    assert not layer.input_layernorm.weight
    assert not decayed.vision_model.class_embedding
    assert not decayed.vision_model.model.blocks.self_attn.q_bias
    assert muon.embed_tokens is muon.lm_head is None
    layer = muon.decoder.blocks[0].layers[0]
    assert layer.feed_forward.router is layer.input_layernorm.weight is None
    assert layer.self_attn.q_proj == optax.contrib.MuonDimensionNumbers((1, 2), (3,))
    assert layer.feed_forward.experts.up_proj == optax.contrib.MuonDimensionNumbers((2,), (3,))
    assert muon.vision_model.patch_embedding.linear.output_axis == (1, 2, 3)
