"""Saving a model as a Hugging Face checkpoint folder."""

import dataclasses
import json
import os
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama4_eqx.argument_checks import check_type
from llama4_eqx.axes import leaf_name
from llama4_eqx.checkpoints import generation_config
from llama4_eqx.checkpoints.compressed_saving import (
    MadeTensor,
    made_tensors,
    quantization_config,
)
from llama4_eqx.checkpoints.folder_replacement import Staging, target_folder
from llama4_eqx.checkpoints.foreign import FOREIGN_PARTS, parts_note
from llama4_eqx.checkpoints.safetensors_reading import INDEX, SINGLE
from llama4_eqx.checkpoints.safetensors_writing import (
    Entry,
    create_file,
    file_header,
    parts,
    write_part,
)
from llama4_eqx.checkpoints.tensor_names import Tensor, tensors
from llama4_eqx.checkpoints.tensor_spellings import TEXT_PREFIX
from llama4_eqx.distributed.processes import allgather_json, run_on_all_processes
from llama4_eqx.layers.quantized import is_quantized, weight_shapes
from llama4_eqx.layers.unstacked import is_unstacked
from llama4_eqx.model import Llama4
from llama4_eqx.regraft import difference

# Files of a checkpoint, which an overwrite replaces. Adapters and other weights stay.
_OWN_FILE = re.compile(rf"config\.json|{re.escape(INDEX)}|model(-\d+-of-\d+)?\.safetensors")


def save_checkpoint(
    model: Llama4,
    folder: str | os.PathLike[str],
    *,
    max_shard_bytes: int | Any = 5_000_000_000,
    overwrite: bool = False,
) -> None:
    """Writes a folder that `transformers` and `load_checkpoint` read.

    The files are written to a hidden folder, which takes the place of `folder` when it is complete:
    a full disk or a kill leaves what was there before. An existing checkpoint is replaced only with
    `overwrite`; other files in the folder, such as a tokenizer, stay. The next save to the folder
    removes the hidden folders of killed ones. A link to a folder stays a link.

    Quantised weights are written in the layout of `compressed-tensors`, with which `transformers`
    reads them.

    Layers may have parts of your own classes (`llama4_eqx.research.replaced`): their parameters are
    stored under their paths and noted in `config.json`, and `load_checkpoint(make=…)` reads them.

    The shards of a sharded model are written in parts, without gathering them. With several
    processes, each must make the same call with a folder that all of them share; if one fails, all
    raise.

    Raises `FileExistsError` for an existing checkpoint, an `OSError` if there is no room, and a
    `ValueError` for a model that its config doesn't describe, which nobody could load again.
    """
    check_type("model", model, Llama4, "save a LoRA with save_adapter, or save lora.merged()")
    number = isinstance(max_shard_bytes, int | float | np.integer)
    if not number or not max_shard_bytes >= 1:
        raise ValueError(f"max_shard_bytes must be a positive number, not {max_shard_bytes!r}.")
    if jax.process_count() > 1 and _quantizes(_leaves(model)):
        raise ValueError("Several processes can't save quantised weights: save them from one.")
    if any(map(is_unstacked, jax.tree.leaves(model, is_leaf=is_unstacked))):
        raise ValueError(
            "The model has unstacked experts, a form for decoding: save the model that it was made "
            "from."
        )
    _refuse_odd_leaves(model)
    folder = target_folder(folder)
    files = _planned(model, int(max_shard_bytes))
    found = difference(weight_shapes(model))
    if found is not None:
        raise ValueError(
            f"The model isn't what its config describes: {found}. Give it a config that fits with "
            "llama4_eqx.with_config."
        )
    first = jax.process_index() == 0
    staging: Staging | None = None

    def stage() -> None:
        nonlocal staging
        if first:
            staging = Staging(folder)
            _create(model, files, staging.path, folder)

    def commit() -> None:
        if staging is not None:
            staging.commit(
                check=lambda: _refuse(folder, overwrite), replaced=lambda: _own_files(folder)
            )

    try:
        run_on_all_processes(lambda: _refuse(folder, overwrite))
        run_on_all_processes(stage)
        path = allgather_json(None if staging is None else str(staging.path))[0]
        run_on_all_processes(lambda: _write(model, files, Path(path)))
        run_on_all_processes(commit)
    except OSError as error:
        lost_race = isinstance(error, FileExistsError) and error.errno is None
        if lost_race or (staging is not None and staging.committed):
            raise
        raise OSError(
            error.errno,
            f"Could not save the checkpoint to {folder}: {error.strerror or error}. What was there "
            "before is unchanged; make room or choose another place, and save again.",
        ) from error
    finally:
        if staging is not None:
            staging.discard()


@dataclasses.dataclass(frozen=True)
class _File:
    """A file to be written: its header, its size, and the start of each tensor in it."""

    name: str
    header: bytes
    size: int
    starts: list[tuple[Tensor | MadeTensor, int]]


def _planned(model: Llama4, max_shard_bytes: int) -> list[_File]:
    leaves, wanted = _leaves(model), _tensors(model)
    by_name: dict[str, list[Tensor | MadeTensor]] = defaultdict(list)
    for tensor in wanted:
        made = made_tensors(tensor, leaves[tensor.leaf]) if _quantizes(leaves) else []
        for one in made or [tensor]:
            by_name[one.name].append(one)
    shards, room = [[]], max_shard_bytes
    for name, halves in by_name.items():
        dtype, *other = dict.fromkeys(
            one.dtype if isinstance(one, MadeTensor) else leaves[one.leaf].dtype for one in halves
        )
        if other:
            raise ValueError(
                f"{name} joins leaves of {dtype} and {other[0]}: cast the model to one dtype."
            )
        entry = Entry(name, halves[0].shape, dtype)
        if shards[-1] and entry.size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append((halves, entry))
        room -= entry.size
    files = []
    for number, shard in enumerate(shards, start=1):
        # The widest dtype first, so that all tensors are aligned.
        shard.sort(key=lambda item: -item[1].dtype.itemsize)
        header, starts = file_header([entry for _, entry in shard])
        name = SINGLE
        if len(shards) > 1:
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        size = len(header) + sum(entry.size for _, entry in shard)
        starts = [
            (tensor, start)
            for (halves, _), start in zip(shard, starts, strict=True)
            for tensor in halves
        ]
        files.append(_File(name, header, size, starts))
    return files


def _leaves(model: Llama4) -> list[Any]:
    return jax.tree.leaves(model, is_leaf=is_quantized)


def _quantizes(leaves: list[Any]) -> bool:
    return any(map(is_quantized, leaves))


def _refuse_odd_leaves(model: Llama4) -> None:
    """Leaves of parts of one's own that `load_checkpoint` wouldn't read."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(model, is_leaf=is_quantized):
        is_array = isinstance(leaf, jax.Array | np.ndarray)
        if is_quantized(leaf) or (is_array and jnp.issubdtype(leaf.dtype, jnp.floating)):
            continue
        kind = getattr(leaf, "dtype", f"a {type(leaf).__name__}")
        raise ValueError(
            f"{leaf_name(path)} is {kind}, which a checkpoint doesn't hold: make it a jax.Array of "
            "float32, bfloat16 or float16, or a static field."
        )


def _tensors(model: Llama4) -> list[Tensor]:
    text_prefix = "" if model.config.vision_config is None else TEXT_PREFIX
    return tensors(weight_shapes(model), text_prefix=text_prefix)


def _refuse(folder: Path, overwrite: bool) -> None:
    if os.path.lexists(folder) and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: give a folder.")
    old = _own_files(folder)
    if old and not overwrite:
        raise FileExistsError(
            f"{folder} already holds a checkpoint ({', '.join(old[:3])} …): choose another folder, "
            "or pass overwrite=True to replace it."
        )


def _own_files(folder: Path) -> list[str]:
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(name for name in names if _OWN_FILE.fullmatch(name))


def _create(model: Llama4, files: list[_File], folder: Path, old: Path) -> None:
    """Creates the files, with room for the tensors. `old` is the folder to be replaced."""
    for file in files:
        create_file(folder / file.name, file.header, file.size)
    if len(files) > 1:
        weight_map = sorted((tensor.name, file.name) for file in files for tensor, _ in file.starts)
        total = sum(file.size - len(file.header) for file in files)
        index = {"metadata": {"total_size": total}, "weight_map": dict(weight_map)}
        _write_json(folder / INDEX, index)
    config = model.config.to_hf() | {"torch_dtype": model.embed_tokens.dtype.name}
    leaves = _leaves(model)
    if _quantizes(leaves):
        config["quantization_config"] = quantization_config(_tensors(model), leaves)
    parts = parts_note(model)
    if parts:
        config[FOREIGN_PARTS] = parts
    _write_json(folder / "config.json", config)
    generation = generation_config.updated(old, model.config.text_config)
    if generation is not None:
        _write_json(folder / generation_config.FILE, generation)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with path.open("w") as file:
        json.dump(content, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def _write(model: Llama4, files: list[_File], folder: Path) -> None:
    """Writes this process's parts of the tensors."""
    leaves = _leaves(model)
    for planned in files:
        with (folder / planned.name).open("r+b") as file:
            for tensor, start in planned.starts:
                if isinstance(tensor, MadeTensor):
                    file.seek(start)
                    file.write(tensor.make().view(np.uint8).data)
                    continue
                for index, part in parts(leaves[tensor.leaf], tensor.stack_index):
                    if tensor.offset:
                        begin, end = index[-1].start + tensor.offset, index[-1].stop + tensor.offset
                        index = (*index[:-1], slice(begin, end))
                    write_part(file, start, tensor.shape_in_file, index, part)
            file.flush()
            os.fsync(file.fileno())
