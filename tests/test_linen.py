"""Our modules as submodules of a Flax Linen model, which owns their parameters."""

import dataclasses

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from llama4_eqx import MultiModalProjector, VisionModel
from llama4_eqx.linen import as_linen
from tests.toys import VISION

RULES = (("batch", "data"), ("heads", "tensor"), ("vision_ff", "tensor"), ("hidden", "tensor"))
PIXELS = jax.random.normal(jax.random.key(0), (8, 3, 28, 28))


def make_vision(key):
    return VisionModel(VISION, key=key)


def make_projector(key):
    width = VISION.vision_output_dim
    return MultiModalProjector(width, 16, init_std=0.5, dtype=jnp.float32, key=key)


class Classifier(nn.Module):
    """A user's model around ours."""

    mesh: jax.sharding.Mesh | None = None

    @nn.compact
    def __call__(self, pixel_values):
        rules = None if self.mesh is None else RULES
        vision = as_linen(make_vision, mesh=self.mesh, rules=rules, name="vision")
        project = as_linen(make_projector, mesh=self.mesh, rules=rules, name="projector")
        return nn.Dense(5, name="head")(project(vision(pixel_values)).mean(-2))


@pytest.fixture(scope="module")
def variables():
    return Classifier().init(jax.random.key(0), PIXELS)


def with_leaves(module, params):
    """The module with Linen's parameters for leaves."""
    paths, structure = jax.tree_util.tree_flatten_with_path(eqx.filter(module, eqx.is_array))
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]
    assert set(names) == set(params)
    leaves = jax.tree.unflatten(structure, [params[name] for name in names])
    return eqx.combine(leaves, eqx.filter(module, eqx.is_array, inverse=True))


def test_apply_is_the_module_on_linens_parameters(variables):
    params = nn.unbox(variables)["params"]
    vision = with_leaves(make_vision(jax.random.key(1)), params["vision"])
    projector = with_leaves(make_projector(jax.random.key(1)), params["projector"])
    pooled = projector(vision(PIXELS)).mean(-2)
    expected = pooled @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(Classifier().apply(variables, PIXELS), expected, rtol=1e-5)


def test_init_draws_what_the_module_draws(variables):
    """Weights have the configured spread, norms are ones, and another key gives other weights."""
    params = nn.unbox(variables)["params"]["vision"]
    np.testing.assert_array_equal(params["layernorm_pre.weight"], 1)
    spread = jnp.std(params["model.blocks.mlp.fc1"])
    np.testing.assert_allclose(spread, VISION.initializer_range, rtol=0.05)
    other = nn.unbox(Classifier().init(jax.random.key(1), PIXELS))["params"]["vision"]
    assert not np.allclose(params["model.blocks.mlp.fc1"], other["model.blocks.mlp.fc1"])


def test_gradients_reach_every_parameter(variables):
    loss = jax.jit(jax.grad(lambda v: (Classifier().apply(v, PIXELS) ** 2).sum()))
    for path, gradient in jax.tree_util.tree_leaves_with_path(nn.unbox(loss(variables))):
        # A bias common to all keys shifts every score alike, which the softmax ignores.
        assert np.abs(gradient).max() > 0 or "k_bias" in jax.tree_util.keystr(path)


def test_dropout_is_on_with_its_key():
    config = dataclasses.replace(VISION, projector_dropout=0.5)
    model = as_linen(lambda key: VisionModel(config, key=key))
    variables = model.init(jax.random.key(0), PIXELS)
    plain = model.apply(variables, PIXELS)
    dropped = [
        model.apply(variables, PIXELS, rngs={"dropout": jax.random.key(seed)}) for seed in (1, 1, 2)
    ]
    np.testing.assert_array_equal(dropped[0], dropped[1])
    assert not np.allclose(dropped[0], dropped[2])
    assert not np.allclose(dropped[0], plain)


def test_on_a_mesh(variables):
    """Parameters are born sharded by their axis words, and the output is that of one device."""
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    model = Classifier(mesh)
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(model.init, jax.random.key(0), PIXELS)
        specs = nn.get_partition_spec(shapes)
        assert specs["params"]["vision"]["model.blocks.mlp.fc1"] == PartitionSpec(
            "layers", "vision_ff", "vision_hidden"
        )
        shardings = nn.logical_to_mesh_sharding(specs, mesh, RULES)
        pixels = jax.device_put(PIXELS, NamedSharding(mesh, PartitionSpec("data")))
        sharded = jax.jit(model.init, out_shardings=shardings)(jax.random.key(0), pixels)
        fc1 = nn.unbox(sharded)["params"]["vision"]["model.blocks.mlp.fc1"]
        assert fc1.addressable_shards[0].data.shape[1] == VISION.intermediate_size // 2
        for ours, whole in zip(jax.tree.leaves(sharded), jax.tree.leaves(variables), strict=True):
            np.testing.assert_allclose(ours, whole, rtol=1e-5, atol=1e-7)
        out = jax.jit(model.apply)(sharded, pixels)
    np.testing.assert_allclose(out, Classifier().apply(variables, PIXELS), rtol=1e-4, atol=1e-6)
