"""PEFT adapters: read as `peft` applies them, and written for it."""

import json
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file

import llama4_eqx as l4
from llama4_eqx.checkpoints import load_adapter, save_adapter
from llama4_eqx.training import LoRA
from tests.toys import (
    MAVERICK,
    MULTIMODAL,
    SCOUT,
    as_torch,
    random_tokens,
    reference_model,
    relative_error,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # peft's and accelerate's own
]
TOLERANCE = 2e-5
LINEAR = ["q_proj", "k_proj", "o_proj", "gate_proj", "down_proj"]
EXPERTS = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]
CASES = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "linear": {"target_modules": LINEAR, "r": 3, "lora_alpha": 7},
    "experts": {"target_modules": [], "target_parameters": EXPERTS},
    "gate and up": {"target_modules": [], "target_parameters": EXPERTS[:1]},
    "down": {"target_modules": ["q_proj"], "target_parameters": EXPERTS[1:]},
    "all": {"target_modules": LINEAR, "target_parameters": EXPERTS, "use_rslora": True},
    "ends": {"target_modules": ["embed_tokens", "lm_head"]},
    "patterns": {
        "target_modules": LINEAR,
        "rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.k_proj": 5},
        "alpha_pattern": {"o_proj": 1},
    },
    "layers": {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1, 2, 6]},
}


def with_adapter(reference, **options):
    """`peft`'s model with factors that aren't zero."""
    torch.manual_seed(1)
    adapted = peft.get_peft_model(reference, peft.LoraConfig(**{"r": 4, "lora_alpha": 8} | options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    return adapted.eval()


def logits(model, tokens):
    return eqx.filter_jit(lambda model, tokens: model(tokens).logits)(model, tokens)


def their_logits(model, tokens):
    with torch.no_grad():
        return model(as_torch(tokens, torch.long)).logits


@pytest.mark.parametrize("name", CASES)
def test_adapters_of_peft(name, tmp_path):
    config = MAVERICK if name in ("linear", "all") else SCOUT
    reference, tokens = reference_model(config), random_tokens(2, 21)
    reference.save_pretrained(tmp_path / "model")
    plain = their_logits(reference, tokens)
    adapted = with_adapter(reference, **CASES[name])
    adapted.save_pretrained(tmp_path / "adapter")
    truth = their_logits(adapted, tokens)
    model = l4.load_checkpoint(tmp_path / "model")
    for form in (model, model.unstacked()) if name == "patterns" else (model,):
        lora = load_adapter(form, tmp_path / "adapter")
        assert relative_error(logits(lora.merged(), tokens), truth) < TOLERANCE
        assert relative_error(logits(lora.attached(), tokens), truth) < TOLERANCE
    assert relative_error(plain, truth) > 0.01
    # And back: what we write is the same adapter to `peft`.
    save_adapter(lora, tmp_path / "ours")
    base = reference_model(config)
    again = peft.PeftModel.from_pretrained(base, str(tmp_path / "ours")).eval()
    assert relative_error(their_logits(again, tokens), truth) < TOLERANCE


def noisy(lora):
    leaves, structure = jax.tree.flatten(lora.updates)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    noise = [0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return lora.with_updates(jax.tree.unflatten(structure, noise))


@pytest.mark.parametrize(
    "patterns",
    [
        ("decoder.*_proj", "embed_tokens", "lm_head"),
        ("*.experts.gate_proj", "*.experts.up_proj"),  # of different left factors
        ("*.experts.up_proj", "*.experts.down_proj"),
    ],
    ids=["all", "gate and up", "up and down"],
)
def test_an_adapter_of_ours_opens_in_peft(patterns, tmp_path):
    reference, tokens = reference_model(MAVERICK), random_tokens(2, 21)
    reference.save_pretrained(tmp_path / "model")
    model = l4.load_checkpoint(tmp_path / "model")
    lora = noisy(LoRA(model, *patterns, rank=3, alpha=5, key=jax.random.key(0)))
    save_adapter(lora, tmp_path / "ours")
    adapted = peft.PeftModel.from_pretrained(reference, str(tmp_path / "ours")).eval()
    ours = logits(lora.merged(), tokens)
    assert relative_error(ours, their_logits(adapted, tokens)) < TOLERANCE
    assert relative_error(ours, logits(model, tokens)) > 0.01
    again = load_adapter(model.unstacked(), tmp_path / "ours")
    assert relative_error(logits(again.merged(), tokens), ours) < TOLERANCE


def test_other_prefixes_and_pictures(tmp_path):
    """An adapter of the whole model on its text part, and the other way round."""
    whole = l4.Llama4(MULTIMODAL, key=jax.random.key(0))
    patterns = ("decoder.*_proj", "vision_model.model.*.q_proj")
    lora = noisy(LoRA(whole, *patterns, rank=2, key=jax.random.key(1)))
    save_adapter(lora, tmp_path / "whole")
    again = load_adapter(whole, tmp_path / "whole")
    for ours, truth in zip(
        jax.tree.leaves(again.merged()), jax.tree.leaves(lora.merged()), strict=True
    ):
        np.testing.assert_allclose(ours, truth, rtol=1e-5, atol=1e-6)
    l4.save_checkpoint(whole, tmp_path / "model")
    text = l4.load_checkpoint(tmp_path / "model", part="text")
    own = noisy(LoRA(text, "decoder.*_proj", rank=2, key=jax.random.key(1)))
    save_adapter(own, tmp_path / "text")
    on_whole, tokens = load_adapter(whole, tmp_path / "text"), random_tokens(2, 20, vocab=249)
    assert (
        relative_error(logits(on_whole.merged(), tokens), logits(own.merged(), tokens)) < TOLERANCE
    )
    with pytest.raises(l4.CheckpointError, match=r"vision_model.*isn't in this model"):
        load_adapter(text, tmp_path / "whole")


@pytest.fixture
def saved(tmp_path):
    model = l4.Llama4(l4.Llama4Config(replace(SCOUT, num_hidden_layers=2)), key=jax.random.key(0))
    lora = LoRA(model, "*.q_proj", rank=2, key=jax.random.key(1))
    save_adapter(lora, tmp_path / "adapter")
    return model, lora, tmp_path / "adapter"


def test_names_of_a_wrapped_model(saved):
    """Of a compiled base, and of an adapted model that is compiled as a whole."""
    model, lora, folder = saved
    lora = noisy(lora)
    save_adapter(lora, folder, overwrite=True)
    weights = load_file(folder / "adapter_model.safetensors")
    for old, new in (("base_model.model.", "base_model.model._orig_mod."), ("", "_orig_mod.")):
        renamed = {name.replace(old, new, 1): value for name, value in weights.items()}
        save_file(renamed, folder / "adapter_model.safetensors")
        again = load_adapter(model, folder)
        assert eqx.tree_equal(again.merged(), lora.merged())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"use_dora": True}, "use_dora = true"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "IA3 adapter"),
        ({"r": "x"}, "isn't the config of a LoRA"),
        ({"r": 10**400}, "isn't the config of a LoRA"),
        ({"r": float("inf")}, "isn't the config of a LoRA"),
        ({"lora_alpha": None}, "isn't the config of a LoRA"),
        ({"lora_alpha": 0}, "isn't the config of a LoRA"),
        ({"lora_alpha": -(10**400)}, "isn't the config of a LoRA"),
        ({"alpha_pattern": {"q_proj": "8"}}, "isn't the config of a LoRA"),
        ({"alpha_pattern": [8]}, "isn't the config of an adapter"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_not_plain_lora_is_named(saved, change, sentence):
    model, _, folder = saved
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(l4.CheckpointError, match=sentence):
        load_adapter(model, folder)


def test_errors(saved, tmp_path):
    model, lora, folder = saved
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_adapter(lora, folder)
    save_adapter(noisy(lora), folder, overwrite=True)
    other = l4.Llama4(l4.Llama4Config(replace(SCOUT, head_dim=8)), key=jax.random.key(0))
    with pytest.raises(l4.CheckpointError, match="which don't fit"):
        load_adapter(other, folder)
    with pytest.raises(l4.CheckpointError, match="holds an adapter, not a model: load its model"):
        l4.load_checkpoint(folder)
    weights = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(weights[:50])
    with pytest.raises(l4.CheckpointError, match="is truncated or damaged"):
        load_adapter(model, folder)
    (folder / "adapter_model.safetensors").write_text("<html>")
    with pytest.raises(l4.CheckpointError, match=r"adapter_model\.safetensors is a web page"):
        load_adapter(model, folder)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="is a pickle"):
        load_adapter(model, folder)
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json"):
        load_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="no updates"):
        save_adapter(lora.with_updates({}), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_bfloat16_factors(tmp_path):
    model = l4.Llama4(l4.Llama4Config(SCOUT), dtype=jnp.bfloat16, key=jax.random.key(0))
    lora = LoRA(model, "*.o_proj", rank=2, dtype=jnp.bfloat16, key=jax.random.key(1))
    save_adapter(lora, tmp_path / "adapter")
    again = load_adapter(model, tmp_path / "adapter")
    for ours, truth in zip(
        jax.tree.leaves(again.updates), jax.tree.leaves(lora.updates), strict=True
    ):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_array_equal(ours, truth)
