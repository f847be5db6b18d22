"""The house's own rules: floors, one vocabulary, complete tables, light imports."""

import ast
import re
import subprocess
import sys
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import torch
import transformers

import llama4_eqx as l4
from llama4_eqx import tensor_names
from llama4_eqx.axes import axis_words
from tests.toys import MULTIMODAL, TOYS

PACKAGE = Path(l4.__file__).parent
FLOORS = (
    ("hf_config", "axes", "processes", "tensor_files", "programs"),
    ("config", "sums"),
    ("layers",),
    ("projector", "decoder"),
    ("vision", "parallel"),
    ("model", "processing"),
    ("tensor_names", "sampling", "sharding"),
    ("checkpoint", "generate", "linen", "losses", "balance", "train", "data"),
    ("meta", "lora", "resume"),
    ("__init__",),
)
AXES = set(
    "batch seq vocab hidden heads kv_heads head_dim ff q_seq kv_seq slots tokens experts top_k "
    "layers pairs size in_features out_features new group q_block kv_block q_blocks kv_blocks 2 "
    "tiles channels height width patch patches vision_hidden vision_ff vision_mid vision_out "
    "image_tokens shuffled rows rank columns devices ...".split()
)


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path, ast.parse(path.read_text())


def test_imports_go_down():
    floor_of = {name: level for level, names in enumerate(FLOORS) for name in names}
    assert {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path, _ in modules()} == set(
        floor_of
    )
    for path, tree in modules():
        here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llama4_eqx"):
                for there in [*node.module.split(".")[1:2]] or [a.name for a in node.names]:
                    same_room = here == there and here in ("layers", "processing")
                    assert same_room or floor_of[there] < floor_of[here], f"{path}: {there}"


def test_axis_words_are_the_vocabulary():
    pattern = re.compile(r'(?:Float|Int|Bool|Shaped)\[[^"\]]*,\s*"([^"]*)"\]')
    for path, _ in modules():
        for axes in pattern.findall(path.read_text()):
            unknown = {axis.lstrip("#*") for axis in axes.split()} - AXES
            assert not unknown, f"{path}: {unknown} in {axes!r}"


def test_every_public_thing_has_a_docstring():
    for path, tree in modules():
        for node in tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}:{node.lineno} {node.name}"


@pytest.mark.parametrize("config", [l4.Llama4Config.scout(), l4.Llama4Config.maverick()])
def test_full_size_tables_are_complete(config):
    """Each tensor that `transformers` has, by name and shape, is one place in one leaf of ours."""
    started = time.monotonic()
    model = eqx.filter_eval_shape(l4.Llama4, config, key=jax.random.key(0))
    ours = tensor_names.tensors(model, text_prefix="language_model.")
    with torch.device("meta"):
        theirs = transformers.Llama4ForConditionalGeneration(
            transformers.Llama4Config(**config.to_hf())
        ).state_dict()
    assert {tensor.name: tensor.shape for tensor in ours} == {
        name: tuple(tensor.shape) for name, tensor in theirs.items()
    }
    assert len(ours) == len({tensor.name for tensor in ours})
    places = {(tensor.leaf, tensor.stack_index) for tensor in ours}
    assert len(places) == len(ours)
    leaves = jax.tree.leaves(model)
    assert {leaf for leaf, _ in places} == set(range(len(leaves)))
    assert sum(leaf.size for leaf in leaves) == sum(tensor.numel() for tensor in theirs.values())
    print(f"{len(ours)} tensors in {time.monotonic() - started:.1f} s")


@pytest.mark.parametrize("config", [*map(l4.Llama4Config, TOYS.values()), MULTIMODAL])
def test_tables_speak_the_annotations_words(config):
    """The tables' axes, without parentheses, are those of the leaf's annotation."""
    model = eqx.filter_eval_shape(l4.Llama4, config, key=jax.random.key(0))
    whole = tensor_names.TEXT | tensor_names.PROJECTOR
    whole |= {f"vision_model.{leaf}": row for leaf, row in tensor_names.VISION.items()}
    for leaf, words in axis_words(model).items():
        axes = " ".join(words).removeprefix("layers ")
        in_text = re.sub(r"decoder\.(blocks|tail)\.layers\.\d+\.", "", leaf)
        in_vision = leaf.removeprefix("vision_model.model.layers.")
        if leaf in whole:
            _, table_axes = whole[leaf]
        elif in_text != leaf:
            _, table_axes = tensor_names.TEXT_LAYER[in_text]
        else:
            _, table_axes = tensor_names.VISION_LAYER[in_vision]
        assert re.sub(r"[()]", "", table_axes) == axes, leaf


def test_every_array_is_a_parameter():
    model = l4.Llama4(l4.Llama4Config.tiny(), key=jax.random.key(0))
    assert all(eqx.is_inexact_array(leaf) for leaf in jax.tree.leaves(model))


def test_importing_is_light():
    code = "import sys, llama4_eqx; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    heavy = set("torch transformers tokenizers tiktoken tqdm flax orbax grain PIL".split())
    assert not heavy & {name.split(".")[0] for name in loaded.stdout.split()}


def test_initialisation_has_the_configured_spread():
    model = l4.Llama4(l4.Llama4Config.tiny(), key=jax.random.key(0))
    for leaf in jax.tree.leaves(model):
        expected = 0.02 if leaf.ndim > 2 or leaf.shape[-1] != leaf.size else None
        if expected and leaf.size > 10_000:
            assert abs(float(jnp.std(leaf)) - expected) < 0.001
