"""Converting Meta's checkpoints, `params.json` and `consolidated.NN.pth`, to Hugging Face folders.

Needs the extra `meta` (torch, and what reads tokenizers). The files are read by
`torch.load(weights_only=True)`, which builds only tensors, and are memory-mapped.
"""

import errno
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from llama4_eqx.checkpoints.errors import CheckpointError, listed
from llama4_eqx.checkpoints.folder_replacement import Staging, target_folder
from llama4_eqx.checkpoints.meta_companions import number_of_ranks, write_companions
from llama4_eqx.checkpoints.meta_tensors import converted
from llama4_eqx.config import Llama4Config
from llama4_eqx.text_config import RopeScaling, TextConfig
from llama4_eqx.vision_config import VisionConfig

_FILE = re.compile(r"consolidated\..*\.pth")
_DERIVED = re.compile(r"rope\.freqs|_extra_state$")


def convert_meta_checkpoint(
    source: str | os.PathLike[str], target: str | os.PathLike[str]
) -> Llama4Config:
    """Writes Meta's checkpoint folder `source` as the Hugging Face folder `target`, for
    `load_checkpoint` and `transformers`, and returns its config.

    Writes one file for each layer, so memory holds little more than one layer. `target` appears
    when it is complete. The tokenizer is copied, and written as `tokenizer.json`, too; a multimodal
    model's settings for images have the values of the releases where Meta's files are silent.

    Raises `CheckpointError` for missing files and for tensors that it doesn't know or that don't
    fit each other, `params.json` or the tokenizer, `FileExistsError` for a target that exists, and
    an `OSError` if there is no room. The size of a context isn't in Meta's files: set
    `max_position_embeddings` in the new `config.json` where it matters.
    """
    source, target = Path(source), target_folder(target)
    _require_absent(target)
    shards = _open(source)
    try:
        config = _config(source, shards[0])
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = f"it or the tensors lack {error}" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{source / 'params.json'} doesn't fit: {reason}.") from error
    _check_sizes(source, config, shards)
    staging: Staging | None = None
    try:
        staging = Staging(target)
        write_companions(source, staging.path, config)  # first, as it is quick and may fail
        _write(config, shards, staging.path)
        staging.commit(check=lambda: _require_absent(target))
    except OSError as error:
        if isinstance(error, FileExistsError) and error.errno is None:
            raise
        raise OSError(
            error.errno,
            f"Could not write {target}: {error.strerror or error}. Nothing was left there; make "
            "room or choose another place, and convert again.",
        ) from error
    finally:
        if staging is not None:
            staging.discard()
    return config


def _require_absent(target: Path) -> None:
    if os.path.lexists(target):
        raise FileExistsError(f"{target} exists: choose another folder.")


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            "Reading Meta's checkpoints needs the `torch` package: pip install 'llama4_eqx[meta]'"
        ) from error
    return torch


def _files(source: Path) -> list[Path]:
    return sorted(path for path in source.iterdir() if _FILE.fullmatch(path.name))


def _open(source: Path) -> list[dict[str, Any]]:
    if not source.is_dir():
        raise FileNotFoundError(f"There is no folder {source}.")
    files = _files(source)
    if not files or not (source / "params.json").is_file():
        raise FileNotFoundError(f"{source} doesn't hold params.json and consolidated.*.pth.")
    _check_numbers(source, files)
    torch, shards = _torch(), []
    for file in files:
        try:
            shard = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # torch raises whatever a broken file leads it to
            raise CheckpointError(
                f"{file} can't be read as plain tensors ({error}): it is cut short, damaged, or "
                "holds other Python objects, which are never loaded."
            ) from error
        tensors = isinstance(shard, dict) and all(
            isinstance(t, torch.Tensor) for t in shard.values()
        )
        if not tensors:
            raise CheckpointError(f"{file} doesn't hold tensors by name.")
        shards.append({name: t for name, t in shard.items() if not _DERIVED.search(name)})
    for file, shard in zip(files[1:], shards[1:], strict=True):
        different = sorted(set(shard) ^ set(shards[0]))
        if different:
            raise CheckpointError(
                f"{files[0]} and {file.name} hold different tensors:\n{listed(different)}"
            )
    return shards


def _check_numbers(source: Path, files: list[Path]) -> None:
    """Raises a `CheckpointError` unless the files are numbered from 0 on without a gap."""
    numbers = {file.name.split(".")[1] for file in files}
    expected = {f"{number:02}" for number in range(len(files))}
    if numbers != expected:
        last = max((int(number) for number in numbers if number.isdecimal()), default=0)
        missing = sorted({f"{number:02}" for number in range(last + 1)} - numbers)
        named = ", ".join(f"consolidated.{number}.pth" for number in missing[:5])
        raise CheckpointError(
            f"{source} lacks {named or 'consolidated.00.pth'}: fetch all files of the checkpoint."
        )


def _check_sizes(source: Path, config: Llama4Config, shards: Sequence[dict[str, Any]]) -> None:
    """Raises a `CheckpointError` where the files together don't have the sizes that `params.json`
    and the tokenizer ask for, as when some of the files are missing."""
    params, text = json.loads((source / "params.json").read_text()), config.text_config
    query = text.num_attention_heads * text.head_dim
    key = text.num_key_value_heads * text.head_dim
    rows = {
        "tok_embeddings.weight": params.get("vocab_size"),
        "output.weight": params.get("vocab_size"),
        "attention.wq.weight": query,
        "attention.wk.weight": key,
        "attention.wv.weight": key,
        "attention.wqkv.weight": query + 2 * key,
    }
    for name, tensor in shards[0].items():
        ending = ".".join(name.split(".")[2:]) if name.startswith("layers.") else name
        asked = rows.get(ending)
        if not isinstance(asked, int) or asked <= 0:  # old files have a vocab_size of -1
            continue
        held = tensor.shape[0] * len(shards)
        if held != asked:
            raise CheckpointError(
                f"{name} has {held} rows in the {len(shards)} consolidated.NN.pth of {source}, but "
                f"params.json asks for {asked}: files are missing, or belong to another model."
            )
    ranks = number_of_ranks(source / "tokenizer.model")
    if ranks is not None and text.vocab_size < ranks:
        raise CheckpointError(
            f"tok_embeddings.weight has {text.vocab_size} rows in the {len(shards)} "
            f"consolidated.NN.pth of {source}, but tokenizer.model has {ranks} tokens: files are "
            "missing, or belong to another model."
        )


def _config(source: Path, shard: dict[str, Any]) -> Llama4Config:
    """The config in `params.json`, with the widths that it lacks taken from the tensors."""
    params = json.loads((source / "params.json").read_text())
    files = len(_files(source))
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
            for name, tensor in converted(sharded, config)
        }
        _save(save_file, {name: t.contiguous() for name, t in content.items()}, folder / file)
        weight_map |= dict.fromkeys(content, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(config.to_hf(), indent=2))


def _save(save_file: Any, content: dict[str, Any], path: Path) -> None:
    try:
        save_file(content, path)
    except SafetensorError as error:  # of a full disk, too
        code = re.search(r"\b(?:code:|os error) (\d+)", str(error))
        number = int(code[1]) if code else errno.EIO
        raise OSError(number, os.strerror(number) if code else str(error)) from error
