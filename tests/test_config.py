"""Configs: the released files' spellings in, `transformers` files out, and strictness."""

import json
from dataclasses import replace

import pytest
import transformers

import llama4_eqx as l4
from tests.toys import TOYS

RELEASED_SCOUT_TEXT = {
    "_attn_implementation_autoset": True,
    "attention_bias": False,
    "attention_chunk_size": 8192,
    "attention_dropout": 0.0,
    "attn_scale": 0.1,
    "attn_temperature_tuning": 4,
    "bos_token_id": 200000,
    "eos_token_id": [200001, 200007, 200008],
    "floor_scale": 8192,
    "for_llm_compressor": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "interleave_moe_layer_step": 1,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "max_position_embeddings": 10485760,
    "model_type": "llama4_text",
    "no_rope_layers": [],
    "num_attention_heads": 40,
    "num_experts_per_tok": 1,
    "num_hidden_layers": 48,
    "num_key_value_heads": 8,
    "num_local_experts": 16,
    "output_router_logits": False,
    "pad_token_id": 200018,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 16.0,
        "high_freq_factor": 1.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_qk_norm": True,
    "vocab_size": 202048,
}
RELEASED_VISION = {
    "_attn_implementation_autoset": True,
    "attention_dropout": 0.0,
    "hidden_act": "gelu",
    "hidden_size": 1408,
    "image_size": 336,
    "initializer_range": 0.02,
    "intermediate_size": 5632,
    "model_type": "llama4_vision_model",
    "multi_modal_projector_bias": False,
    "norm_eps": 1e-05,
    "num_attention_heads": 16,
    "num_channels": 3,
    "num_hidden_layers": 34,
    "patch_size": 14,
    "pixel_shuffle_ratio": 0.5,
    "projector_dropout": 0.0,
    "projector_input_dim": 4096,
    "projector_output_dim": 4096,
    "rope_theta": 10000,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
    "vision_output_dim": 4096,
}
RELEASED_SCOUT = {
    "architectures": ["Llama4ForConditionalGeneration"],
    "boi_token_index": 200080,
    "eoi_token_index": 200081,
    "image_token_index": 200092,
    "model_type": "llama4",
    "text_config": RELEASED_SCOUT_TEXT,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0.dev0",
    "vision_config": RELEASED_VISION,
}
RELEASED_MAVERICK_TEXT = RELEASED_SCOUT_TEXT | {
    "attn_temperature_tuning": True,
    "interleave_moe_layer_step": 2,
    "max_position_embeddings": 1048576,
    "moe_layers": list(range(1, 48, 2)),
    "no_rope_layers": [1, 1, 1, 0] * 12,
    "num_local_experts": 128,
    "rope_scaling": None,
    "use_qk_norm": False,
}


def patterns(config: l4.TextConfig):
    return [
        (config.layer_is_nope(i), config.layer_is_moe(i), config.layer_chunk_size(i))
        for i in range(config.num_hidden_layers)
    ]


def test_released_scout():
    assert l4.Llama4Config.from_hf(RELEASED_SCOUT) == l4.Llama4Config.scout()


def test_released_maverick():
    read = l4.Llama4Config.from_hf(RELEASED_SCOUT | {"text_config": RELEASED_MAVERICK_TEXT})
    ours = l4.Llama4Config.maverick()
    assert patterns(read.text_config) == patterns(ours.text_config)
    spelled_out = {"no_rope_layers": None, "moe_layers": None}
    assert replace(read, text_config=replace(read.text_config, **spelled_out)) == ours


def test_newer_spelling_of_rope():
    newer = dict(RELEASED_SCOUT_TEXT)
    scaling = newer.pop("rope_scaling")
    newer["rope_parameters"] = scaling | {"rope_theta": newer.pop("rope_theta")}
    assert l4.TextConfig.from_hf(newer) == l4.TextConfig.from_hf(RELEASED_SCOUT_TEXT)
    plain = newer | {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}}
    assert l4.TextConfig.from_hf(plain).rope_theta == 123.0
    assert l4.TextConfig.from_hf(plain).rope_scaling is None
    vision = dict(RELEASED_VISION)
    vision["rope_parameters"] = {"rope_type": "default", "rope_theta": vision.pop("rope_theta")}
    assert l4.VisionConfig.from_hf(vision) == l4.VisionConfig.from_hf(RELEASED_VISION)


def test_patterns():
    scout, maverick = l4.Llama4Config.scout().text_config, l4.Llama4Config.maverick().text_config
    assert [i for i in range(48) if scout.layer_is_nope(i)] == list(range(3, 48, 4))
    assert all(scout.layer_is_moe(i) for i in range(48))
    assert [i for i in range(48) if maverick.layer_is_moe(i)] == list(range(1, 48, 2))
    assert {scout.layer_chunk_size(i) for i in range(3, 48, 4)} == {None}
    assert {scout.layer_chunk_size(i) for i in range(48) if i % 4 != 3} == {8192}
    assert l4.determine_is_nope_layer(3, 4)
    assert not l4.determine_is_nope_layer(4, 4)
    assert not l4.determine_is_nope_layer(3, 0)
    assert l4.determine_is_moe_layer(1, 2)
    assert not l4.determine_is_moe_layer(0, 2)


@pytest.mark.parametrize("name", TOYS)
def test_transformers_reads_and_writes_the_same_config(name, tmp_path):
    ours = TOYS[name]
    theirs = transformers.Llama4TextConfig(**ours.to_hf())
    for i in range(ours.num_hidden_layers):
        assert bool(theirs.no_rope_layers[i]) != ours.layer_is_nope(i)
        assert (i in theirs.moe_layers) == ours.layer_is_moe(i)
        assert (theirs.layer_types[i] == "full_attention") == (ours.layer_chunk_size(i) is None)
    theirs.save_pretrained(tmp_path)
    back = l4.Llama4Config.from_hf(tmp_path).text_config
    assert patterns(back) == patterns(ours)
    spelled_out = dict.fromkeys(("no_rope_layers", "moe_layers", "layer_types"))
    assert replace(back, **spelled_out) == replace(ours, **spelled_out)


def test_whole_config_round_trips_through_transformers(tmp_path):
    ours = l4.Llama4Config.scout()
    transformers.Llama4Config(**ours.to_hf()).save_pretrained(tmp_path)
    back = l4.Llama4Config.from_hf(tmp_path / "config.json")
    assert back.vision_config == ours.vision_config
    assert patterns(back.text_config) == patterns(ours.text_config)
    assert l4.Llama4Config.from_hf(ours.to_hf()) == ours


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"sliding_window": 5, "mystery": 1}, "doesn't know: mystery, sliding_window"),
        ({"quantization_config": {"bits": 8}}, "quantised"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'default' or 'llama3'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "needs exactly"),
        ({"rope_parameters": {"rope_type": "default"}}, "disagree"),
        ({"hidden_act": "relu"}, "'silu'"),
        ({"num_key_value_heads": 7}, "multiple of"),
        ({"head_dim": 7}, "even"),
        ({"num_experts_per_tok": 17}, "must not exceed"),
        ({"moe_layers": [48]}, "below 48"),
        ({"no_rope_layers": [1]}, "each of the 48"),
        ({"layer_types": ["sliding_attention"] * 48}, "'chunked_attention' or"),
        ({"attention_chunk_size": 0}, "positive"),
        ({"attention_dropout": 1.0}, r"\[0, 1\)"),
        ({"vocab_size": 0}, "vocab_size must be positive"),
    ],
)
def test_errors_name_the_field(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        l4.Llama4Config.from_hf(RELEASED_SCOUT | {"text_config": RELEASED_SCOUT_TEXT | change})


def test_unknown_fields_are_refused_in_every_part():
    with pytest.raises(ValueError, match=r"config\.json has fields .* mystery"):
        l4.Llama4Config.from_hf(RELEASED_SCOUT | {"mystery": 1})
    with pytest.raises(ValueError, match=r"vision_config has fields .* mystery"):
        l4.Llama4Config.from_hf(
            RELEASED_SCOUT | {"vision_config": RELEASED_VISION | {"mystery": 1}}
        )


def test_file_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"give a config\.json or the folder"):
        l4.Llama4Config.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        l4.Llama4Config.from_hf(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="must hold an object"):
        l4.Llama4Config.from_hf(tmp_path)
