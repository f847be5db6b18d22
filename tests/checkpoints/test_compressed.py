"""Quantised weights in the layout of `compressed-tensors`, against that library's own code."""

import json
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from jax.sharding import AxisType
from safetensors.torch import load_file, save_file

import llama4_eqx as l4
from llama4_eqx.checkpoints.compressed import unpacked
from llama4_eqx.distributed import EXPERT_REPLICATED_TOKENS, FSDP, shardings, unshard
from llama4_eqx.layers.quantized import dequantized, is_quantized
from tests.toys import MAVERICK, SCOUT, as_torch, random_tokens, reference_model, relative_error

pytestmark = pytest.mark.slow

TOLERANCE = 2e-5
WEIGHTS = {
    "fp8 channel": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8 tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "fp8 block": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 32]},
    ),
    "int8 channel": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    "int8 asymmetric": (
        "int-quantized",
        {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False},
    ),
    "int4 groups": (
        "pack-quantized",
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16},
    ),
    "int4 asymmetric": (
        "pack-quantized",
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8, "symmetric": False},
    ),
    "int4 channel": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "channel"}),
    "int3 groups": (
        "pack-quantized",
        {"num_bits": 3, "type": "int", "strategy": "group", "group_size": 32},
    ),
    "int8 packed": (
        "pack-quantized",
        {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 32},
    ),
}


def quantised(weight, form, settings, dtype):
    """What the library stores for a weight, and what it makes of that again."""
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**settings))
    args, compressor = scheme.weights, BaseCompressor.get_value_from_registry(form)
    low, high = limits(weight, args)
    scale, zero_point = calculate_qparams(low, high, args)
    stored = {"weight": weight, "weight_scale": scale.to(dtype), "weight_zero_point": zero_point}
    stored = compressor.compress(stored, scheme)
    return stored, compressor.decompress(dict(stored), scheme)["weight"]


def limits(weight, args):
    if args.strategy == "tensor":
        return weight.min().reshape(1), weight.max().reshape(1)
    if args.strategy == "block":
        a, b = args.block_structure
        blocks = weight.reshape(weight.shape[0] // a, a, weight.shape[1] // b, b)
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    size = args.group_size if args.strategy == "group" else weight.shape[1]
    groups = weight.reshape(len(weight), -1, size)
    return groups.amin(-1), groups.amax(-1)


def write(folder, reference, form, settings, dtype=torch.float32):
    """A folder as llm-compressor leaves it: experts unfused, router, norms and ends as they were.

    Gives the reference the dequantised weights."""
    tensors, modules = {}, {}
    for name, weight in reference.state_dict().items():
        if "experts" in name and "shared" not in name:
            for i, matrix in enumerate(weight):
                halves = matrix.chunk(2, -1) if name.endswith("gate_up_proj") else [matrix]
                kinds = ("gate", "up") if len(halves) == 2 else ("down",)
                for kind, half in zip(kinds, halves, strict=True):
                    prefix = name.rpartition(".")[0]
                    modules[f"{prefix}.{i}.{kind}_proj"] = half.T.contiguous()
        elif "proj" in name:
            modules[name.removesuffix(".weight")] = weight
        else:
            tensors[name] = weight.contiguous()
    truth = {}
    for name, weight in modules.items():
        stored, truth[name] = quantised(weight, form, settings, dtype)
        tensors |= {f"{name}.{key}": value.contiguous() for key, value in stored.items()}
    state = {}
    for name, weight in reference.state_dict().items():
        prefix, _, last = name.rpartition(".")
        if name.removesuffix(".weight") in truth:
            state[name] = truth[name.removesuffix(".weight")].float()
        elif last in ("gate_up_proj", "down_proj"):
            kinds = ("gate", "up") if last == "gate_up_proj" else ("down",)
            state[name] = torch.stack(
                [
                    torch.cat([truth[f"{prefix}.{i}.{kind}_proj"].float().T for kind in kinds], -1)
                    for i in range(len(weight))
                ]
            )
        else:
            state[name] = weight
    reference.load_state_dict(state)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = reference.config.to_dict() | {
        "architectures": ["Llama4ForCausalLM"],
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": form,
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": settings}},
            "ignore": ["lm_head", "re:.*router"],
            "quantization_status": "compressed",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    return state


def logits(model, tokens):
    return eqx.filter_jit(lambda model, tokens: model(tokens).logits)(model, tokens)


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_bit_equal_and_logits_those_of_the_library(name, tmp_path):
    config = MAVERICK if name in ("fp8 channel", "int4 groups") else SCOUT
    reference, tokens = reference_model(config), random_tokens(2, 20)
    before = torch.clone(reference.model.layers[0].self_attn.q_proj.weight)
    state = write(tmp_path / "quantised", reference, *WEIGHTS[name])
    reference.save_pretrained(tmp_path / "plain")
    ours, plain = (l4.load_checkpoint(tmp_path / f) for f in ("quantised", "plain"))
    for path, leaf in jax.tree_util.tree_leaves_with_path(ours):
        name = jax.tree_util.keystr(path)
        truth = dict(jax.tree_util.tree_leaves_with_path(plain))[path]
        np.testing.assert_array_equal(leaf, truth, err_msg=name)
    assert not torch.equal(before, state["model.layers.0.self_attn.q_proj.weight"])
    with torch.no_grad():
        truth = reference(as_torch(tokens, torch.long)).logits
    assert relative_error(logits(ours, tokens), truth) < TOLERANCE


def test_scales_in_bfloat16_and_another_dtype(tmp_path):
    reference = reference_model(SCOUT)
    state = write(tmp_path / "model", reference, *WEIGHTS["fp8 channel"], dtype=torch.bfloat16)
    stored = state["model.layers.0.self_attn.q_proj.weight"]
    model = l4.load_checkpoint(tmp_path / "model", dtype=jnp.bfloat16)
    weight = model.decoder.layers()[0].self_attn.q_proj
    np.testing.assert_array_equal(weight.astype(jnp.float32).reshape(stored.shape), stored)
    l4.save_checkpoint(model, tmp_path / "dense")
    again = l4.load_checkpoint(tmp_path / "dense")
    assert eqx.tree_equal(again, model)


# What becomes of each kind, as numbers and groups of q_proj's inputs; None for no `Quantized`.
KEPT = {
    "fp8 channel": ("float8_e4m3fn", 1),
    "fp8 tensor": ("float8_e4m3fn", 1),
    "fp8 block": ("float8_e4m3fn", 2),
    "int8 channel": ("int8", 1),
    "int8 asymmetric": None,
    "int4 groups": ("uint8", 4),
    "int4 asymmetric": None,
    "int4 channel": ("uint8", 1),
    "int3 groups": ("int8", 2),
    "int8 packed": ("int8", 2),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_as_stored_the_numbers_stay(name, tmp_path):
    """Each weight stands for the very one that is dequantised; on a mesh, too."""
    config = MAVERICK if name in ("fp8 channel", "int4 groups") else SCOUT
    write(tmp_path / "model", reference_model(config), *WEIGHTS[name], dtype=torch.bfloat16)
    whole = l4.load_checkpoint(tmp_path / "model", dtype=jnp.float32)
    ours = l4.load_checkpoint(tmp_path / "model", quantize="as stored", dtype=jnp.float32)
    for path, leaf in jax.tree_util.tree_leaves_with_path(dequantized(ours)):
        truth = dict(jax.tree_util.tree_leaves_with_path(whole))[path]
        np.testing.assert_array_equal(leaf, truth, err_msg=jax.tree_util.keystr(path))
    weight = ours.decoder.blocks[0].layers[0].self_attn.q_proj
    assert is_quantized(weight) == (KEPT[name] is not None)
    if KEPT[name] is not None:
        assert (weight.numbers.dtype, weight.scale.shape[-1]) == KEPT[name]
        assert is_quantized(ours.decoder.blocks[-1].layers[-1].feed_forward.experts.down_proj)
    mesh = jax.make_mesh((2, 2), ("fsdp", "expert"), axis_types=(AxisType.Auto,) * 2)
    rules = FSDP | EXPERT_REPLICATED_TOKENS
    sharded = l4.load_checkpoint(
        tmp_path / "model", quantize="as stored", dtype=jnp.float32, mesh=mesh, rules=rules
    )
    assert eqx.tree_equal(unshard(sharded), ours)
    for leaf, placed in zip(
        jax.tree.leaves(eqx.filter(sharded, eqx.is_array)),
        jax.tree.leaves(shardings(eqx.filter(ours, eqx.is_array), mesh, rules)),
        strict=True,
    ):
        assert leaf.sharding.is_equivalent_to(placed, leaf.ndim)


def test_as_stored_one_program_makes_all_weights_of_a_shape(tmp_path, compiled):
    write(tmp_path / "model", reference_model(SCOUT), *WEIGHTS["int4 groups"])
    jax.clear_caches()
    compiled.clear()
    model = l4.load_checkpoint(tmp_path / "model", quantize="as stored")
    weights = [x for x in jax.tree.leaves(model, is_leaf=is_quantized) if is_quantized(x)]
    assert 0 < compiled.count("jit(_stand_in)") <= len({weight.shape for weight in weights})


@pytest.mark.parametrize("name", ["fp8 tensor", "fp8 block", "int4 groups", "int4 channel"])
def test_as_stored_the_logits_are_those_of_the_weights(name, tmp_path):
    write(tmp_path / "model", reference_model(SCOUT), *WEIGHTS[name])
    model = l4.load_checkpoint(tmp_path / "model", quantize="as stored")
    tokens = random_tokens(2, 20)
    assert relative_error(logits(model, tokens), logits(dequantized(model), tokens)) < TOLERANCE


def test_as_stored_is_saved_again(tmp_path):
    write(tmp_path / "model", reference_model(MAVERICK), *WEIGHTS["int4 groups"])
    model = l4.load_checkpoint(tmp_path / "model", quantize="as stored")
    l4.save_checkpoint(model, tmp_path / "again")
    assert eqx.tree_equal(l4.load_checkpoint(tmp_path / "again", quantize="as stored"), model)
    with pytest.raises(ValueError, match="'as stored', not 'int4'"):
        l4.load_checkpoint(tmp_path / "model", quantize="int4")


def test_a_stack_of_two_kinds_is_dequantised(tmp_path):
    """One layer's weights were left out of the quantisation; the others of its stack go along."""
    state = write(tmp_path / "model", reference_model(SCOUT), *WEIGHTS["fp8 channel"])
    file, name = tmp_path / "model" / "model.safetensors", "model.layers.0.self_attn.q_proj"
    tensors = load_file(file)
    del tensors[f"{name}.weight_scale"]
    tensors[f"{name}.weight"] = state[f"{name}.weight"]
    save_file(tensors, file)
    model = l4.load_checkpoint(tmp_path / "model", quantize="as stored")
    attention = model.decoder.blocks[0].layers[0].self_attn
    assert not is_quantized(attention.q_proj)
    assert is_quantized(attention.k_proj)


def test_names_of_wrapped_modules(tmp_path):
    """Parts of one weight are found under the names that torch's wrappers leave, too."""
    reference = reference_model(replace(SCOUT, num_hidden_layers=2))
    write(tmp_path / "model", reference, *WEIGHTS["int4 groups"])
    truth = l4.load_checkpoint(tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    wrapped = {
        f"module.{name.replace('q_proj.', 'q_proj._orig_mod.')}": tensor
        for name, tensor in load_file(file).items()
    }
    save_file(wrapped, file)
    assert eqx.tree_equal(l4.load_checkpoint(tmp_path / "model"), truth)


@pytest.mark.parametrize("bits", range(1, 9))
def test_unpacking(bits):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    random = np.random.default_rng(bits)
    for columns in (1, 31, 32, 77):
        low = 2 ** (bits - 1)
        numbers = random.integers(-low, low, (5, columns)).astype(np.int8)
        words = pack_to_int32(torch.tensor(numbers), bits).numpy()
        np.testing.assert_array_equal(unpacked(words, bits, columns), numbers)


def test_groups_in_another_order(tmp_path):
    """`weight_g_idx` (GPTQ's activation order) says which group a column belongs to."""
    reference = reference_model(replace(SCOUT, moe_layers=()))
    write(tmp_path / "model", reference, *WEIGHTS["int4 groups"])
    file = tmp_path / "model" / "model.safetensors"
    tensors, name = load_file(file), "model.layers.1.self_attn.v_proj"
    order = torch.randperm(64) // 16
    tensors[f"{name}.weight_g_idx"] = order.to(torch.int32)
    numbers = unpacked(tensors[f"{name}.weight_packed"].numpy(), 4, 64).astype(np.float32)
    save_file(tensors, file)
    ours = l4.load_checkpoint(tmp_path / "model").decoder.layers()[1].self_attn.v_proj
    truth = numbers * tensors[f"{name}.weight_scale"].numpy()[:, order.numpy()]
    np.testing.assert_array_equal(ours.reshape(truth.shape), truth)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format": "nvfp4-pack-quantized"}, 'the format "nvfp4-pack-quantized"'),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity"),
        ({"config_groups": {}}, "an unnamed scheme"),
        ({"config_groups": {"a": {"weights": {"strategy": "token"}}}}, 'the strategy "token"'),
        ({"config_groups": {"a": 3}}, "the strategy null"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_other_schemes_are_named(tmp_path, change, sentence):
    write(tmp_path / "model", reference_model(SCOUT), *WEIGHTS["fp8 channel"])
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(l4.CheckpointError, match=sentence):
        l4.load_checkpoint(tmp_path / "model")


@pytest.mark.parametrize(
    ("kind", "damage", "sentence"),
    [
        ("fp8 channel", {"weight_scale": None}, "is float8|must be one of"),
        ("fp8 channel", {"weight": None}, "lacks its numbers"),
        ("fp8 channel", {"weight_scale": torch.ones(7, 1)}, "scales of shape"),
        ("int4 groups", {"weight_shape": None}, "lacks its weight_shape"),
        ("int4 groups", {"weight_scale": torch.ones(64, 3)}, "scales for 3 groups"),
        ("int4 groups", {"weight_packed": torch.ones(64, 3, dtype=torch.int32)}, "words of shape"),
    ],
)
def test_damaged_ones_are_named(tmp_path, kind, damage, sentence):
    write(tmp_path / "model", reference_model(SCOUT), *WEIGHTS[kind])
    file, name = tmp_path / "model" / "model.safetensors", "model.layers.1.self_attn.q_proj"
    tensors = load_file(file)
    for field, value in damage.items():
        tensors.pop(f"{name}.{field}")
        if value is not None:
            tensors[f"{name}.{field}"] = value
    save_file(tensors, file)
    with pytest.raises(l4.CheckpointError, match=rf"layers\.1\.self_attn\.q_proj.*({sentence})"):
        l4.load_checkpoint(tmp_path / "model")
