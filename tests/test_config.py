"""Configs: the released files' spellings in, `transformers` files out, and checks of values."""

import dataclasses
import json
import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

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
    theirs: Any = transformers.Llama4TextConfig(**ours.to_hf())
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
        ({"secret": 5, "mystery": 1}, "doesn't know: mystery, secret"),
        ({"quantization_config": {"bits": 8}}, "quantised"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'default' or 'llama3'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "needs exactly"),
        ({"rope_parameters": {"rope_type": "default"}}, "keep the right one"),
        ({"hidden_act": "relu"}, "'silu'"),
        ({"num_key_value_heads": 7}, "multiple of"),
        ({"head_dim": 7}, "even"),
        ({"num_experts_per_tok": 17}, "must not exceed"),
        ({"moe_layers": [48]}, "below 48"),
        ({"no_rope_layers": [1]}, "each of the 48"),
        ({"layer_types": ["sliding_attention"] * 48}, "'chunked_attention' or"),
        ({"attention_chunk_size": 0}, "positive"),
        ({"attention_dropout": 1.0}, r"\[0, 1\)"),
        ({"vocab_size": 0}, "vocab_size must be a positive whole number below 2³¹, but is 0"),
    ],
)
def test_errors_name_the_field(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        l4.Llama4Config.from_hf(RELEASED_SCOUT | {"text_config": RELEASED_SCOUT_TEXT | change})


def is_one_sentence(error: BaseException) -> bool:
    text = str(error)
    return text.endswith(".") and "\n" not in text and 20 < len(text) < 1200


NOT_WHOLE = ["48", "", 48.5, True, None, [48], {"a": 1}, math.nan, math.inf, -1, 0, 2**31, 10**400]
NOT_NUMBERS = ["1e-5", True, None, [1.0], {}, math.nan, -math.inf, -1.0, 0.0, 1e39, 1e-40, 10**400]
NOT_BOOLEANS = ["false", "true", "", 0, 1, 0.0, None, [], {}]
WRONG: dict[str, list[Any]] = {
    "hidden_size": NOT_WHOLE,
    "num_hidden_layers": [*NOT_WHOLE, 10**6],
    "num_local_experts": NOT_WHOLE,
    "floor_scale": NOT_WHOLE,
    "max_position_embeddings": NOT_WHOLE,
    "attention_chunk_size": [x for x in NOT_WHOLE if x is not None],
    "no_rope_layer_interval": NOT_WHOLE,
    "interleave_moe_layer_step": [x for x in NOT_WHOLE if x != 0 or x is True],
    "rms_norm_eps": NOT_NUMBERS,
    "rope_theta": NOT_NUMBERS,
    "attn_scale": ["0.1", True, None, math.nan, math.inf, 10**400],
    "attention_dropout": ["0.0", True, None, math.nan, -0.1, 1.0],
    "initializer_range": ["0.02", False, None, math.nan, -0.02],
    "use_qk_norm": NOT_BOOLEANS,
    "attention_bias": NOT_BOOLEANS,
    "tie_word_embeddings": NOT_BOOLEANS,
    "attn_temperature_tuning": ["false", "4", 4.0, -4, None, [True]],
    "hidden_act": ["gelu", 5, None, ["silu"]],
    "no_rope_layers": [["0"] * 48, [True] * 48, [2] * 48, [0.5] * 48, [1], "1" * 48, 1, {"0": 1}],
    "moe_layers": [["1"], [-1], [48], [None], [[1]], "1", 1, {"1": 1}],
    "layer_types": [["sliding_attention"] * 48, [1] * 48, ["full_attention"], "full_attention", 1],
    "bos_token_id": ["1", True, [1], -2, 1.5, 2**31],
    "eos_token_id": ["2", True, [1, "2"], [1, -1], [[1]], -2, {"a": 1}, 2**31],
    "pad_token_id": ["0", False, [0], -2, math.nan],
    "rope_scaling": ["llama3", 8, True, [8.0]],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG.items() for value in values]
)
def test_wrong_values_are_one_sentence(name: str, value: Any):
    """It names the field, from the text decoder's part of a file and from the constructor."""
    with pytest.raises(ValueError, match=name) as caught:
        l4.Llama4Config.from_hf(
            RELEASED_SCOUT | {"text_config": RELEASED_SCOUT_TEXT | {name: value}}
        )
    assert is_one_sentence(caught.value)
    arguments: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=name) as caught:
        l4.TextConfig(**arguments)
    assert is_one_sentence(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", "1408"),
        ("image_size", [336, 336]),
        ("image_size", 335),
        ("patch_size", 14.5),
        ("num_hidden_layers", 10**6),
        ("pixel_shuffle_ratio", 0),
        ("pixel_shuffle_ratio", 1e-30),
        ("norm_eps", 1e-6),
        ("rope_theta", "10000"),
        ("projector_dropout", 1),
        ("hidden_act", "quick_gelu"),
        ("projector_input_dim", 4095),
        ("num_attention_heads", 3),
    ],
)
def test_wrong_values_of_the_vision_encoder(name: str, value: Any):
    arguments: dict[str, Any] = {name: value}
    for call in (
        lambda: l4.Llama4Config.from_hf(
            RELEASED_SCOUT | {"vision_config": RELEASED_VISION | {name: value}}
        ),
        lambda: l4.VisionConfig(**arguments),
    ):
        with pytest.raises(ValueError, match=f"In vision_config, .*{name}") as caught:
            call()
        assert is_one_sentence(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("factor", "8"),
        ("factor", 0),
        ("low_freq_factor", 5.0),
        ("high_freq_factor", math.nan),
        ("original_max_position_embeddings", 8192.5),
        ("original_max_position_embeddings", True),
    ],
)
def test_wrong_values_of_rope_scaling(name: str, value: Any):
    right: dict[str, Any] = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    with pytest.raises(ValueError, match=f"In rope_scaling, .*{name}"):
        l4.RopeScaling(**(right | {name: value}))
    scaling = {"rope_type": "llama3"} | right | {name: value}
    with pytest.raises(ValueError, match=f"In rope_scaling, .*{name}"):
        l4.TextConfig.from_hf(RELEASED_SCOUT_TEXT | {"rope_scaling": scaling})


@pytest.mark.parametrize("name", ["boi_token_index", "eoi_token_index", "image_token_index"])
@pytest.mark.parametrize("value", ["5", True, None, -200, [5], 1.5, 2**31])
def test_wrong_ids_of_image_tokens(name: str, value: Any):
    with pytest.raises(ValueError, match=name):
        l4.Llama4Config.from_hf(RELEASED_SCOUT | {name: value})
    arguments: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=name):
        l4.Llama4Config(**arguments)


def test_parts_of_a_wrong_type():
    vision: Any = l4.TextConfig()
    with pytest.raises(ValueError, match="vision_config must be a VisionConfig or null"):
        l4.Llama4Config(vision_config=vision)
    with pytest.raises(ValueError, match=r"text_config must be a TextConfig, but is \{\}"):
        l4.Llama4Config(text_config={})  # pyright: ignore[reportArgumentType]


def test_many_wrong_values_are_capped():
    wrong: dict[str, Any] = dict.fromkeys(WRONG, "x")
    with pytest.raises(ValueError, match=r"but is \"x\"; and \d+ more\.$") as caught:
        l4.TextConfig(**wrong)
    assert is_one_sentence(caught.value)


def test_numbers_come_as_numpy_scalars_and_whole_floats():
    """JSON has one type of number; the values kept are plain, so that the config is hashable."""
    values: dict[str, Any] = {
        "num_hidden_layers": np.int64(4),
        "hidden_size": 5120.0,
        "rms_norm_eps": np.float64(1e-5),
        "attn_scale": 0,
        "use_qk_norm": np.bool_(True),
        "moe_layers": range(1, 4, 2),
        "no_rope_layers": [1, np.int32(0), 1.0, 0],
        "eos_token_id": [np.int64(5)],
    }
    config = l4.TextConfig(**values)
    plain = l4.TextConfig(
        num_hidden_layers=4,
        attn_scale=0.0,
        moe_layers=(1, 3),
        no_rope_layers=(1, 0, 1, 0),
        eos_token_id=(5,),
    )
    assert config == plain
    assert hash(config) == hash(plain)
    assert json.dumps(config.to_hf()) == json.dumps(plain.to_hf())


def test_constructor_checks_without_the_test_suites_type_checker():
    code = (
        "import llama4_eqx as l4\n"
        "for call in (lambda: l4.TextConfig(hidden_size='48'), lambda: l4.TextConfig.from_hf(5)):\n"
        "    try: call()\n"
        "    except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        'In text_config, hidden_size must be a positive whole number below 2³¹, but is "48".',
        "A config comes as a dict, a file or a folder, not as 5.",
    ]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (l4.TextConfig, transformers.Llama4TextConfig),
        (l4.VisionConfig, transformers.Llama4VisionConfig),
    ],
)
def test_missing_fields_are_read_as_transformers_reads_them(ours: Any, theirs: Any):
    whole = RELEASED_SCOUT_TEXT if ours is l4.TextConfig else RELEASED_VISION
    for name in {field.name for field in dataclasses.fields(ours)} - {"rope_theta"}:
        raw = {key: value for key, value in whole.items() if key != name}
        if name == "rope_scaling":
            assert l4.TextConfig.from_hf(raw).rope_scaling is None
            continue
        truth = getattr(theirs(), name)
        if name in ("no_rope_layers", "layer_types", "moe_layers"):
            truth = None  # the intervals hold; `patterns` are compared elsewhere
        config = config_or_error(ours, raw)
        if isinstance(config, ValueError):  # the default doesn't go with the other fields
            assert ours is l4.VisionConfig
            assert str(truth) in str(config)
        else:
            assert getattr(config, name) == truth
    without = {key: value for key, value in whole.items() if key != "rope_theta"}
    assert ours.from_hf(without).rope_theta == theirs().rope_parameters["rope_theta"]


tokens = st.none() | st.integers(0, 300000)
floats = st.floats(2.0**-30, 2.0**30)


# Strategies give arguments rather than configs: the test suite's type checker draws its own random
# numbers, which hypothesis doesn't allow inside a strategy.
@st.composite
def text_arguments(draw):
    layers = draw(st.integers(1, 9))
    heads = draw(st.integers(1, 4))
    chunk = draw(st.none() | st.integers(1, 100))
    kinds = ["full_attention"] if chunk is None else ["full_attention", "chunked_attention"]
    experts = draw(st.integers(1, 8))

    def per_layer(items):
        return draw(st.none() | st.lists(items, min_size=layers, max_size=layers + 2).map(tuple))

    return {
        "vocab_size": draw(st.integers(1, 300000)),
        "hidden_size": draw(st.integers(1, 64)),
        "num_hidden_layers": layers,
        "num_attention_heads": heads * draw(st.integers(1, 3)),
        "num_key_value_heads": heads,
        "head_dim": 2 * draw(st.integers(1, 9)),
        "rms_norm_eps": draw(floats),
        "rope_theta": draw(floats),
        "rope_scaling": draw(
            st.none() | st.tuples(floats, st.just(2.0**-30), floats, st.integers(1, 1000))
        ),
        "attention_chunk_size": chunk,
        "attention_bias": draw(st.booleans()),
        "attention_dropout": draw(st.floats(0, 0.9).filter(lambda x: x == 0 or x > 1e-30)),
        "attn_temperature_tuning": draw(st.booleans()),
        "attn_scale": draw(floats) * draw(st.sampled_from([-1, 0, 1])),
        "use_qk_norm": draw(st.booleans()),
        "no_rope_layer_interval": draw(st.integers(1, 12)),
        "no_rope_layers": per_layer(st.sampled_from([0, 1])),
        "layer_types": per_layer(st.sampled_from(kinds)),
        "num_local_experts": experts,
        "num_experts_per_tok": draw(st.integers(1, experts)),
        "interleave_moe_layer_step": draw(st.integers(0, 12)),
        "moe_layers": draw(st.none() | st.lists(st.integers(0, layers - 1)).map(tuple)),
        "tie_word_embeddings": draw(st.booleans()),
        "bos_token_id": draw(tokens),
        "eos_token_id": draw(tokens | st.lists(st.integers(0, 300000)).map(tuple)),
        "pad_token_id": draw(tokens),
    }


@st.composite
def vision_arguments(draw):
    heads, out = draw(st.integers(1, 4)), draw(st.integers(1, 64))
    hidden, patch = 4 * heads * draw(st.integers(1, 4)), draw(st.integers(1, 16))
    return {
        "hidden_size": hidden,
        "num_hidden_layers": draw(st.integers(1, 4)),
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        "vision_output_dim": out,
        "image_size": patch * draw(st.integers(1, 9)),
        "patch_size": patch,
        "rope_theta": draw(floats),
        "projector_input_dim": out,
        "projector_output_dim": out,
    }


arguments = st.tuples(
    text_arguments(), st.none() | vision_arguments(), st.tuples(*[st.integers(0, 300000)] * 3)
)


def built(arguments) -> l4.Llama4Config:
    text, vision, image_tokens = arguments
    scaling = text["rope_scaling"] and l4.RopeScaling(*text["rope_scaling"])
    return l4.Llama4Config(
        l4.TextConfig(**(text | {"rope_scaling": scaling})),
        vision and l4.VisionConfig(**vision),
        *image_tokens,
    )


@settings(deadline=None, max_examples=200)
@given(arguments)
def test_any_config_survives_its_file(arguments):
    config = built(arguments)
    raw = json.loads(json.dumps(config.to_hf()))
    assert l4.Llama4Config.from_hf(raw) == config
    assert l4.TextConfig.from_hf(raw) == config.text_config
    if config.vision_config is not None:
        assert l4.VisionConfig.from_hf(raw) == config.vision_config


@settings(deadline=None, max_examples=100)
@given(arguments=arguments)
def test_transformers_reads_the_values_that_any_config_writes(arguments, tmp_path_factory):
    config = built(arguments)
    folder = tmp_path_factory.mktemp("config")
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    theirs: Any = transformers.AutoConfig.from_pretrained(folder)
    text, ours = theirs.get_text_config(), config.text_config
    apart = {"rope_theta", "rope_scaling", "no_rope_layers", "layer_types", "moe_layers"}
    for field in dataclasses.fields(ours):
        if field.name not in apart:
            value = getattr(ours, field.name)
            truth = list(value) if isinstance(value, tuple) else value
            assert getattr(text, field.name) == truth, field.name
    assert text.rope_parameters["rope_theta"] == ours.rope_theta
    assert ours.rope_scaling is None or (
        text.rope_parameters.items() >= dataclasses.asdict(ours.rope_scaling).items()
    )
    for i in range(ours.num_hidden_layers):
        assert bool(text.no_rope_layers[i]) != ours.layer_is_nope(i)
        assert (i in text.moe_layers) == ours.layer_is_moe(i)
        assert (text.layer_types[i] == "full_attention") == (ours.layer_chunk_size(i) is None)
    if config.vision_config is not None:
        assert theirs.image_token_id == config.image_token_index
        for field in dataclasses.fields(config.vision_config):
            if field.name != "rope_theta":
                truth = getattr(config.vision_config, field.name)
                assert getattr(theirs.vision_config, field.name) == truth, field.name
    theirs.save_pretrained(folder)
    back = l4.Llama4Config.from_hf(folder)
    assert patterns(back.text_config) == patterns(ours)
    assert (back.vision_config, back.text_config.stop_ids) == (config.vision_config, ours.stop_ids)


leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.integers(-2, 50)
    | st.floats()
    | st.text()
    | st.sampled_from(["silu", "llama3", "default", "full_attention", "llama4", "config.json"])
)
json_values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.lists(st.integers(0, 1), min_size=48, max_size=50)
        | st.dictionaries(
            st.text() | st.sampled_from(sorted(RELEASED_SCOUT_TEXT)), inner, max_size=5
        )
    ),
    max_leaves=12,
)
places = st.sampled_from(
    [(name,) for name in [*RELEASED_SCOUT, *RELEASED_SCOUT_TEXT, "rope_parameters", "any"]]
    + [("text_config", name) for name in [*RELEASED_SCOUT_TEXT, "layer_types", "moe_layers", "any"]]
    + [("text_config", "rope_scaling", name) for name in RELEASED_SCOUT_TEXT["rope_scaling"]]
    + [("vision_config", name) for name in [*RELEASED_VISION, "rope_parameters", "any"]]
)


def config_or_error(cls: Any, raw: Any) -> Any:
    try:
        return cls.from_hf(raw)
    except ValueError as error:
        return error


def with_value(raw: Any, place: tuple[str, ...], value: Any) -> Any:
    name, *rest = place
    inner = with_value(raw[name], tuple(rest), value) if rest else value
    return {**raw, name: inner}


@settings(deadline=None, max_examples=600)
@given(place=places, value=json_values, flat=st.booleans())
def test_any_value_in_any_field_gives_a_config_or_a_sentence(place, value, flat):
    if flat and place[0] == "text_config" and len(place) > 1:
        raw = with_value(RELEASED_SCOUT_TEXT, place[1:], value)
    else:
        raw = with_value(RELEASED_SCOUT, place, value)
    config = config_or_error(l4.Llama4Config, raw)
    if isinstance(config, ValueError):
        assert is_one_sentence(config), config
        return
    patterns(config.text_config)
    assert all(isinstance(i, int) for i in config.text_config.stop_ids)
    assert l4.Llama4Config.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    hash(config)


@settings(deadline=None, max_examples=150)
@given(json_values)
def test_any_json_gives_a_config_or_a_sentence(value):
    raw = value if isinstance(value, dict) else {"text_config": value}
    for cls in (l4.Llama4Config, l4.TextConfig, l4.VisionConfig):
        config = config_or_error(cls, raw)
        assert not isinstance(config, ValueError) or is_one_sentence(config), config
