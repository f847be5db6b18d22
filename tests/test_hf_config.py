"""`config.json` files as other programs leave them: read as `transformers` reads them, or named."""

import json
import math
from typing import Any

import pytest
import torch
import transformers

import llama4_eqx as l4
from tests.test_config import (
    RELEASED_MAVERICK_TEXT,
    RELEASED_SCOUT,
    RELEASED_SCOUT_TEXT,
    RELEASED_VISION,
    is_one_sentence,
)
from tests.toys import MULTIMODAL, SCOUT, reference_model

IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def whole(*, text: Any = None, vision: Any = None, **top: Any) -> dict[str, Any]:
    """A small whole `config.json` with changes at each level."""
    raw = MULTIMODAL.to_hf()
    raw["text_config"] |= text or {}
    raw["vision_config"] |= vision or {}
    return raw | top


def without(raw: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in raw.items() if name not in names}


def error_of(raw: Any, cls: Any = l4.Llama4Config) -> str:
    with pytest.raises(ValueError, match=r"\w") as caught:
        cls.from_hf(raw)
    assert is_one_sentence(caught.value), caught.value
    return str(caught.value)


# Fields at either level


@pytest.mark.parametrize(
    ("inner", "outer"),
    [
        ((1, 2, 0), None),
        ((None, None, None), (1, [2, 7], 0)),  # as a trainer leaves a fine-tuned model
        ((1, [2], 0), (3, [4, 5], 6)),
        ((1, [2], None), (3, None, 6)),
        ((None, None, None), (None, None, None)),
        ((1, 2, -1), None),
        (None, (3, 4, 5)),
        (None, None),
    ],
)
def test_token_ids_at_either_level(inner, outer):
    """As `transformers`' `generate` uses them where there is no generation_config.json."""
    raw = whole(**dict(zip(IDS, outer, strict=True)) if outer else {})
    raw["text_config"] = without(raw["text_config"], *IDS)
    raw["text_config"] |= dict(zip(IDS, inner, strict=True)) if inner else {}
    config = transformers.Llama4Config(**json.loads(json.dumps(raw)))
    truth: Any = transformers.GenerationConfig.from_model_config(config)
    ours = l4.Llama4Config.from_hf(raw).text_config
    stop_ids = truth.eos_token_id
    stop_ids = [] if stop_ids is None else [stop_ids] if isinstance(stop_ids, int) else stop_ids
    assert list(ours.stop_ids) == stop_ids
    assert ours.bos_token_id == truth.bos_token_id
    # -1 is an old spelling of "there is none", in which transformers masks nothing either.
    assert ours.pad_token_id == (None if truth.pad_token_id == -1 else truth.pad_token_id)
    assert l4.TextConfig.from_hf(raw) == ours


@pytest.mark.parametrize("inner", [None, False, True])
@pytest.mark.parametrize("outer", [None, False, True])
def test_tied_embeddings_at_either_level(inner, outer):
    raw = whole()
    raw["text_config"] = without(raw["text_config"], "tie_word_embeddings")
    raw = without(raw, "tie_word_embeddings")
    raw |= {} if outer is None else {"tie_word_embeddings": outer}
    raw["text_config"] |= {} if inner is None else {"tie_word_embeddings": inner}
    theirs = transformers.Llama4ForConditionalGeneration(
        transformers.Llama4Config(**json.loads(json.dumps(raw)))
    ).language_model
    tied = theirs.lm_head.weight is theirs.get_input_embeddings().weight
    assert l4.Llama4Config.from_hf(raw).text_config.tie_word_embeddings == tied


def test_copies_of_text_fields_beside_the_text_decoder():
    """`transformers` doesn't read them, so a copy that says something else is an error."""
    copies = ("hidden_size", "vocab_size", "head_dim", "rope_scaling", "no_rope_layer_interval")
    raw = whole()
    raw |= {name: raw["text_config"][name] for name in copies}
    assert l4.Llama4Config.from_hf(raw) == MULTIMODAL
    assert l4.Llama4Config.from_hf(raw | {"attn_temperature_tuning": 4}) == MULTIMODAL
    for name, value in (("vocab_size", 300), ("rope_scaling", LLAMA3), ("use_qk_norm", False)):
        assert f"{name} in text_config is" in error_of(raw | {name: value})
    assert "hidden_size must be" in error_of(raw | {"hidden_size": "64"})
    assert "tie_word_embeddings must be" in error_of(raw | {"tie_word_embeddings": "false"})


def test_image_tokens_under_either_name_and_at_either_level():
    raw = without(whole(), "image_token_index", "boi_token_index")
    newer: Any = raw | {"image_token_id": 9, "boi_token_id": 7}
    config, theirs = l4.Llama4Config.from_hf(newer), transformers.Llama4Config(**newer)
    assert (config.image_token_index, config.boi_token_index) == (9, 7)
    assert (theirs.image_token_index, theirs.boi_token_index) == (9, 7)
    assert l4.Llama4Config.from_hf(newer | {"image_token_index": 9}) == config
    assert error_of(newer | {"image_token_index": 8}).startswith("image_token_index is 8, but")
    assert l4.Llama4Config.from_hf(whole(text={"image_token_index": 250})) == MULTIMODAL
    assert "image_token_index in text_config" in error_of(whole(text={"image_token_index": 251}))


def test_a_text_only_model_keeps_its_image_tokens():
    config = l4.Llama4Config(SCOUT, image_token_index=9)
    assert l4.Llama4Config.from_hf(config.to_hf()) == config
    assert l4.Llama4Config(SCOUT).to_hf() == SCOUT.to_hf()


@pytest.mark.parametrize("names", [("vision_config",), ("vision_config", "architectures")])
def test_a_whole_config_without_a_vision_encoder_is_text_only(names):
    for raw in (without(whole(), *names), whole() | dict.fromkeys(names)):
        assert l4.Llama4Config.from_hf(raw).vision_config is None
        assert l4.Llama4Config.from_hf(raw).text_config == SCOUT


# Spellings of RoPE


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rope_theta": 7.0},
        {"rope_scaling": None, "rope_parameters": None},
        {"rope_scaling": {}, "rope_parameters": {}},
        {"rope_scaling": LLAMA3, "rope_theta": 7.0},
        {"rope_scaling": without(LLAMA3, "rope_type") | {"type": "llama3"}},
        {"rope_scaling": LLAMA3 | {"type": "llama3"}},
        {"rope_scaling": without(LLAMA3, "original_max_position_embeddings")},
        {"rope_parameters": LLAMA3 | {"rope_theta": 7.0}},
        {"rope_parameters": {"rope_theta": 7.0}},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 7.0},
        {"rope_parameters": LLAMA3 | {"rope_theta": 7.0}, "rope_theta": 7.0},
        {"rope_parameters": LLAMA3, "rope_scaling": LLAMA3},
        {"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}, "rope_scaling": None},
    ],
)
def test_spellings_of_rope(fields):
    raw = without(SCOUT.to_hf(), "rope_scaling", "rope_theta") | fields
    theirs: Any = transformers.Llama4TextConfig(**json.loads(json.dumps(raw)))
    ours, truth = l4.TextConfig.from_hf(raw), theirs.rope_parameters
    assert ours.rope_theta == truth["rope_theta"]
    if truth["rope_type"] == "default":
        assert ours.rope_scaling is None
    else:
        assert vars(ours.rope_scaling).items() <= truth.items()


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'default' or 'llama3', not"),
        ({"rope_scaling": {"rope_type": None, "factor": 2.0}}, "has no rope_type, but has factor"),
        ({"rope_scaling": {"rope_type": "default", "factor": 2.0}}, "takes no scaling"),
        ({"rope_scaling": without(LLAMA3, "factor")}, "needs exactly factor"),
        ({"rope_scaling": LLAMA3 | {"attention_factor": 2.0}}, "needs exactly factor"),
        ({"rope_scaling": LLAMA3 | {"type": "default"}}, "keep the right one"),
        ({"rope_scaling": {"full_attention": LLAMA3}}, "has no rope_type, but has full_attention"),
        ({"rope_scaling": "llama3"}, "must be an object"),
        ({"rope_scaling": {"rope_type": ["llama3"]}}, "'default' or 'llama3', not"),
        ({"rope_parameters": LLAMA3, "rope_scaling": LLAMA3 | {"factor": 2.0}}, "keep the right"),
        ({"rope_parameters": {"rope_theta": 7.0}, "rope_theta": 8.0}, "rope_theta is 8.0, but"),
    ],
)
def test_spellings_of_rope_that_are_refused(fields, sentence):
    raw = without(SCOUT.to_hf(), "rope_scaling", "rope_theta") | fields
    assert sentence in error_of(raw)
    assert sentence in error_of(whole() | {"text_config": raw})


# Fields that change nothing


LEFTOVERS: list[dict[str, Any]] = [
    {"unsloth_fixed": True, "unsloth_version": "2026.4.5"},
    {"tokenizer_class": "PreTrainedTokenizerFast"},
    {"pretraining_tp": 1},
    {"sliding_window": None},
    {"is_decoder": True},
    {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_length": 4096, "num_beams": 4},
    {"auto_map": {"AutoConfig": "configuration_x.XConfig"}},
    {"_name_or_path": "x", "_commit_hash": None, "_attn_implementation_autoset": True},
    {
        "torchscript": False,
        "pruned_heads": {},
        "finetuning_task": None,
        "gradient_checkpointing": 1,
    },
    {"mlp_bias": False, "router_jitter_noise": 0.0, "partial_rotary_factor": 1.0},
    {"torch_dtype": "bfloat16", "dtype": "float32"},
    {"quantization_config": None, "per_layer_config": None, "use_cache": False},
]


@pytest.mark.parametrize("extra", LEFTOVERS)
def test_harmless_fields(extra):
    """Read at every level; `transformers` gives the same logits with them."""
    assert l4.Llama4Config.from_hf(SCOUT.to_hf() | extra).text_config == SCOUT
    assert l4.Llama4Config.from_hf(whole(text=extra, vision=extra, **extra)) == MULTIMODAL
    tokens = torch.arange(24)[None]
    plain = reference_model(SCOUT)
    dtypes = {"torch_dtype", "dtype"} & extra.keys()  # the test's is float32
    fields: dict[str, Any] = (
        SCOUT.to_hf() | without(extra, *dtypes) | {"attn_implementation": "eager"}
    )
    model = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**fields)).eval()
    model.load_state_dict(plain.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, plain(tokens).logits, rtol=0, atol=0)


def test_everything_that_transformers_writes_into_any_config_is_known():
    base = transformers.PreTrainedConfig().to_dict() | transformers.GenerationConfig().to_dict()
    extra = without(base, "model_type", *IDS)
    assert len(extra) > 60
    assert l4.Llama4Config.from_hf(SCOUT.to_hf() | extra).text_config == SCOUT
    assert l4.Llama4Config.from_hf(whole(text=extra, vision=extra, **extra)) == MULTIMODAL


@pytest.mark.parametrize(
    ("name", "value", "meaning"),
    [
        ("sliding_window", 512, "sliding-window attention"),
        ("pretraining_tp", 2, "slices"),
        ("router_jitter_noise", 0.1, "noise"),
        ("mlp_bias", True, "biases in the MLPs"),
        ("partial_rotary_factor", 0.5, "a part of each head"),
        ("is_encoder_decoder", True, "encoder-decoder"),
        ("pruned_heads", {"0": [1]}, "pruned"),
        ("final_logit_softcapping", 30.0, "capped logits"),
        ("per_layer_config", {"0": {"head_dim": 8}}, "different hyperparameters"),
        ("multi_modal_projector_bias", True, "a bias in the projector"),
        ("vision_feature_layer", -2, "an inner vision layer"),
        ("transformers_weights", "adapter.safetensors", "another name"),
        ("sliding_window", "null", "sliding-window attention"),
        ("mlp_bias", "false", "biases in the MLPs"),
    ],
)
def test_fields_that_would_change_the_function(name, value, meaning):
    for raw in (
        SCOUT.to_hf() | {name: value},
        whole(**{name: value}),
        whole(text={name: value}),
        whole(vision={name: value}),
    ):
        message = error_of(raw)
        assert f"{name} = {json.dumps(value)}, which asks for" in message
        assert meaning in message


@pytest.mark.parametrize(
    ("raw", "where"),
    [
        (whole(mystery=1), "config.json"),
        (whole(text={"mystery": 1}), "text_config"),
        (whole(vision={"mystery": 1}), "vision_config"),
        (SCOUT.to_hf() | {"mystery": 1}, "text_config"),
    ],
)
def test_unknown_fields(raw, where):
    assert error_of(raw).startswith(f"{where} has fields that this package doesn't know: mystery.")


def test_unknown_fields_are_capped():
    message = error_of(SCOUT.to_hf() | {f"x{i:03}": i for i in range(200)} | {"y" * 10**6: 1})
    assert "x000, x001, " in message
    assert "x009, and 191 more" in message
    assert "x010" not in message


# Other families


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (transformers.LlamaConfig(), "llama"),
        (transformers.MistralConfig(), "mistral"),
        (transformers.Qwen3Config(), "qwen3"),
        (transformers.GPT2Config(), "gpt2"),
        (transformers.LlavaConfig(), "llava"),
        (transformers.Llama4VisionConfig(), "llama4_vision_model"),
    ],
)
def test_other_families(config, name, tmp_path):
    config.save_pretrained(tmp_path)
    for cls in (l4.Llama4Config, l4.TextConfig):
        message = error_of(tmp_path, cls)
        assert message.startswith(f"{tmp_path / 'config.json'} can't be read: config.json is")
        assert name in message
    raw = without(json.loads((tmp_path / "config.json").read_text()), "model_type")
    if name in ("llama", "mistral", "gpt2"):
        assert "no model_type and no field that only Llama 4 has" in error_of(raw)


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (SCOUT.to_hf() | {"model_type": "llama"}, 'model_type "llama"'),
        (SCOUT.to_hf() | {"model_type": ""}, 'model_type ""'),
        (SCOUT.to_hf() | {"model_type": ["llama4"]}, 'model_type ["llama4"]'),
        (SCOUT.to_hf() | {"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        (SCOUT.to_hf() | {"architectures": ["Llama4ForSequenceClassification"]}, "Sequence"),
        (SCOUT.to_hf() | {"architectures": "Llama4ForCausalLM"}, "must be a list"),
        (whole(text={"model_type": "mistral"}), 'text_config is of another family, model_type "mi'),
        (
            whole(vision={"model_type": "siglip"}),
            'vision_config is of another family, model_type "s',
        ),
        ({"peft_type": "LORA", "r": 8}, "an adapter"),
        ({}, "no field that only Llama 4 has"),
        ({"hidden_size": 48}, "no field that only Llama 4 has"),
        ({"text_config": {"hidden_size": 48}}, "no field that only Llama 4 has"),
        ({"hidden_size": "48"}, "hidden_size must be a positive whole number"),
        (SCOUT.to_hf() | {"model_type": "llama4"}, "has no text_config"),
        (whole(model_type="llama4_text"), "but has a text_config"),
        (SCOUT.to_hf() | {"vision_config": RELEASED_VISION}, "but has a vision_config"),
        (whole() | {"text_config": None}, "has no text_config"),
        ({"vision_config": RELEASED_VISION}, "has no text_config"),
        (whole(text={"text_config": RELEASED_SCOUT_TEXT}), "doesn't know: text_config"),
        (whole() | {"text_config": [RELEASED_SCOUT_TEXT]}, "text_config must be an object"),
        (whole() | {"vision_config": True}, "vision_config must be an object"),
    ],
)
def test_other_families_and_wrong_nesting(raw, sentence):
    assert sentence in error_of(raw)


def test_files_without_a_model_type():
    raw = without(SCOUT.to_hf(), "model_type", "architectures")
    assert l4.Llama4Config.from_hf(raw).text_config == SCOUT
    raw = without(whole(), "model_type", "architectures")
    raw["text_config"] = without(raw["text_config"], "model_type", "architectures")
    raw["vision_config"] = without(raw["vision_config"], "model_type")
    assert l4.Llama4Config.from_hf(raw) == MULTIMODAL
    assert l4.VisionConfig.from_hf(raw["vision_config"]) == MULTIMODAL.vision_config
    fsdp = SCOUT.to_hf() | {"architectures": ["FSDPLlama4ForCausalLM"]}
    assert l4.Llama4Config.from_hf(fsdp).text_config == SCOUT


def test_the_vision_encoder_of_a_text_only_model():
    assert "has no vision_config" in error_of(whole() | {"vision_config": None}, l4.VisionConfig)
    assert "llama4_text" in error_of(SCOUT.to_hf(), l4.VisionConfig)


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "gptq", "bits": 4},
        {"bits": 8},
        {},
        "fp8",
    ],
)
def test_quantised_checkpoints_are_named(settings):
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    for raw in (
        SCOUT.to_hf() | {"quantization_config": settings},
        whole(quantization_config=settings),
        whole(text={"quantization_config": settings}),
        whole(text={"compression_config": settings}),
        whole(vision={"quantization": settings}),
    ):
        message = error_of(raw)
        assert "is quantised with" in message
        assert (method or "an unnamed method") in message


# Files


def test_a_part_is_never_a_path(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(RELEASED_SCOUT_TEXT))
    for path in (str(tmp_path), str(tmp_path / "config.json")):
        assert "text_config must be an object" in error_of(RELEASED_SCOUT | {"text_config": path})
        assert "vision_config must be an object" in error_of(
            RELEASED_SCOUT | {"vision_config": path}
        )
        assert "must be an object" in error_of({"text_config": path}, l4.TextConfig)
        assert "must be an object" in error_of(
            {"vision_config": path, "text_config": RELEASED_SCOUT_TEXT}, l4.VisionConfig
        )


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "it is empty"),
        (b" \n", "it is empty"),
        (b"{", "is not valid JSON"),
        (b"[1]", "must hold an object, but holds [1]"),
        (b"null", "must hold an object, but holds null"),
        (b'"config.json"', "must hold an object"),
        (json.dumps(RELEASED_SCOUT).encode()[:1000], "is not valid JSON"),
        (json.dumps(RELEASED_SCOUT).encode() + b"}", "is not valid JSON"),
        (json.dumps(RELEASED_SCOUT).encode("utf-16"), "is not UTF-8"),
        (b'{"a": "\xff"}', "is not UTF-8"),
        (json.dumps(RELEASED_SCOUT).encode("utf-8-sig"), "byte-order mark"),
        (b'{"hidden_size": 48, "hidden_size": 64}', '"hidden_size" is there twice'),
        (b'{"text_config": {"a": 1, "a": 1}}', '"a" is there twice'),
        (b"[" * 10**6, "nested too deeply"),
        (b'{"a":' * 10**5 + b"1" + b"}" * 10**5, "nested too deeply"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "a number has 5000 digits"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "not valid JSON"),
        (b"\x00" * 100, "is not valid JSON"),
    ],
)
def test_damaged_files(content, sentence, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    for source in (path, tmp_path, str(tmp_path)):
        for cls in (l4.Llama4Config, l4.TextConfig, l4.VisionConfig):
            message = error_of(source, cls)
            assert message.startswith(str(path))
            assert sentence in message


def test_a_huge_file_is_not_read(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(100 * 10**6)
    assert "has 100000000 bytes" in error_of(tmp_path)


def test_missing_files(tmp_path):
    (tmp_path / "folder" / "config.json").mkdir(parents=True)
    assert "is a folder" in error_of(tmp_path / "folder")
    for source in (tmp_path, tmp_path / "x.json", str(tmp_path / "x" / "y"), "x" * 10**4):
        with pytest.raises(FileNotFoundError, match=r"give a config\.json or the folder") as caught:
            l4.Llama4Config.from_hf(source)
        assert len(str(caught.value)) < 500


def test_errors_name_the_file(tmp_path):
    path = tmp_path / "config.json"
    for change, sentence in (
        ({"hidden_size": "48"}, "In text_config, hidden_size must be"),
        ({"mystery": 1}, "text_config has fields"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps must be a positive finite number"),
        ({"quantization_config": {"quant_method": "gptq"}}, '"gptq"'),
    ):
        path.write_text(json.dumps(RELEASED_MAVERICK_TEXT | change))
        message = error_of(tmp_path)
        assert message.startswith(f"{path} can't be read: ")
        assert sentence in message
