"""Converting Meta's checkpoints, `params.json` and `consolidated.NN.pth`, to Hugging Face folders.

Needs the extra `meta` (torch). The files are read by `torch.load(weights_only=True)`, which builds
only tensors, and are memory-mapped. The names and the axis along which each tensor is sharded are
those of llama-models 0.3.0 (`checkpoint.py` and the modules' load hooks).
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llama4_eqx.checkpoints.errors import CheckpointError
from llama4_eqx.config import Llama4Config, RopeScaling, TextConfig, VisionConfig

# Meta's tensor, Hugging Face's, and the axis that is sharded among Meta's files (- if none).
_WHOLE = """
    tok_embeddings.weight     language_model.model.embed_tokens.weight  0
    norm.weight               language_model.model.norm.weight          -
    output.weight             language_model.lm_head.weight             0
    vision_projection.weight  multi_modal_projector.linear_1.weight     0
"""
# After `layers.N.`, and after `language_model.model.layers.N.`; some have two names at Meta.
_TEXT_LAYER = """
    attention_norm.weight                  input_layernorm.weight            -
    attention.wqkv.layer_norm_weight       input_layernorm.weight            -
    ffn_norm.weight                        post_attention_layernorm.weight   -
    feed_forward.norm.weight               post_attention_layernorm.weight   -
    feed_forward.mlp.layer_norm_weight     post_attention_layernorm.weight   -
    attention.wq.weight                    self_attn.q_proj.weight           0
    attention.wk.weight                    self_attn.k_proj.weight           0
    attention.wv.weight                    self_attn.v_proj.weight           0
    attention.wo.weight                    self_attn.o_proj.weight           1
    feed_forward.w1.weight                 feed_forward.gate_proj.weight     0
    feed_forward.w3.weight                 feed_forward.up_proj.weight       0
    feed_forward.w2.weight                 feed_forward.down_proj.weight     1
    feed_forward.mlp.fc2_weight            feed_forward.down_proj.weight     1
    feed_forward.w_in_shared_FD.weight     feed_forward.shared_expert.gate_proj.weight  0
    feed_forward.w_swiglu_FD.weight        feed_forward.shared_expert.up_proj.weight    0
    feed_forward.w_out_shared_DF.weight    feed_forward.shared_expert.down_proj.weight  1
    feed_forward.shared_expert.w1.weight   feed_forward.shared_expert.gate_proj.weight  0
    feed_forward.shared_expert.w3.weight   feed_forward.shared_expert.up_proj.weight    0
    feed_forward.shared_expert.w2.weight   feed_forward.shared_expert.down_proj.weight  1
"""
# After `vision_embeddings.`, and after `vision_model.`
_VISION = """
    vision_adapter.mlp.c_fc.weight           vision_adapter.mlp.fc1.weight  0
    vision_adapter.mlp.c_proj.weight         vision_adapter.mlp.fc2.weight  1
    vision_encoder.class_embedding           class_embedding                -
    vision_encoder.positional_embedding_vlm  positional_embedding_vlm       -
    vision_encoder.conv1._linear.weight      patch_embedding.linear.weight  0
    vision_encoder.ln_pre.weight             layernorm_pre.weight           -
    vision_encoder.ln_pre.bias               layernorm_pre.bias             -
    vision_encoder.ln_post.weight            layernorm_post.weight          -
    vision_encoder.ln_post.bias              layernorm_post.bias            -
"""
# After `vision_embeddings.vision_encoder.transformer.resblocks.N.`, and after
# `vision_model.model.layers.N.`
_VISION_LAYER = """
    ln_1.weight         input_layernorm.weight           -
    ln_1.bias           input_layernorm.bias             -
    ln_2.weight         post_attention_layernorm.weight  -
    ln_2.bias           post_attention_layernorm.bias    -
    attn.wq.weight      self_attn.q_proj.weight          0
    attn.wk.weight      self_attn.k_proj.weight          0
    attn.wv.weight      self_attn.v_proj.weight          0
    attn.wo.weight      self_attn.o_proj.weight          1
    attn.wq.bias        self_attn.q_proj.bias            0
    attn.wk.bias        self_attn.k_proj.bias            0
    attn.wv.bias        self_attn.v_proj.bias            0
    attn.wo.bias        self_attn.o_proj.bias            -
    mlp.c_fc.weight     mlp.fc1.weight                   0
    mlp.c_fc.bias       mlp.fc1.bias                     0
    mlp.c_proj.weight   mlp.fc2.weight                   1
    mlp.c_proj.bias     mlp.fc2.bias                     -
"""
# The experts' three tensors under both of Meta's spellings: gates, ups, downs.
_EXPERTS = (("moe_w_in_eD_F", "moe_w_swiglu_eD_F", "moe_w_out_eF_D"), ("w1", "w3", "w2"))
_DERIVED = re.compile(r"rope\.freqs|_extra_state$")


def _table(text: str) -> dict[str, tuple[str, int | None]]:
    rows = [line.split() for line in text.strip().splitlines()]
    return {meta: (ours, None if axis == "-" else int(axis)) for meta, ours, axis in rows}


# Prefixes of Meta's and of Hugging Face's names, and the table for the rest; the first match wins.
_RULES = (
    (
        r"vision_embeddings\.vision_encoder\.transformer\.resblocks\.(\d+)\.",
        r"vision_model.model.layers.\1.",
        _table(_VISION_LAYER),
    ),
    (r"vision_embeddings\.", "vision_model.", _table(_VISION)),
    (r"layers\.(\d+)\.", r"language_model.model.layers.\1.", _table(_TEXT_LAYER)),
    ("", "", _table(_WHOLE)),
)


def convert_meta_checkpoint(
    source: str | os.PathLike[str], target: str | os.PathLike[str]
) -> Llama4Config:
    """Writes Meta's checkpoint folder `source` as the Hugging Face folder `target`, for
    `load_checkpoint` and `transformers`, and returns its config.

    Writes one file for each layer, so memory holds little more than one layer. `target` appears
    when it is complete; the tokenizer is copied.

    Raises `CheckpointError` for tensors that it doesn't know or that don't fit each other, and
    `FileExistsError` for a target that exists. The size of a context isn't in Meta's files: set
    `max_position_embeddings` in the new `config.json` where it matters.
    """
    source, target = Path(source), Path(target).absolute()
    if target.exists():
        raise FileExistsError(f"{target} exists: choose another folder.")
    shards = _open(source)
    try:
        config = _config(source, shards[0])
    except (KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{source} is damaged: params.json can't be read, or it or the tensors lack {error}."
        ) from error
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-partial-", dir=target.parent))
    try:
        _write(config, shards, partial)
        if (source / "tokenizer.model").is_file():
            shutil.copy2(source / "tokenizer.model", partial)
        partial.chmod(0o755)  # mkdtemp's folders are private
        partial.rename(target)
    except OSError as error:
        raise OSError(
            error.errno,
            f"Could not write {target}: {error.strerror or error}. Nothing was left there; make "
            "room or choose another place, and convert again.",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return config


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            "Reading Meta's checkpoints needs the `torch` package: pip install 'llama4_eqx[meta]'"
        ) from error
    return torch


def _open(source: Path) -> list[dict[str, Any]]:
    files = sorted(source.glob("consolidated.*.pth"))
    if not files or not (source / "params.json").is_file():
        raise FileNotFoundError(f"{source} doesn't hold params.json and consolidated.*.pth.")
    torch, shards = _torch(), []
    for file in files:
        try:
            shard = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # torch raises whatever a broken file leads it to
            raise CheckpointError(
                f"{file} can't be read as plain tensors ({error}): it is cut short, damaged, or "
                "holds other Python objects, which are never loaded."
            ) from error
        shards.append({name: t for name, t in shard.items() if not _DERIVED.search(name)})
    different = set().union(*shards) - set(shards[0]).intersection(*shards)
    if different:
        raise CheckpointError(f"The files of {source} hold different tensors: {sorted(different)}")
    return shards


def _config(source: Path, shard: dict[str, Any]) -> Llama4Config:
    """The config in `params.json`, with the widths that it lacks taken from the tensors."""
    params = json.loads((source / "params.json").read_text())
    files = len(list(source.glob("consolidated.*.pth")))
    heads, experts = params["n_heads"], (params.get("moe_args") or {})

    def width(*endings: str, axis: int, of: int = 1) -> int | None:
        """The size of an axis that is sharded among files, of the first tensor with that name."""
        for name, tensor in shard.items():
            if name.endswith(endings) and name.startswith("layers."):
                return tensor.shape[axis] * files // of
        return None

    vocab = shard["tok_embeddings.weight"].shape[0] * files
    shared = width("w_in_shared_FD.weight", "shared_expert.w1.weight", axis=0)
    dense = width(".feed_forward.w1.weight", axis=0) or width("mlp.fc1_weight", axis=0, of=2)
    scaling = None
    if params.get("use_scaled_rope"):
        # Where the file is silent: the values of Scout, as in Meta's `ModelArgs`.
        factor = float(params.get("rope_scaling_factor") or 16)
        scaling = RopeScaling(factor, 1.0, float(params.get("rope_high_freq_factor") or 1), 8192)
    layers, nope = params["n_layers"], params.get("nope_layer_interval")
    text = TextConfig(
        vocab_size=vocab,
        hidden_size=params["dim"],
        intermediate_size=shared or dense or 0,
        intermediate_size_mlp=dense or shared or 0,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=params.get("n_kv_heads") or heads,
        head_dim=params.get("head_dim") or params["dim"] // heads,
        num_experts_per_tok=experts.get("top_k", 1),
        num_local_experts=experts.get("num_experts", 1),
        moe_layers=None if experts else (),
        interleave_moe_layer_step=experts.get("interleave_moe_layer_step", 1),
        no_rope_layers=tuple(0 if nope and (i + 1) % nope == 0 else 1 for i in range(layers)),
        attention_chunk_size=params.get("attention_chunk_size"),
        rope_theta=float(params.get("rope_theta", 500000)),
        rope_scaling=scaling,
        rms_norm_eps=float(params.get("norm_eps", 1e-5)),
        use_qk_norm=params.get("use_qk_norm", False),
        attn_temperature_tuning=params.get("attn_temperature_tuning", False),
        floor_scale=int(params.get("floor_scale", 8192)),
        attn_scale=float(params.get("attn_scale", 0.1)),
    )
    vision = params.get("vision_args")
    if vision is None:
        return Llama4Config(text)
    if vision["image_size"]["height"] != vision["image_size"]["width"]:
        raise CheckpointError(f"Tiles must be square; params.json has {vision['image_size']}.")
    return Llama4Config(
        text,
        VisionConfig(
            hidden_size=vision["dim"],
            num_hidden_layers=vision["n_layers"],
            num_attention_heads=vision["n_heads"],
            intermediate_size=int(vision["mlp_ratio"] * vision["dim"]),
            vision_output_dim=vision["output_dim"],
            image_size=vision["image_size"]["height"],
            patch_size=vision["patch_size"]["height"],
            pixel_shuffle_ratio=float(vision["pixel_shuffle_ratio"]),
            projector_input_dim=vision["output_dim"],
            projector_output_dim=vision["output_dim"],
        ),
    )


def _write(config: Llama4Config, shards: Sequence[dict[str, Any]], folder: Path) -> None:
    from safetensors.torch import save_file

    groups: dict[str, list[str]] = {}
    for name in shards[0]:
        groups.setdefault(".".join(re.findall(r"^layers\.\d+|resblocks\.\d+", name)), []).append(
            name
        )
    weight_map = {}
    for number, names in enumerate(groups.values(), start=1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        sharded = {name: [shard[name] for shard in shards] for name in names}
        content = {
            name if config.vision_config else name.removeprefix("language_model."): tensor
            for name, tensor in _converted(sharded, config)
        }
        save_file({name: t.contiguous() for name, t in content.items()}, folder / file)
        weight_map |= dict.fromkeys(content, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(config.to_hf(), indent=2))


def _converted(sharded: dict[str, list[Any]], config: Llama4Config) -> Iterator[tuple[str, Any]]:
    """Hugging Face's names and whole tensors, from the shards of some of Meta's."""
    torch, text = _torch(), config.text_config
    experts: dict[str, dict[str, Any]] = {}
    for name, pieces in sharded.items():
        match, prefix, table = next(
            (found, found.expand(prefix), table)
            for pattern, prefix, table in _RULES
            if (found := re.match(pattern, name))
        )
        key = name[match.end() :]
        if key in table:
            ours, axis = table[key]
            yield prefix + ours, pieces[0] if axis is None else torch.cat(pieces, axis)
        elif key == "attention.wqkv.weight":
            heads = (text.num_attention_heads, *[text.num_key_value_heads] * 2)
            sizes = [count * text.head_dim // len(pieces) for count in heads]
            parts = zip(*(piece.split(sizes) for piece in pieces), strict=True)
            for letter, part in zip("qkv", parts, strict=True):
                yield f"{prefix}self_attn.{letter}_proj.weight", torch.cat(part)
        elif key == "feed_forward.mlp.fc1_weight":
            parts = zip(*(piece.chunk(2) for piece in pieces), strict=True)
            for word, part in zip(("gate", "up"), parts, strict=True):
                yield f"{prefix}feed_forward.{word}_proj.weight", torch.cat(part)
        elif key == "feed_forward.router_DE":
            yield f"{prefix}feed_forward.router.weight", pieces[0].T
        elif key.startswith("feed_forward.experts."):
            experts.setdefault(prefix, {})[key.rpartition(".")[2]] = pieces
        else:
            raise CheckpointError(f"The tensor {name} is none of Llama 4's.")
    for prefix, found in experts.items():
        names = next((names for names in _EXPERTS if set(names) == set(found)), None)
        if names is None:
            raise CheckpointError(f"The experts of {prefix} have the tensors {sorted(found)}.")
        shape = text.num_local_experts, text.hidden_size, -1
        gate, up = (torch.cat([p.reshape(shape) for p in found[n]], 2) for n in names[:2])
        yield f"{prefix}feed_forward.experts.gate_up_proj", torch.cat([gate, up], 2)
        shape = text.num_local_experts, -1, text.hidden_size
        down = torch.cat([piece.reshape(shape) for piece in found[names[2]]], 1)
        yield f"{prefix}feed_forward.experts.down_proj", down
