"""Loading and saving Hugging Face checkpoint folders: `config.json` and safetensors files."""

import dataclasses
import json
import os
import secrets
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int
from safetensors import safe_open

from llama4_eqx.checkpoints.errors import CheckpointError, cannot_load
from llama4_eqx.checkpoints.safetensors_io import (
    DTYPES,
    INDEX,
    SINGLE,
    Entry,
    Header,
    create_file,
    file_header,
    parts,
    read_headers,
    reader,
    write_part,
)
from llama4_eqx.checkpoints.tensor_names import Tensor, tensors
from llama4_eqx.config import Llama4Config
from llama4_eqx.distributed.processes import allgather_json, run_on_all_processes
from llama4_eqx.distributed.rules import RulesLike
from llama4_eqx.distributed.sharding import shardings, with_mesh
from llama4_eqx.model import Llama4

_TEXT_PREFIX = "language_model."
T = TypeVar("T")


def load_checkpoint(
    folder: str | os.PathLike[str],
    *,
    part: Literal["whole", "text", "vision"] = "whole",
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    rules: RulesLike | None = None,
    progress: bool | None = None,
) -> Llama4:
    """Reads a checkpoint folder, text-only or multimodal.

    Of a multimodal one, `part="text"` gives a text-only model, and `part="vision"` one that can
    only `encode_images`: the leaves of its decoder are shapes, not arrays.

    Tensors are loaded one by one, so the peak of memory is the model and one tensor. `dtype` is
    that of the parameters, the files' own if None (on a CPU, float32 is faster). `progress` shows a
    bar (needs tqdm), if None only where stderr is a terminal.

    With a mesh and rules, the model is sharded as `shard` does it, and each process reads only what
    its devices hold. With several processes, each must make the same call.

    Raises `CheckpointError` with every missing, surplus, misshapen or damaged tensor before
    anything is loaded, and `ValueError` for a mesh without rules or rules that don't fit it.
    """
    if (mesh is None) != (rules is None):
        raise ValueError("A mesh and rules go together: pass both, or neither to load unsharded.")
    folder = Path(folder)
    config = Llama4Config.from_hf(folder)
    multimodal = config.vision_config is not None
    if part == "vision" and not multimodal:
        raise CheckpointError(f"The checkpoint in {folder} is text-only: it has no vision part.")
    if part == "text":
        config = dataclasses.replace(config, vision_config=None)
    shapes = eqx.filter_eval_shape(Llama4, config, key=jax.random.key(0))
    every = tensors(shapes, text_prefix=_TEXT_PREFIX if multimodal else "")

    def selected(name: str) -> bool:
        return (
            part == "whole" or name.startswith(_TEXT_PREFIX) == (part == "text") or not multimodal
        )

    wanted = [tensor for tensor in every if selected(tensor.name)]
    found = read_headers(folder, selected)
    dtypes = _check(wanted, found, folder, dtype)

    by_file = defaultdict(list)
    for tensor in wanted:
        by_file[found[tensor.name].file].append(tensor)
    shaped, structure = jax.tree.flatten(shapes)
    leaves: list[Any] = list(shaped)
    leaf_shardings: list[NamedSharding | None] = [None] * len(leaves)
    if mesh is not None and rules is not None:
        leaf_shardings = jax.tree.leaves(shardings(shapes, mesh, rules))
    reading = _with_bar(_open(by_file), len(wanted), f"Loading {folder.name}", progress)
    for tensor, view in reading:
        i, layer, sharding = tensor.leaf, tensor.stack_index, leaf_shardings[tensor.leaf]
        value = _read(view, tensor, sharding, DTYPES[found[tensor.name].dtype])
        if layer is None:
            leaves[i] = jnp.asarray(value, dtypes[i])
        else:
            if leaves[i] is shaped[i]:
                leaves[i] = jnp.zeros(shaped[i].shape, dtypes[i], device=sharding)
            put = jax.jit(_put, donate_argnums=0, out_shardings=sharding)
            leaves[i] = put(leaves[i], layer, value)
    model = jax.tree.unflatten(structure, leaves)
    return model if mesh is None or rules is None else with_mesh(model, mesh, rules)


def save_checkpoint(
    model: Llama4,
    folder: str | os.PathLike[str],
    *,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> None:
    """Writes a folder that `transformers` and `load_checkpoint` read.

    It is written under a temporary name beside the folder and renamed when complete: a full disk or
    a kill leaves what was there before. An existing checkpoint is replaced only with `overwrite`;
    other files in the folder, such as a tokenizer, stay.

    The shards of a sharded model are written in parts, without gathering them. With several
    processes, each must make the same call with a folder that all of them share; if one fails, all
    raise.

    Raises `FileExistsError` for an existing checkpoint, and an `OSError` if there is no room.
    """
    folder = Path(folder).absolute()
    files = _planned(model, max_shard_bytes)
    first = jax.process_index() == 0
    run_on_all_processes(lambda: _refuse(folder, overwrite))
    partial = folder.with_name(f".{folder.name}-partial-{allgather_json(secrets.token_hex(4))[0]}")
    try:
        run_on_all_processes(lambda: _create(model, files, partial) if first else None)
        run_on_all_processes(lambda: _write(model, files, partial))
        run_on_all_processes(lambda: _replace(folder, partial) if first else None)
    except OSError as error:
        raise OSError(
            error.errno,
            f"Could not save the checkpoint to {folder}: {error.strerror or error}. What was there "
            "before is unchanged; make room or choose another place, and save again.",
        ) from error
    finally:
        if first:
            shutil.rmtree(partial, ignore_errors=True)


def _check(
    wanted: list[Tensor], found: dict[str, Header], folder: Path, dtype: DTypeLike | None
) -> dict[int, Any]:
    """The dtype of each leaf; raises one error with everything that doesn't fit."""
    names = {tensor.name for tensor in wanted}
    problems = [f"{name} is missing" for name in names - found.keys()]
    problems += [
        f"{name} is surplus: the config has no place for it" for name in found.keys() - names
    ]
    dtypes = {}
    for tensor in wanted:
        name = tensor.name
        if name not in found:
            continue
        header = found[name]
        if header.shape != tensor.shape:
            problems.append(f"{name} has shape {header.shape}, but must have {tensor.shape}")
        if header.dtype not in DTYPES:
            problems.append(f"{name} is {header.dtype}, but must be one of {', '.join(DTYPES)}")
            continue
        kind = DTYPES[header.dtype] if dtype is None else dtype
        if dtypes.setdefault(tensor.leaf, kind) != kind:
            problems.append(f"{name} differs in dtype from other layers: pass dtype=")
    if problems:
        raise cannot_load(folder, list(dict.fromkeys(problems)))
    return dtypes


def _open(by_file: dict[Path, list[Tensor]]) -> Iterator[tuple[Tensor, Any]]:
    for file, contents in by_file.items():
        # One file is open at a time, so that the pages of those read before can be let go.
        with safe_open(file, framework="numpy") as source:
            for tensor in contents:
                yield tensor, source.get_slice(tensor.name)


def _read(view: Any, tensor: Tensor, sharding: NamedSharding | None, dtype: Any) -> Any:
    """The leaf, or its layer, sharded like the leaf; on the host without a sharding."""
    read, shape = reader(view, tensor.axes, tensor.offset), tensor.shape_in_leaf
    if sharding is None:
        return read((slice(None),) * len(shape))
    if tensor.stack_index is not None:
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return jax.make_array_from_callback(shape, sharding, read, dtype=dtype)


def _put(stack: Float[Array, "..."], layer: Int[Array, ""], value: Float[Array, "..."]) -> Array:
    # `stack.at[layer].set(…)` would copy a bfloat16 stack on CPUs.
    return lax.dynamic_update_index_in_dim(stack, value.astype(stack.dtype), layer, axis=0)


@dataclasses.dataclass(frozen=True)
class _File:
    """A file to be written: its header, its size, and the start of each tensor in it."""

    name: str
    header: bytes
    size: int
    starts: list[tuple[Tensor, int]]


def _planned(model: Llama4, max_shard_bytes: int) -> list[_File]:
    leaves = jax.tree.leaves(model)
    text_prefix = "" if model.config.vision_config is None else _TEXT_PREFIX
    by_name = defaultdict(list)
    for tensor in tensors(model, text_prefix=text_prefix):
        by_name[tensor.name].append(tensor)
    shards, room = [[]], max_shard_bytes
    for name, halves in by_name.items():
        dtype, *other = dict.fromkeys(leaves[tensor.leaf].dtype for tensor in halves)
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


def _refuse(folder: Path, overwrite: bool) -> None:
    if folder.is_file():
        raise FileExistsError(f"{folder} is a file: give a folder.")
    old = sorted(path.name for path in _checkpoint_files(folder))
    if old and not overwrite:
        raise FileExistsError(
            f"{folder} already holds a checkpoint ({', '.join(old[:3])} …): choose another folder, "
            "or pass overwrite=True to replace it."
        )


def _create(model: Llama4, files: list[_File], folder: Path) -> None:
    """Creates the folder and its files, with room for the tensors."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700)
    for file in files:
        create_file(folder / file.name, file.header, file.size)
    if len(files) > 1:
        weight_map = sorted((tensor.name, file.name) for file in files for tensor, _ in file.starts)
        total = sum(file.size - len(file.header) for file in files)
        index = {"metadata": {"total_size": total}, "weight_map": dict(weight_map)}
        _write_json(folder / INDEX, index)
    config = model.config.to_hf() | {"torch_dtype": model.embed_tokens.dtype.name}
    _write_json(folder / "config.json", config)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with path.open("w") as file:
        json.dump(content, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def _write(model: Llama4, files: list[_File], folder: Path) -> None:
    """Writes this process's parts of the tensors."""
    leaves = jax.tree.leaves(model)
    for planned in files:
        with (folder / planned.name).open("r+b") as file:
            for tensor, start in planned.starts:
                for index, part in parts(leaves[tensor.leaf], tensor.stack_index):
                    last = slice(index[-1].start + tensor.offset, index[-1].stop + tensor.offset)
                    write_part(file, start, tensor.shape_in_file, (*index[:-1], last), part)
            file.flush()
            os.fsync(file.fileno())


def _checkpoint_files(folder: Path) -> list[Path]:
    patterns = ("config.json", "*.safetensors", INDEX)
    return [path for pattern in patterns for path in folder.glob(pattern)]


def _replace(folder: Path, complete: Path) -> None:
    """Renames the complete folder to its name, with the old folder's other files in it."""
    complete.chmod(0o755)  # it was private
    if not folder.exists():
        complete.rename(folder)
        return
    ours = {path.name for path in _checkpoint_files(folder)}
    shutil.copytree(
        folder,
        complete,
        ignore=lambda path, _: ours if Path(path) == folder else (),
        copy_function=os.link,  # no bytes are copied
        dirs_exist_ok=True,
    )
    retired = complete.with_name(complete.name.replace("-partial-", "-old-"))
    folder.rename(retired)
    complete.rename(folder)
    shutil.rmtree(retired)


def _with_bar(items: Iterator[T], total: int, title: str, progress: bool | None) -> Iterable[T]:
    if progress is None:
        progress = sys.stderr.isatty() and find_spec("tqdm") is not None
    if not progress:
        return items
    if find_spec("tqdm") is None:
        raise ImportError("A progress bar needs tqdm: pip install tqdm, or pass progress=False.")
    from tqdm import tqdm

    return tqdm(items, total=total, desc=title, unit="tensor")
