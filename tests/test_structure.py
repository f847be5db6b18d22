"""The house's own rules: floors, one vocabulary, complete tables, light imports."""

import ast
import graphlib
import importlib
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
from llama4_eqx.axes import GLOSSARY, axis_words, leaf_name
from llama4_eqx.checkpoints import tensor_names
from tests.toys import MULTIMODAL, TOYS

PACKAGE = Path(l4.__file__).parent
# From the bottom up. An import goes to a lower floor, or to another file of the same folder.
FLOORS = (
    ("argument_checks", "axes", "config_file", "lowering", "run_time_checks", "processing"),
    ("config_checks", "hf_config", "input_checks", "layers", "linen", "shape_checks", "summary"),
    ("text_config", "vision_config"),
    ("config",),
    ("decoder_layer", "kv_cache"),
    ("decoder_block", "projector"),
    ("decoder",),
    ("vision",),
    ("parallel",),
    ("model",),
    ("distributed", "generation", "quantization", "regraft", "research"),
    ("training",),
    ("checkpoints",),
    ("__init__",),
)
# Words of the annotations that aren't axes of a parameter or of the model's interface.
LOCAL_AXES = set(
    "size in_features out_features new group shuffled devices q_block kv_block q_blocks kv_blocks "
    "n positions kinds texts beams states failures shape ...".split()
)
# Names that the field has another word for. In prose some of them are plain English.
RETIRED = set(
    "across Across ALONE enter leave alike gathered own_key cut split dispatched SLACK chosen "
    "EXPERT EXCHANGE Report average averaged_model selection_bias balance rebalanced _summed "
    "Keep keep kept Places places in_order visible Filled Keys followed_by _keeps_to_itself "
    "born_sharded laid_out spread on_mesh together programs tensor_files RunCheckpoints "
    "DataPosition hidden_states choose_experts".split()
)


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path, ast.parse(path.read_text())


def room(path: Path) -> str:
    """The root's file or folder that the file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_imports_go_down():
    floor_of = {name: level for level, names in enumerate(FLOORS) for name in names}
    assert {room(path) for path, _ in modules()} == set(floor_of)
    for path, tree in modules():
        here = room(path)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llama4_eqx"):
                for there in [*node.module.split(".")[1:2]] or [a.name for a in node.names]:
                    same_folder = here == there and path.parent != PACKAGE
                    assert same_folder or floor_of[there] < floor_of[here], f"{path}: {there}"


def test_no_circles_within_folders():
    imports = {}
    for path, tree in modules():
        if path.name != "__init__.py":
            name = ".".join(("llama4_eqx", *path.relative_to(PACKAGE).with_suffix("").parts))
            imports[name] = {
                node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
            }
    graphlib.TopologicalSorter(imports).prepare()  # raises for a circle


def test_training_knows_no_checkpoints():
    """And a run's checkpoints don't know the reader of Hugging Face folders."""
    for path, tree in modules():
        imported = {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        if room(path) == "training":
            assert not {m for m in imported if "checkpoints" in m or m.endswith("hlo")}, path
        if path.name == "training_run.py":
            assert not {m for m in imported if "hugging_face" in m or "tensor_names" in m}


def test_axis_words_are_the_glossarys():
    pattern = re.compile(r'(?:Float|Int|Int32|Bool|Shaped)\[[^"\]]*,\s*"([^"]*)"\]')
    used = set()
    for path, _ in modules():
        for axes in pattern.findall(path.read_text()):
            words = {axis.lstrip("#*") for axis in axes.split()}
            unknown = words - set(GLOSSARY) - LOCAL_AXES
            assert not unknown, f"{path}: {unknown} in {axes!r}"
            used |= words
    assert set(GLOSSARY) <= used | {"layers"}


def test_the_glossary_has_scouts_sizes():
    model = eqx.filter_eval_shape(l4.Llama4, l4.Llama4Config.scout(), key=jax.random.key(0))
    words, sizes = axis_words(model), {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        for word, size in zip(words[leaf_name(path)], leaf.shape, strict=True):
            sizes.setdefault(word, set()).add(size)
    assert sizes == {word: set(known) for word, (_, known) in GLOSSARY.items() if known}


def test_retired_names_are_gone():
    """Among what is defined: functions, classes, arguments and fields."""
    for path, tree in modules():
        if room(path) == "processing":  # no arrays, no devices: its words are others
            continue
        defined = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                defined.add(node.name)
            elif isinstance(node, ast.arg):
                defined.add(node.arg)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                defined.add(node.target.id)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                defined.add(node.id)
        assert not defined & RETIRED, path


def test_public_names_have_one_documented_place():
    """Each public class and function of a folder's files is named in its `__init__`, or its file
    is; what is named exists."""
    for folder in ("checkpoints", "distributed", "generation", "training", "processing"):
        face = (PACKAGE / folder / "__init__.py").read_text()
        package = importlib.import_module(f"llama4_eqx.{folder}")
        named = set(re.findall(r"import (\w+) as \1", face))
        assert all(hasattr(package, name) for name in named)
        assert named, folder
    for name in re.findall(r"import (\w+) as \1", (PACKAGE / "__init__.py").read_text()):
        assert getattr(l4, name).__doc__, name


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
    halves = {}
    for tensor in ours:
        halves.setdefault(tensor.name, []).append(tensor.half)
    assert all(half in ([None], [0, 1]) for half in halves.values())
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
        in_text = re.sub(r"decoder\.blocks\.\d+\.layers\.\d+\.", "", leaf)
        in_vision = leaf.removeprefix("vision_model.model.blocks.")
        if leaf in whole:
            _, table_axes = whole[leaf]
        elif in_text != leaf:
            _, table_axes = tensor_names.TEXT_LAYER[in_text]
        else:
            _, table_axes = tensor_names.VISION_LAYER[in_vision]
        assert re.sub(r"[()]|\| … |… \| | \| …", "", table_axes).strip() == axes, leaf


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
