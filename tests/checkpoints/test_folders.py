"""Checkpoint folders as they come: opened as `transformers` opens them, or named."""

import dataclasses
import json
import os
import pickle
import re
import shutil

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import llama4_eqx as l4
from llama4_eqx.checkpoints import GenerationConfig, load_generation_config
from tests.checkpoints.test_hugging_face import same
from tests.toys import MULTIMODAL, SCOUT

TEXT = dataclasses.replace(SCOUT, num_hidden_layers=2, hidden_size=32)
SMALL = l4.Llama4Config(TEXT)
TIED = l4.Llama4Config(dataclasses.replace(TEXT, tie_word_embeddings=True))
PICTURES = dataclasses.replace(
    MULTIMODAL,
    text_config=TEXT,
    vision_config=dataclasses.replace(MULTIMODAL.vision_config, num_hidden_layers=1),
)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def random_model(config):
    shapes = eqx.filter_eval_shape(l4.Llama4, config, key=jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(
            rng.normal(1 if leaf.ndim < 3 else 0, 0.2, leaf.shape), leaf.dtype
        ),
        shapes,
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Models and the folders that we save them to."""
    root = tmp_path_factory.mktemp("models")
    found = {}
    for name, config in (("text", SMALL), ("tied", TIED), ("pictures", PICTURES)):
        found[name] = random_model(config)
        l4.save_checkpoint(found[name], root / name)
    return root, found


@pytest.fixture
def text(models, tmp_path):
    shutil.copytree(models[0] / "text", tmp_path / "model")
    return tmp_path / "model", models[1]["text"]


def write(folder, tensors, file=SINGLE):
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    save_file({n: np.ascontiguousarray(t) for n, t in tensors.items()}, folder / file)


def copy(models, name, target, rename=lambda tensors: tensors):
    """A folder with the config of a model, and its tensors renamed."""
    shutil.copytree(models[0] / name, target)
    write(target, rename(load_file(target / SINGLE)))
    return target


def their_logits(folder, cls=transformers.Llama4ForCausalLM, *, complete=True):
    model, info = cls.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    assert not (complete and info["missing_keys"]), info
    with torch.no_grad():
        return model.eval()(torch.arange(12)[None]).logits[0].numpy()


def agrees(model, folder) -> bool:
    """Whether the logits are those of `transformers` for the folder."""
    return np.allclose(model(jnp.arange(12)).logits, their_logits(folder), atol=2e-4)


def shards(folder, tensors, subfolder=""):
    """Writes the tensors in two files with an index."""
    weight_map = {}
    for number, names in enumerate((list(tensors)[::2], list(tensors)[1::2]), start=1):
        file = f"{subfolder}model-0000{number}-of-00002.safetensors"
        write(folder, {name: tensors[name] for name in names}, file)
        weight_map |= dict.fromkeys(names, file)
    (folder / SINGLE).unlink(missing_ok=True)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


# Where files disagree


def test_a_single_file_goes_before_shards_and_an_index(text, models):
    folder, model = text
    old = {name: tensor + 1 for name, tensor in load_file(folder / SINGLE).items()}
    shards(folder, old)
    assert not same(l4.load_checkpoint(folder), model)
    shutil.copy(models[0] / "text" / SINGLE, folder)
    assert same(l4.load_checkpoint(folder), model)
    assert agrees(model, folder)
    (folder / INDEX).write_text("{")  # a damaged index beside it changes nothing, as there
    assert same(l4.load_checkpoint(folder), model)
    assert agrees(model, folder)


def test_an_index_that_names_the_wrong_file_for_each_tensor(text):
    folder, model = text
    weight_map = shards(folder, load_file(folder / SINGLE))
    first, second = sorted(set(weight_map.values()))
    wrong = {name: second if file == first else first for name, file in weight_map.items()}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": wrong}))
    assert same(l4.load_checkpoint(folder), model)
    assert agrees(model, folder)


def test_an_index_of_older_files(text):
    """Names a file and a tensor that aren't there."""
    folder, _ = text
    weight_map = shards(folder, load_file(folder / SINGLE))
    file = next(iter(weight_map.values()))
    stale = weight_map | {"model.layers.9.x": file, "model.layers.8.x": "model-3.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": stale}))
    with pytest.raises(l4.CheckpointError) as error:
        l4.load_checkpoint(folder)
    assert "file model-3.safetensors is missing" in str(error.value)
    assert f"model.layers.9.x is not in {file}, where the index says it is" in str(error.value)


@pytest.mark.parametrize("subfolder", ["weights/", "a/b/", "./"])
def test_shards_in_subfolders(subfolder, text):
    folder, model = text
    shards(folder, load_file(folder / SINGLE), subfolder)
    assert same(l4.load_checkpoint(folder), model)
    assert agrees(model, folder)


@pytest.mark.parametrize("escape", ["../outside/", "sub/../../outside/", "{}/outside/"])
def test_shards_outside_the_folder_are_refused(escape, text):
    folder, _ = text
    escape = escape.format(folder.parent)
    (folder / "sub").mkdir()
    shards(folder, load_file(folder / SINGLE), escape)
    with pytest.raises(l4.CheckpointError, match=r"\.safetensors is missing: it isn't inside"):
        l4.load_checkpoint(folder)


def test_links_to_files_elsewhere(text):
    """As in Hugging Face's cache."""
    folder, model = text
    (folder.parent / "blobs").mkdir()
    for name in ("config.json", SINGLE):
        os.rename(folder / name, folder.parent / "blobs" / name)
        (folder / name).symlink_to(f"../blobs/{name}")
    assert same(l4.load_checkpoint(folder), model)
    for name in (SINGLE, "config.json"):
        (folder.parent / "blobs" / name).unlink()
        pattern = f"{name} is a link to a file that is missing: finish the download"
        with pytest.raises(FileNotFoundError, match=pattern):
            l4.load_checkpoint(folder)
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    with pytest.raises(l4.CheckpointError, match=r"config\.json is a folder, but must be a file"):
        l4.load_checkpoint(folder)


def test_one_tensor_in_two_files(text):
    folder, _ = text
    tensors = load_file(folder / SINGLE)
    weight_map = shards(folder, tensors)
    other = next(file for file in weight_map.values() if file != weight_map[HEAD])
    content = load_file(folder / other)
    write(folder, content | {HEAD: tensors[HEAD] + 1}, other)
    with pytest.raises(l4.CheckpointError, match=f"{HEAD} is in both model-0000.* and model-0000"):
        l4.load_checkpoint(folder)


# Prefixes


def without(prefix):
    return lambda tensors: {name.removeprefix(prefix): t for name, t in tensors.items()}


def with_prefix(prefix):
    return lambda tensors: {prefix + name: t for name, t in tensors.items()}


@pytest.mark.parametrize("config", ["text", "pictures"])
@pytest.mark.parametrize("files", ["text", "pictures"])
def test_text_from_either_kind_of_files_under_either_kind_of_config(
    config, files, models, tmp_path
):
    folder = copy(models, config, tmp_path / "x", lambda _: load_file(models[0] / files / SINGLE))
    truth = their_logits(folder)
    part = "text" if config == "pictures" else "whole"
    model = l4.load_checkpoint(folder, part=part)
    assert model.vision_model is None
    assert np.allclose(model(jnp.arange(12)).logits, truth, atol=2e-4)
    if (config, files) == ("pictures", "text"):
        with pytest.raises(l4.CheckpointError, match=r"vision .* are missing: pass part=\"text\""):
            l4.load_checkpoint(folder)


@pytest.mark.parametrize(
    ("config", "rename"),
    [
        ("text", with_prefix("language_model.")),
        ("text", with_prefix("model.")),
        ("tied", without("model.")),
        ("pictures", with_prefix("model.")),
        ("pictures", without("language_model.")),
        (
            "pictures",
            lambda tensors: {
                name.removeprefix("language_model.")
                if name.endswith(HEAD)
                else f"model.{name}".replace("language_model.model.", "language_model."): tensor
                for name, tensor in tensors.items()
            },
        ),
    ],
    ids=["language_model", "model", "none", "model-pictures", "half", "newer"],
)
def test_prefixes(config, rename, models, tmp_path):
    """Whatever the prefix is, the names show which tensors are meant."""
    folder = copy(models, config, tmp_path / "x", rename)
    assert same(l4.load_checkpoint(folder), models[1][config])


@pytest.mark.parametrize(
    "rename",
    [
        with_prefix("module."),
        with_prefix("_orig_mod."),
        lambda tensors: {
            re.sub(
                r"(layers\.\d+\.)", r"\1_fsdp_wrapped_module._checkpoint_wrapped_module.", name
            ): t
            for name, t in tensors.items()
        },
    ],
    ids=["data-parallel", "compiled", "fsdp"],
)
@pytest.mark.parametrize("config", ["text", "pictures"])
def test_names_of_wrapped_modules(config, rename, models, tmp_path):
    """As torch's wrappers for training leave them in a state_dict."""
    folder = copy(models, config, tmp_path / "x", rename)
    assert same(l4.load_checkpoint(folder), models[1][config])
    if config == "pictures":
        part = l4.load_checkpoint(folder, part="vision")
        assert same(part.vision_model, models[1][config].vision_model)


def test_one_tensor_under_two_names(text):
    folder, _ = text
    tensors = load_file(folder / SINGLE)
    write(folder, tensors | {f"language_model.{HEAD}": tensors[HEAD]})
    with pytest.raises(l4.CheckpointError, match="are the same tensor: remove one of them"):
        l4.load_checkpoint(folder)


# Heads


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_tied_config_with_a_head(equal, dtype, models, tmp_path):
    def add_head(tensors):
        tensors = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
        return tensors | {HEAD: tensors[EMBEDDING] * dtype(1 if equal else 2)}

    folder = copy(models, "tied", tmp_path / "x", add_head)
    model = l4.load_checkpoint(folder, dtype=jnp.float32)
    assert model.config.text_config.tie_word_embeddings == equal
    assert (model.lm_head is None) == equal
    reference = transformers.Llama4ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tied = reference.lm_head.weight.data_ptr() == reference.model.embed_tokens.weight.data_ptr()
    assert tied == equal
    head = model.embed_tokens if equal else model.lm_head
    assert np.array_equal(head, reference.lm_head.weight.detach())
    l4.save_checkpoint(model, tmp_path / "again")
    assert same(l4.load_checkpoint(tmp_path / "again"), model)


def test_a_tied_config_with_the_head_alone(models, tmp_path):
    def rename(tensors):
        return {HEAD if name == EMBEDDING else name: tensor for name, tensor in tensors.items()}

    folder = copy(models, "tied", tmp_path / "x", rename)
    model = l4.load_checkpoint(folder)
    assert same(model, models[1]["tied"])
    assert agrees(model, folder)


def test_an_untied_config_without_a_head_is_refused(text):
    """`transformers` would fill the head with random numbers."""
    folder, _ = text
    tensors = load_file(folder / SINGLE)
    del tensors[HEAD]
    write(folder, tensors)
    with pytest.raises(l4.CheckpointError, match=r"doesn't tie it .* set tie_word_embeddings to t"):
        l4.load_checkpoint(folder)


# Experts and tables


def unfused(tensors, *, dtype=None):
    """A `Linear` for each expert: `[out, in]`."""
    out = {}
    for name, tensor in tensors.items():
        base, _, kind = name.rpartition(".")
        if not base.endswith(".experts"):
            out[name] = tensor
            continue
        for e, matrix in enumerate(tensor):
            gate_up = zip(("gate_proj", "up_proj"), np.split(matrix, 2, -1), strict=False)
            for part, w in dict(gate_up if kind == "gate_up_proj" else [(kind, matrix)]).items():
                out[f"{base}.{e}.{part}.weight"] = w.T
    return out


@pytest.mark.parametrize("config", ["text", "pictures"])
@pytest.mark.parametrize("sharded", [False, True])
def test_experts_saved_one_by_one(config, sharded, models, tmp_path):
    folder = copy(models, config, tmp_path / "x", unfused)
    assert len(load_file(folder / SINGLE)) > 24
    if sharded:  # neighbours lie in different files
        shards(folder, load_file(folder / SINGLE))
    assert same(l4.load_checkpoint(folder), models[1][config])


def test_experts_saved_one_by_one_on_a_mesh(models, tmp_path):
    folder = copy(models, "text", tmp_path / "x", unfused)
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    for rules in ({"experts": "b", "ff": "a"}, {"hidden": "b", "layers": "a"}):
        model = l4.load_checkpoint(folder, mesh=mesh, rules=rules)
        leaves = zip(jax.tree.leaves(model), jax.tree.leaves(models[1]["text"]), strict=True)
        assert all(np.array_equal(ours, truth) for ours, truth in leaves)


def test_experts_that_are_missing_or_too_many(text):
    folder, _ = text
    tensors = unfused(load_file(folder / SINGLE))
    layer = "model.layers.0.feed_forward.experts."
    extra = {
        f"{layer}4.{part}_proj.weight": tensors[f"{layer}3.{part}_proj.weight"]
        for part in ("up", "down")
    }
    wrong = {f"{layer}1.up_proj.weight": tensors[f"{layer}1.up_proj.weight"].T}
    tensors = tensors | extra | wrong
    del tensors[f"{layer}2.gate_proj.weight"]
    write(folder, tensors)
    with pytest.raises(l4.CheckpointError) as error:
        l4.load_checkpoint(folder)
    told = str(error.value)
    assert f"{layer}2.gate_proj.weight is missing" in told
    assert f"{layer}4.down_proj.weight is surplus: the config has 4 experts" in told
    assert f"{layer}1.up_proj.weight has shape (32, 96), but must have (96, 32)" in told


def test_tables_that_transformers_once_stored(models, tmp_path):
    tables = {
        "text": ["model.rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.inv_freq"],
        "pictures": [
            "language_model.model.rotary_emb.inv_freq",
            "vision_model.rotary_embedding.freqs_ci",
        ],
    }
    for config, names in tables.items():
        extra = {name: np.ones(8, np.float32) for name in names}
        folder = copy(models, config, tmp_path / config, lambda tensors, e=extra: tensors | e)
        assert same(l4.load_checkpoint(folder), models[1][config])


def test_lists_are_capped(text):
    folder, _ = text
    write(folder, {"a": np.ones(1, np.float32)})
    with pytest.raises(l4.CheckpointError) as error:
        l4.load_checkpoint(folder)
    assert len(str(error.value).splitlines()) <= 22
    write(folder, {str(i): np.ones(1, np.float32) for i in range(1000)} | {HEAD: np.ones((1, 1))})
    with pytest.raises(l4.CheckpointError, match=r"\n- … and \d\d\d+ more$") as error:
        l4.load_checkpoint(folder)
    assert len(str(error.value).splitlines()) == 22


# What isn't a checkpoint of this model

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4000000000\n"


def files(**content):
    """Makes a folder with these files; `None` removes one of a good checkpoint."""

    def change(folder):
        for name, text in content.items():
            path = folder / name.replace("__", ".")
            if text is None:
                path.unlink()
            else:
                path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return folder

    return change


def huge(name, start=b""):
    """A file of a terabyte, with holes: reading it would take all memory."""

    def change(folder):
        with (folder / name).open("wb") as file:
            file.write(start)
            file.truncate(2**40)
        (folder / SINGLE).unlink()
        return folder

    return change


ADAPTER = '{"base_model_name_or_path": "meta-llama/Llama-4-Scout", "peft_type": "LORA"}'
MISTRAL = '{"model_type": "mistral", "architectures": ["MistralForCausalLM"], "hidden_size": 64}'
OTHERS = {
    "gguf-file": (lambda f: huge("m.gguf", b"GGUF")(f) / "m.gguf", ValueError, "is a GGUF file"),
    "gguf-by-content": (
        lambda f: files(weights=b"GGUF\3\0\0\0")(f) / "weights",
        ValueError,
        "is a GGUF file, which isn't supported",
    ),
    "gguf-folder": (huge("m.gguf", b"GGUF"), FileNotFoundError, r"holds a GGUF file \(m\.gguf\)"),
    "lone-file": (lambda f: f / SINGLE, ValueError, "is a single safetensors file"),
    "config-file": (lambda f: f / "config.json", ValueError, "is a file: give the folder"),
    "pickle-file": (
        lambda f: files(m__pth=pickle.dumps(1))(f) / "m.pth",
        ValueError,
        "pickled PyTorch file, which is never loaded",
    ),
    "adapter": (
        files(adapter_config__json=ADAPTER, **{SINGLE.replace(".", "__"): None}),
        ValueError,
        "holds an adapter of meta-llama/Llama-4-Scout, not a model",
    ),
    "adapter-and-model": (
        files(adapter_config__json=ADAPTER),
        ValueError,
        "both a model and an adapter of meta-llama",
    ),
    "pointer-weights": (
        files(model__safetensors=POINTER),
        ValueError,
        r"model\.safetensors is a Git LFS pointer",
    ),
    "pointer-config": (
        files(config__json=POINTER),
        ValueError,
        r"config\.json is a Git LFS pointer",
    ),
    "pointer-index": (
        files(model__safetensors=None, model__safetensors__index__json=POINTER),
        ValueError,
        r"index\.json is a Git LFS pointer",
    ),
    "pickled-weights": (huge("pytorch_model.bin"), FileNotFoundError, "holds pickled weights"),
    "download": (huge("x.incomplete"), FileNotFoundError, "holds an unfinished download"),
    "other-family": (files(config__json=MISTRAL), ValueError, "mistral"),
    "no-config": (
        files(config__json=None),
        FileNotFoundError,
        r"has no config\.json: it holds mod",
    ),
    "no-weights": (files(model__safetensors=None), FileNotFoundError, "has neither model.safetens"),
    "pointer-file": (
        lambda f: files(model__safetensors=POINTER)(f) / SINGLE,
        ValueError,
        r"model\.safetensors is a Git LFS pointer, not the file itself: run `git lfs pull`",
    ),
    "pickle-renamed": (
        files(model__safetensors=pickle.dumps({})),
        ValueError,
        r"file model\.safetensors is a pickled PyTorch file, which is never loaded",
    ),
    "zip-renamed": (
        files(model__safetensors=b"PK\3\4\0\0\x08\x08\0\0"),
        ValueError,
        r"file model\.safetensors is a pickled PyTorch file",
    ),
    "gguf-renamed": (
        files(model__safetensors=b"GGUF\3\0\0\0"),
        ValueError,
        r"file model\.safetensors is a GGUF file",
    ),
    "web-page": (
        files(model__safetensors="\n<!DOCTYPE html><html><head><title>Sign in</title>"),
        ValueError,
        r"file model\.safetensors is a web page, saved in the file's place: fetch it again",
    ),
    "message": (
        files(model__safetensors="Invalid username or password."),
        ValueError,
        r'is a text that begins "Invalid username or password\."',
    ),
    "message-of-lines": (
        files(model__safetensors='{\n  "error": "Access to this model is restricted"\n}'),
        ValueError,
        r'is a text that begins "{ "error": "Access to this model is restricted" }": fetch',
    ),
    "pickle-by-name": (
        lambda f: files(m__pth=bytes(16))(f) / "m.pth",
        ValueError,
        "pickled PyTorch file, which is never loaded",
    ),
    "empty-weights": (files(model__safetensors=""), ValueError, "is truncated or damaged|read"),
    "nothing": (lambda f: f / "nothing", FileNotFoundError, "There is no folder"),
    "metas": (
        files(params__json="{}", consolidated__00__pth=b"", config__json=None),
        FileNotFoundError,
        "Meta's own files, which `convert_meta_checkpoint` converts",
    ),
}


@pytest.mark.parametrize(("make", "kind", "words"), OTHERS.values(), ids=list(OTHERS))
def test_what_is_not_a_checkpoint_is_named(make, kind, words, text):
    path = make(text[0])
    with pytest.raises(kind, match=words) as error:
        l4.load_checkpoint(path)
    assert str(path) in str(error.value) or str(text[0]) in str(error.value)
    assert "Header(" not in str(error.value)


def test_empty_folders_links_and_runs(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="it is empty"):
        l4.load_checkpoint(tmp_path / "empty")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match="is a link to nowhere, which is missing"):
        l4.load_checkpoint(tmp_path / "link")
    (tmp_path / "run/100").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"use `TrainCheckpointer\.restore`"):
        l4.load_checkpoint(tmp_path / "run")


def test_arguments(text):
    folder, model = text
    for part in ("vison", "", "Text"):
        with pytest.raises(ValueError, match="part must be 'whole', 'text' or 'vision', not"):
            l4.load_checkpoint(folder, part=part)
    for dtype in ("float17", "int8", np.complex64, bool):
        with pytest.raises(ValueError, match="dtype must be a floating-point dtype"):
            l4.load_checkpoint(folder, dtype=dtype)
    assert same(l4.load_checkpoint(folder, dtype="float32"), model)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.float64])
def test_unreadable_dtypes_are_named(dtype, text):
    from safetensors.torch import load_file, save_file

    folder, _ = text
    tensors = load_file(folder / SINGLE)
    tensors[HEAD] = tensors[HEAD].to(dtype)
    save_file(tensors, folder / SINGLE)
    with pytest.raises(l4.CheckpointError, match=f"{HEAD} is [FI]\\w+, but must be one of F32, BF"):
        l4.load_checkpoint(folder)


# generation_config.json


def with_ids(**ids):
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return dataclasses.replace(TEXT, **dict(zip(names, (3, (7, 9), 4), strict=True)) | ids)


@pytest.mark.parametrize(
    "generation",
    [
        None,
        {"eos_token_id": 5},
        {"eos_token_id": [5, 6], "bos_token_id": 1, "pad_token_id": 2},
        {"eos_token_id": [5], "temperature": 0.6, "top_p": 0.9, "do_sample": True},
        {"temperature": 0.6},
        {},
    ],
)
def test_stop_ids_are_those_of_transformers(generation, tmp_path):
    """Loaded, saved elsewhere and saved over, with and without a file that says otherwise."""
    folder = tmp_path / "model"
    l4.save_checkpoint(random_model(l4.Llama4Config(with_ids())), folder)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))

    def their_stops(folder):
        theirs = transformers.Llama4ForCausalLM.from_pretrained(folder).generation_config
        stops = theirs.eos_token_id
        return tuple(stops) if isinstance(stops, list) else () if stops is None else (stops,)

    model = l4.load_checkpoint(folder)
    stops = model.config.text_config.stop_ids
    assert stops == their_stops(folder)
    l4.save_checkpoint(model, tmp_path / "elsewhere")
    l4.save_checkpoint(model, folder, overwrite=True)
    for saved in (folder, tmp_path / "elsewhere"):
        assert their_stops(saved) == stops
        assert l4.load_checkpoint(saved).config == model.config
    if generation is not None:
        ids = {"eos_token_id", "bos_token_id", "pad_token_id"}
        now = json.loads((folder / "generation_config.json").read_text())
        assert {k: v for k, v in now.items() if k not in ids} == {
            k: v for k, v in generation.items() if k not in ids
        }


def test_generation_stops_where_transformers_stops(text):
    folder, model = text
    prompt = jnp.arange(3, 9)
    free = l4.generate(model, prompt, max_new_tokens=8).tolist()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [free[2]]}))
    model = l4.load_checkpoint(folder)
    stops = model.config.text_config.stop_ids
    ours = l4.generate(model, prompt, max_new_tokens=8, stop_ids=stops).tolist()
    theirs = transformers.Llama4ForCausalLM.from_pretrained(folder)
    theirs = theirs.generate(torch.arange(3, 9)[None], max_new_tokens=8)[0, 6:].tolist()
    assert ours[: len(theirs)] == theirs
    assert set(ours[len(theirs) :]) <= {theirs[-1]}


def test_generation_config(tmp_path):
    assert load_generation_config(tmp_path) is None
    path = tmp_path / "generation_config.json"
    raw = {
        "eos_token_id": [5, 6, 5],
        "temperature": 1,
        "top_p": 0.9,
        "top_k": 50,
        "do_sample": True,
    }
    path.write_text(json.dumps(raw | {"bos_token_id": 2, "transformers_version": "5.24"}))
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path)
    ours = load_generation_config(tmp_path)
    assert ours == GenerationConfig((5, 6), 2, None, True, 1.0, 0.9, 50)
    for name in ("bos_token_id", "pad_token_id", "do_sample", "temperature", "top_p", "top_k"):
        assert getattr(ours, name) == getattr(theirs, name)
    for wrong in (
        {"eos_token_id": "5"},
        {"eos_token_id": [[5]]},
        {"eos_token_id": True},
        {"pad_token_id": 1.5},
        {"bos_token_id": -2},
        {"temperature": "hot"},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": 10**400},
        {"top_p": 1.1},
        {"top_k": 2.0},
        {"do_sample": "false"},
    ):
        path.write_text(json.dumps(wrong))
        (name,) = wrong
        pattern = rf"{re.escape(str(path))}: {name} must be .*, but is "
        with pytest.raises(l4.CheckpointError, match=pattern):
            load_generation_config(tmp_path)
    for damaged in ("[1]", "{", "", "\xff", "[" * 100_000):
        path.write_bytes(damaged.encode("latin1"))
        with pytest.raises(l4.CheckpointError, match=re.escape(str(path))):
            load_generation_config(tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.sampled_from([field.name for field in dataclasses.fields(GenerationConfig)])
        | st.just("eos_token_id"),
        json_values,
    )
)
def test_any_generation_config_is_read_or_refused(tmp_path, raw):
    (tmp_path / "generation_config.json").write_text(json.dumps(raw))
    told = ""
    try:
        load_generation_config(tmp_path)
    except l4.CheckpointError as error:
        told = str(error)
    assert len(told) < 500


@pytest.mark.parametrize(
    ("settings", "sampler"),
    [
        ({}, l4.Greedy()),
        ({"do_sample": False, "temperature": 0.6}, l4.Greedy()),
        ({"do_sample": True, "temperature": 0.0}, l4.Greedy()),
        ({"do_sample": True}, l4.Sample(1.0)),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, l4.Sample(0.6, top_p=0.9)),
        ({"do_sample": True, "top_k": 0}, l4.Sample(1.0)),
        ({"do_sample": True, "top_k": 7}, l4.Sample(1.0, top_k=7)),
    ],
)
def test_the_sampler_that_a_folder_asks_for(tmp_path, settings, sampler):
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    config = load_generation_config(tmp_path)
    assert config is not None
    assert eqx.tree_equal(config.sampler(), sampler)
