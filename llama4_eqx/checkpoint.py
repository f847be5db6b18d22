"""Hugging Face checkpoint folders, in and out: `config.json` and safetensors, one file or many."""

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
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int
from safetensors import safe_open

from llama4_eqx.config import Llama4Config
from llama4_eqx.model import Llama4
from llama4_eqx.processes import gathered, together
from llama4_eqx.sharding import Rules, on_mesh, shardings
from llama4_eqx.tensor_files import (
    DTYPES,
    INDEX,
    SINGLE,
    CheckpointError,
    Entry,
    Header,
    cannot_load,
    create_file,
    file_header,
    parts,
    read_headers,
    reader,
    write_part,
)
from llama4_eqx.tensor_names import Tensor, tensors

_TEXT_PREFIX = "language_model."
T = TypeVar("T")


def load_checkpoint(
    folder: str | os.PathLike[str],
    *,
    part: Literal["whole", "text", "vision"] = "whole",
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    progress: bool | None = None,
) -> Llama4:
    """Reads a checkpoint folder, text-only or multimodal.

    Of a multimodal one, `part="text"` gives a text-only model, and `part="vision"` one that can
    only `encode_images`: the leaves of its decoder are shapes, not arrays.

    Every tensor goes straight to its place, so that the peak of memory is the model and one tensor.
    `dtype` is that of the parameters: the file's own where None (on a CPU, float32 is faster).
    `progress` shows a bar (needs tqdm); None shows it where stderr is a terminal.

    With a mesh and rules, the leaves lie where `shardings` says, the model works on the mesh, and
    each process reads only what its devices hold. With several processes, each must make the same
    call.

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

    wanted = {tensor.name: tensor for tensor in every if selected(tensor.name)}
    found = read_headers(folder, selected)
    dtypes = _check(wanted, found, folder, dtype)

    by_file = defaultdict(list)
    for name, header in found.items():
        by_file[header.file].append(wanted[name])
    shaped, structure = jax.tree.flatten(shapes)
    leaves: list[Any] = list(shaped)
    places: list[NamedSharding | None] = [None] * len(leaves)
    if mesh is not None and rules is not None:
        places = jax.tree.leaves(shardings(shapes, mesh, rules))
    reading = _with_bar(_open(by_file), len(wanted), f"Loading {folder.name}", progress)
    for tensor, view in reading:
        i, layer, place = tensor.leaf, tensor.stack_index, places[tensor.leaf]
        value = _read(view, tensor, place, DTYPES[found[tensor.name].dtype])
        if layer is None:
            leaves[i] = jnp.asarray(value, dtypes[i])
        else:
            if leaves[i] is shaped[i]:
                leaves[i] = jnp.zeros(shaped[i].shape, dtypes[i], device=place)
            put = jax.jit(_put, donate_argnums=0, out_shardings=place)
            leaves[i] = put(leaves[i], layer, value)
    model = jax.tree.unflatten(structure, leaves)
    return model if mesh is None or rules is None else on_mesh(model, mesh, rules)


def save_checkpoint(
    model: Llama4,
    folder: str | os.PathLike[str],
    *,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> None:
    """Writes a folder that `transformers` and `load_checkpoint` read.

    It is written under a temporary name beside the folder and renamed when complete: a full disk or
    a kill leaves what was there before. A checkpoint in the way is replaced only with `overwrite`;
    other files in the folder, such as a tokenizer, stay.

    Of a sharded model, each device's part goes to its place in the files. With several processes,
    each must make the same call, and the folder must be one that all of them share; where one
    fails, all raise.

    Raises `FileExistsError` for a checkpoint in the way, and an `OSError` where there is no room.
    """
    folder = Path(folder).absolute()
    files = _planned(model, max_shard_bytes)
    first = jax.process_index() == 0
    together(lambda: _refuse(folder, overwrite))
    partial = folder.with_name(f".{folder.name}-partial-{gathered(secrets.token_hex(4))[0]}")
    try:
        together(lambda: _create(model, files, partial) if first else None)
        together(lambda: _write(model, files, partial))
        together(lambda: _replace(folder, partial) if first else None)
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
    wanted: dict[str, Tensor], found: dict[str, Header], folder: Path, dtype: DTypeLike | None
) -> dict[int, Any]:
    """The dtype of each leaf; raises one error with all that doesn't fit."""
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [
        f"{name} is surplus: the config has no place for it" for name in found.keys() - wanted
    ]
    dtypes = {}
    for name in wanted.keys() & found.keys():
        tensor, header = wanted[name], found[name]
        if header.shape != tensor.shape:
            problems.append(f"{name} has shape {header.shape}, but must have {tensor.shape}")
        if header.dtype not in DTYPES:
            problems.append(f"{name} is {header.dtype}, but must be one of {', '.join(DTYPES)}")
            continue
        kind = DTYPES[header.dtype] if dtype is None else dtype
        if dtypes.setdefault(tensor.leaf, kind) != kind:
            problems.append(f"{name} differs in dtype from other layers: pass dtype=")
    if problems:
        raise cannot_load(folder, problems)
    return dtypes


def _open(by_file: dict[Path, list[Tensor]]) -> Iterator[tuple[Tensor, Any]]:
    for file, contents in by_file.items():
        # One file is open at a time, so that the pages of those read before can be let go.
        with safe_open(file, framework="numpy") as source:
            for tensor in contents:
                yield tensor, source.get_slice(tensor.name)


def _read(view: Any, tensor: Tensor, place: NamedSharding | None, dtype: Any) -> Any:
    """The leaf, or its layer, on the devices where the leaf lies; on the host where it is None."""
    read, shape = reader(view, tensor.axes), tensor.shape_in_leaf
    if place is None:
        return read((slice(None),) * len(shape))
    if tensor.stack_index is not None:
        place = NamedSharding(place.mesh, PartitionSpec(*place.spec[1:]))
    return jax.make_array_from_callback(shape, place, read, dtype=dtype)


def _put(stack: Float[Array, "..."], layer: Int[Array, ""], value: Float[Array, "..."]) -> Array:
    return stack.at[layer].set(value.astype(stack.dtype))


@dataclasses.dataclass(frozen=True)
class _File:
    """A file to be written: its first bytes, its size, and where in it each tensor starts."""

    name: str
    header: bytes
    size: int
    starts: list[tuple[Tensor, int]]


def _planned(model: Llama4, max_shard_bytes: int) -> list[_File]:
    leaves = jax.tree.leaves(model)
    text_prefix = "" if model.config.vision_config is None else _TEXT_PREFIX
    shards, room = [[]], max_shard_bytes
    for tensor in tensors(model, text_prefix=text_prefix):
        entry = Entry(tensor.name, tensor.shape, leaves[tensor.leaf].dtype)
        if shards[-1] and entry.size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append((tensor, entry))
        room -= entry.size
    files = []
    for number, shard in enumerate(shards, start=1):
        # The widest dtype first, so that all numbers are aligned.
        shard.sort(key=lambda both: -both[1].dtype.itemsize)
        header, starts = file_header([entry for _, entry in shard])
        name = SINGLE
        if len(shards) > 1:
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        size = len(header) + sum(entry.size for _, entry in shard)
        placed = [(tensor, start) for (tensor, _), start in zip(shard, starts, strict=True)]
        files.append(_File(name, header, size, placed))
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
    """The folder with all but the tensors, for which there is room."""
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
                    write_part(file, start, tensor.shape_in_leaf, index, part)
            file.flush()
            os.fsync(file.fileno())


def _checkpoint_files(folder: Path) -> list[Path]:
    patterns = ("config.json", "*.safetensors", INDEX)
    return [path for pattern in patterns for path in folder.glob(pattern)]


def _replace(folder: Path, complete: Path) -> None:
    """Puts the complete folder in the other's place, with the other's files that it lacks."""
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
