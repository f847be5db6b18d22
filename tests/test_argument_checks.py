"""Arguments of another kind, such as a LoRA for a model or a dtype of torch: one sentence each."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import torch

import llama4_eqx as l4
from llama4_eqx.checkpoints import TrainCheckpointer, load_adapter, save_adapter
from llama4_eqx.distributed import shard
from llama4_eqx.generation import Sample
from llama4_eqx.quantization import Quantization, quantize
from llama4_eqx.training import LoRA
from tests.toys import SCOUT

CONFIG = l4.Llama4Config(replace(SCOUT, num_hidden_layers=1, no_rope_layers=(1,)))
KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def unchecked_types(monkeypatch):
    """Users have no shape checks unless they ask for them."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="module")
def model():
    return l4.Llama4(CONFIG, key=KEY)


@pytest.fixture(scope="module")
def lora(model):
    return LoRA(model, "*q_proj", rank=2, key=KEY)


TOKENS = [[1, 2, 3]]
NEW = {"max_new_tokens": 2}
KINDS = {
    "text config": (lambda m, _: l4.Llama4(CONFIG.text_config, key=KEY), "Llama4Config.text_confi"),
    "dict for a config": (lambda m, _: l4.with_config(m, {"vocab_size": 8}), "but is a dict"),
    "seed for a key": (lambda m, _: l4.Llama4(CONFIG, key=0), r"pass jax.random.key\(seed\)"),
    "seed of a LoRA": (lambda m, _: LoRA(m, "*", rank=1, key=3), r"pass jax.random.key\(seed\)"),
    "dict for a cache": (lambda m, _: m(TOKENS, cache={}), "cache must be a KVCache, but is a dic"),
    "site for a probe": (lambda m, _: m(TOKENS, probe="resid_post"), r"write Probe\(read="),
    "name for backends": (lambda m, _: m(TOKENS, backends="dense"), "must be a Backends, but is"),
    "LoRA for a model": (lambda _, lora: l4.generate(lora, TOKENS, **NEW), r"lora.merged\(\)"),
    "saved LoRA": (lambda _, lora: l4.save_checkpoint(lora, "x"), "save_adapter"),
    "saved part": (lambda m, _: l4.save_checkpoint(m.decoder, "x"), "must be a Llama4, but is a D"),
    "model as adapter": (lambda m, _: save_adapter(m, "x"), "save_checkpoint"),
    "adapter on a LoRA": (lambda _, lora: load_adapter(lora, "x"), "onto a model without one"),
    "name for a sampler": (lambda m, _: l4.generate(m, TOKENS, sampler="greedy", **NEW), "Greedy"),
    "bits": (lambda m, _: quantize(m, "int8"), r"such as Quantization\(dtype=jnp.int4\)"),
    "quantised LoRA": (lambda _, lora: quantize(lora), "quantise the base of a LoRA"),
    "name for rules": (lambda m, _: shard(m, jax.make_mesh((1,), ("x",)), "x"), "or a dict, such"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_objects(model, lora, kind):
    call, sentence = KINDS[kind]
    with pytest.raises(TypeError, match=sentence) as raised:
        call(model, lora)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    "number", [0, -1, 2.0, True, "3", None, np.float32(1), jnp.ones(2)], ids=str
)
@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda m, n: l4.generate(m, TOKENS, max_new_tokens=n), "max_new_tokens"),
        (lambda m, n: m.empty_cache((1,), n), "capacity"),
        (lambda m, n: LoRA(m, "*q_proj", rank=n, key=KEY), "rank"),
        (lambda m, n: TrainCheckpointer("x", max_to_keep=n), "max_to_keep"),
    ],
    ids=["max_new_tokens", "capacity", "rank", "max_to_keep"],
)
def test_counts(model, call, name, number):
    with pytest.raises(ValueError, match=f"{name} must be a whole number from 1, not "):
        call(model, number)


@pytest.mark.parametrize("stop_ids", ["</s>", [2.5], -1, [None]], ids=str)
def test_stop_ids(model, stop_ids):
    with pytest.raises(ValueError, match="A stop id must be a whole number from 0, not "):
        l4.generate(model, TOKENS, stop_ids=stop_ids, **NEW)


@pytest.mark.parametrize("dtype", ["bf16", "int8", jnp.int32, torch.bfloat16, 16], ids=str)
def test_dtypes(model, dtype, tmp_path):
    sentence = "dtype must be a floating-point dtype of JAX.* but is "
    with pytest.raises(ValueError, match=sentence):
        l4.Llama4(CONFIG, dtype=dtype, key=KEY)
    with pytest.raises(ValueError, match=sentence):
        l4.load_checkpoint(tmp_path, dtype=dtype)


@pytest.mark.parametrize("dtype", ["int3", torch.int8, jnp.int32], ids=str)
def test_dtypes_of_few_bits(model, dtype):
    with pytest.raises(ValueError, match=r"A cache can be int8 or float8_e4m3fn, not .*int"):
        model.empty_cache((1,), 8, dtype=dtype)
    with pytest.raises(ValueError, match=r"Weights can be quantised to .*, not to .*int"):
        Quantization(dtype=dtype)


def test_an_empty_name_is_no_folder(model, lora, tmp_path, monkeypatch):
    """It would be the working directory, where an unset variable shouldn't lead."""
    monkeypatch.chdir(tmp_path)
    for save in (
        lambda: l4.save_checkpoint(model, ""),
        lambda: save_adapter(lora, ""),
        lambda: TrainCheckpointer(""),
    ):
        with pytest.raises(ValueError, match="folder's name is empty"):
            save()
    assert not list(tmp_path.iterdir())


def test_a_name_on_the_hub_is_not_fetched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="fetch it: hf download meta-llama/Scout"):
        l4.load_checkpoint("meta-llama/Scout")
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*runs/model\.$"):
        l4.load_checkpoint(tmp_path / "runs/model")


@pytest.mark.parametrize("options", [{"rank": 2, "alpha": float("nan")}, {"rank": 2}])
def test_a_lora_without_effect(model, options):
    with pytest.raises(ValueError, match=r"alpha must be a finite number|needs patterns"):
        LoRA(model, *["*q_proj"][: len(options) - 1], key=KEY, **options)


def test_the_first_wrong_id_is_named(model):
    with pytest.raises(ValueError, match=r"ids go from 0 to 255. The first such id is 300\.$"):
        model([[1, 300, -2]])


def test_rows_of_different_lengths(model):
    for call in (model, lambda rows: l4.generate(model, rows, **NEW)):
        with pytest.raises(ValueError, match="pad rows of different lengths and pass a mask"):
            call([[1, 2, 3], [4]])


def test_numbers_and_keys_of_other_libraries(model):
    """What is as good is taken."""
    other = {"max_new_tokens": torch.tensor(2), "stop_ids": np.uint8(7), "samples": np.int64(1)}
    sampler = Sample(temperature=np.float64(0.5))
    key = jax.random.PRNGKey(0)
    assert l4.generate(model, TOKENS, sampler=sampler, key=key, **other).shape == (1, 1, 2)
