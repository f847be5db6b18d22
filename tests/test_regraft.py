"""Another config for a model's parameters, against `transformers`' reading of the same change."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import llama4_eqx as l4
from llama4_eqx.regraft import difference
from llama4_eqx.research import replaced
from tests.toys import MULTIMODAL, as_torch, random_tokens, reference_model, relative_error

# Eight layers in cycles of four, of which some are left out and others repeated.
SCOUT = l4.Llama4Config.tiny().text_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("regraft")
    reference_model(SCOUT).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return l4.load_checkpoint(folder)


def configured(**changes):
    return l4.Llama4Config(replace(SCOUT, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_chunk_size": 16},
        {"no_rope_layers": (1, 0, 0, 1, 1, 1, 0, 1)},  # no cycle any more
        {"no_rope_layers": (1, 0) * 4},  # a shorter one
        {"rope_scaling": None, "rope_theta": 1000.0},
        {"num_hidden_layers": 5, "no_rope_layers": (1, 1, 1, 0, 1)},
    ],
)
def test_settings_take_effect_as_in_the_reference(changes, folder, model, tmp_path):
    ours = l4.with_config(model, configured(**changes))
    raw = configured(**changes).text_config.to_hf()
    config = transformers.Llama4TextConfig(**raw, attn_implementation="eager")
    theirs = transformers.Llama4ForCausalLM.from_pretrained(folder, config=config).eval()
    tokens = random_tokens(2, 40)
    with torch.no_grad():
        truth = theirs(as_torch(tokens, torch.long)).logits
    assert relative_error(eqx.filter_jit(ours)(tokens).logits, truth) < 2e-5
    # It is saved and loaded as what it is.
    l4.save_checkpoint(ours, tmp_path / "model")
    loaded = l4.load_checkpoint(tmp_path / "model")
    assert jax.tree.structure(loaded) == jax.tree.structure(ours)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(ours), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_same_config_changes_nothing(model):
    same = l4.with_config(model, model.config)
    assert jax.tree.structure(same) == jax.tree.structure(model)
    for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(a, b)


def test_layers_are_kept_in_the_given_order(model):
    few = l4.with_config(
        model, configured(num_hidden_layers=3, no_rope_layers=(1, 1, 0)), layers=[2, 6, 3]
    )
    for ours, number in zip(few.decoder.layers(), (2, 6, 3), strict=True):
        np.testing.assert_array_equal(
            ours.self_attn.q_proj, model.decoder.layers()[number].self_attn.q_proj
        )
    with pytest.raises(ValueError, match="has 3 layers, but layers= names 2"):
        l4.with_config(model, configured(num_hidden_layers=3), layers=[0, 1])
    with pytest.raises(ValueError, match="no layer 8, only 0 to 7: name with layers="):
        l4.with_config(model, configured(num_hidden_layers=9))


def test_a_wider_vocabulary_keeps_the_old_logits(model):
    wide = l4.with_config(model, configured(vocab_size=300), key=jax.random.key(0))
    tokens = random_tokens(2, 12)
    assert relative_error(wide(tokens).logits[..., :256], model(tokens).logits) < 1e-6
    assert jnp.std(wide.embed_tokens[256:]) > 0


def test_more_experts_keep_the_old_ones(model):
    config = configured(num_local_experts=6)
    more = l4.with_config(model, config, key=jax.random.key(0))
    old, new = (m.decoder.layers()[3].feed_forward for m in (model, more))
    for name in ("gate_proj", "up_proj", "down_proj"):
        ours, before = getattr(new.experts, name), getattr(old.experts, name)
        np.testing.assert_array_equal(ours[:4], before)
        assert ours[4:].any()
    np.testing.assert_array_equal(new.router[:4], old.router)
    again = l4.with_config(model, config, key=jax.random.key(0))
    np.testing.assert_array_equal(again.decoder.layers()[3].feed_forward.router, new.router)
    with pytest.raises(ValueError, match=r"layer 0's feed_forward.* grows from .*: pass key="):
        l4.with_config(model, config)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden_size": 32}, r"shape \(.*64.*\), but the new config wants \(.*32"),
        ({"vocab_size": 200}, r"embed_tokens has the shape \(256, 64\)"),
        ({"attention_bias": True}, "wants layer 0's self_attn.q_bias, which the model doesn't"),
        ({"moe_layers": ()}, "no place for layer 0's feed_forward"),
    ],
)
def test_what_does_not_fit_is_named(model, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        l4.with_config(model, configured(**changes))


def test_a_model_that_its_config_does_not_describe_is_not_saved(model, tmp_path):
    first = model.decoder.layers()[0]
    blocks = (eqx.tree_at(lambda b: b.layers, model.unstacked().decoder.blocks[0], (first,) * 6),)
    experts = first.feed_forward.experts
    wrong = {
        "it has 6 layers, where the config says 8": eqx.tree_at(
            lambda m: m.decoder.blocks, model, blocks
        ),
        "layer 2's self_attn.temperature is TemperatureTuning": replaced(
            model, "self_attn", lambda old: model.decoder.layers()[3].self_attn, 2
        ),
        r"layer 1's feed_forward.experts.*has the shape \(3": replaced(
            model, "feed_forward.experts", lambda old: jax.tree.map(lambda x: x[:3], experts), 1
        ),
    }
    for sentence, changed in wrong.items():
        with pytest.raises(ValueError, match=sentence):
            l4.save_checkpoint(changed, tmp_path / "model")
        assert not (tmp_path / "model").exists()


def test_forms_of_a_model_are_described(model):
    multimodal = l4.Llama4(MULTIMODAL, dtype=jnp.bfloat16, key=jax.random.key(0))
    for form in (model, model.unstacked(), multimodal, multimodal.unstacked()):
        assert difference(form) is None
    # A part of a user's own class is noted when it is saved, and loading asks for it.
    assert difference(replaced(model, "self_attn", other_attention, 5)) is None


def other_attention(old):
    class Other(type(old)):
        pass

    new = object.__new__(Other)
    for name, value in vars(old).items():
        object.__setattr__(new, name, value)
    return new
