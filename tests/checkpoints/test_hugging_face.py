"""Checkpoint folders: exchanged with `transformers`, sharded, damaged, and interrupted."""

import json
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

import llama4_eqx as l4
from tests.test_invariants import random_model
from tests.toys import MULTIMODAL, SCOUT, TOYS, reference_model

pytestmark = pytest.mark.slow


def same(a, b) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.mark.parametrize("name", TOYS)
def test_saved_equals_loaded_equals_what_transformers_loads(name, tmp_path):
    model = random_model(TOYS[name])
    l4.save_checkpoint(model, tmp_path / "ours")
    assert same(l4.load_checkpoint(tmp_path / "ours"), model)
    reference, info = transformers.Llama4ForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    reference.save_pretrained(tmp_path / "theirs")
    assert same(jax.tree.leaves(l4.load_checkpoint(tmp_path / "theirs")), jax.tree.leaves(model))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dtypes(dtype, tmp_path):
    model = jax.tree.map(lambda leaf: leaf.astype(dtype), random_model(SCOUT))
    l4.save_checkpoint(model, tmp_path / "model")
    assert same(l4.load_checkpoint(tmp_path / "model"), model)
    wide = l4.load_checkpoint(tmp_path / "model", dtype=jnp.float32)
    assert same(wide, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model))
    reference = transformers.Llama4ForCausalLM.from_pretrained(tmp_path / "model")
    assert str(reference.dtype) == f"torch.{jnp.dtype(dtype).name}"


def test_sharded_by_us_and_by_transformers(tmp_path):
    model = random_model(SCOUT)
    l4.save_checkpoint(model, tmp_path / "ours", max_shard_bytes=300_000)
    shards = sorted((tmp_path / "ours").glob("*.safetensors"))
    assert len(shards) > 5
    index = json.loads((tmp_path / "ours/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    assert same(l4.load_checkpoint(tmp_path / "ours", progress=True), model)
    reference = transformers.Llama4ForCausalLM.from_pretrained(tmp_path / "ours")
    reference.save_pretrained(tmp_path / "theirs", max_shard_size="300KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 5
    assert same(jax.tree.leaves(l4.load_checkpoint(tmp_path / "theirs")), jax.tree.leaves(model))


def test_parts_of_a_multimodal_checkpoint(tmp_path):
    reference = reference_model(MULTIMODAL)
    reference.save_pretrained(tmp_path / "whole")
    reference.language_model.save_pretrained(tmp_path / "text")
    whole = l4.load_checkpoint(tmp_path / "whole")

    text = l4.load_checkpoint(tmp_path / "whole", part="text")
    assert text.vision_model is None
    assert text.config.vision_config is None
    assert same(text.decoder, whole.decoder)
    text_only = l4.load_checkpoint(tmp_path / "text")
    assert same(jax.tree.leaves(text), jax.tree.leaves(text_only))

    vision = l4.load_checkpoint(tmp_path / "whole", part="vision")
    assert isinstance(vision.embed_tokens, jax.ShapeDtypeStruct)
    pixels = jnp.ones((1, 3, 28, 28))
    truth = l4.encode_images(whole, pixels)
    assert np.array_equal(l4.encode_images(vision, pixels), truth)
    with pytest.raises(l4.CheckpointError, match="text-only"):
        l4.load_checkpoint(tmp_path / "text", part="vision")

    l4.save_checkpoint(whole, tmp_path / "ours", max_shard_bytes=400_000)
    assert same(jax.tree.leaves(l4.load_checkpoint(tmp_path / "ours")), jax.tree.leaves(whole))
    _, info = transformers.Llama4ForConditionalGeneration.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info.values()), info


@pytest.fixture
def folder(tmp_path):
    """A good checkpoint in several files."""
    l4.save_checkpoint(random_model(SCOUT), tmp_path / "model", max_shard_bytes=800_000)
    return tmp_path / "model"


def shard_with(folder, name):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][name]


def edit(folder, name, change):
    """Applies a change to the dict of tensors in the file that holds `name`."""
    path = shard_with(folder, name)
    content = load_file(path)
    change(content)
    save_file(content, path)


def test_everything_wrong_is_listed_at_once(folder):
    norm, router = "model.norm.weight", "model.layers.2.feed_forward.router.weight"
    edit(folder, norm, lambda content: content.update({"mystery.weight": content.pop(norm)}))
    edit(folder, router, lambda content: content.update({router: content[router].T.copy()}))
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    weight_map["mystery.weight"] = weight_map.pop(norm)
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(l4.CheckpointError) as error:
        l4.load_checkpoint(folder)
    told = str(error.value)
    assert f"{norm} is missing" in told
    assert "mystery.weight is surplus" in told
    assert f"{router} has shape (64, 4), but must have (4, 64)" in told


def test_mixed_and_foreign_dtypes(folder):
    name = "model.layers.2.self_attn.q_proj.weight"
    edit(folder, name, lambda c: c.update({name: c[name].astype(np.float16)}))
    with pytest.raises(l4.CheckpointError, match="differs in dtype from other layers: pass dtype="):
        l4.load_checkpoint(folder)
    l4.load_checkpoint(folder, dtype=jnp.float32)
    edit(folder, name, lambda c: c.update({name: c[name].astype(np.int8)}))
    with pytest.raises(l4.CheckpointError, match="is I8, but must be one of F32, BF16, F16"):
        l4.load_checkpoint(folder)


def test_truncated_and_missing_files(folder):
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-100])
    second.unlink()
    with pytest.raises(l4.CheckpointError) as error:
        l4.load_checkpoint(folder)
    assert f"file {first.name} is truncated or damaged" in str(error.value)
    assert f"file {second.name} is missing" in str(error.value)


def test_damaged_index(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ')
    with pytest.raises(l4.CheckpointError, match="is damaged"):
        l4.load_checkpoint(folder)


def test_an_index_cannot_point_outside_the_folder(folder):
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    shutil.move(folder / weight_map["lm_head.weight"], folder.parent / "elsewhere.safetensors")
    moved = {
        name: "../elsewhere.safetensors" if file == weight_map["lm_head.weight"] else file
        for name, file in weight_map.items()
    }
    index.write_text(json.dumps({"weight_map": moved}))
    with pytest.raises(l4.CheckpointError, match=r"elsewhere\.safetensors is missing"):
        l4.load_checkpoint(folder)


def test_no_weights_at_all(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SCOUT.to_hf()))
    with pytest.raises(FileNotFoundError, match="has neither"):
        l4.load_checkpoint(tmp_path)


def test_overwriting_needs_to_be_asked_for_and_keeps_other_files(folder):
    (folder / "tokenizer.json").write_text("{}")
    (folder / "sub").mkdir()
    (folder / "sub/notes.txt").write_text("mine")
    other = random_model(SCOUT, seed=1)
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        l4.save_checkpoint(other, folder)
    l4.save_checkpoint(other, folder, overwrite=True)
    assert same(l4.load_checkpoint(folder), other)
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "sub"}
    assert (folder / "sub/notes.txt").read_text() == "mine"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_full_disk_loses_nothing(folder):
    """Full is here the largest size that a file may have."""
    before, other = l4.load_checkpoint(folder), random_model(SCOUT, seed=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large.*unchanged"):
            l4.save_checkpoint(other, folder, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert same(l4.load_checkpoint(folder), before)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


PEAK = """
import resource, sys, jax
import llama4_eqx as l4
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = l4.load_checkpoint(sys.argv[1])
jax.block_until_ready(jax.tree.leaves(model))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((peak - base) * 1024)
"""


def test_peak_memory_of_loading(tmp_path):
    """At most the model and one layer (here an eighth of it), besides what compiling takes."""
    config = replace(SCOUT, num_hidden_layers=8, hidden_size=1024, intermediate_size=1024)
    model = l4.Llama4(l4.Llama4Config(config), key=jax.random.key(0))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    assert size > 400e6
    l4.save_checkpoint(model, tmp_path / "model", max_shard_bytes=50_000_000)
    del model
    out = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "model")],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    overhead = int(out.stdout) - size
    print(f"model {size / 1e6:.0f} MB, overhead {overhead / 1e6:.0f} MB")
    assert overhead < size / 8 + 120e6
