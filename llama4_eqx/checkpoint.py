"""Hugging Face checkpoint folders, in and out: `config.json` and safetensors, one file or many."""

import dataclasses
import json
import os
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from llama4_eqx.config import Llama4Config
from llama4_eqx.model import Llama4
from llama4_eqx.tensor_names import Tensor, tensors

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_TEXT_PREFIX = "language_model."
T = TypeVar("T")
_DTYPES = {"F32": jnp.float32, "BF16": jnp.bfloat16, "F16": jnp.float16}


class CheckpointError(ValueError):
    """A checkpoint that doesn't fit its config, or is damaged; lists everything that is wrong."""


def load_checkpoint(
    folder: str | os.PathLike[str],
    *,
    part: Literal["whole", "text", "vision"] = "whole",
    dtype: DTypeLike | None = None,
    progress: bool | None = None,
) -> Llama4:
    """Reads a checkpoint folder, text-only or multimodal.

    Of a multimodal one, `part="text"` gives a text-only model, and `part="vision"` one that can
    only `encode_images`: the leaves of its decoder are shapes, not arrays.

    Every tensor goes straight to its place, so that the peak of memory is the model and one tensor.
    `dtype` is that of the parameters: the file's own where None (on a CPU, float32 is faster).
    `progress` shows a bar (needs tqdm); None shows it where stderr is a terminal.

    Raises `CheckpointError` with every missing, surplus, misshapen or damaged tensor before
    anything is loaded.
    """
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
    found = _read_headers(folder, selected)
    dtypes = _check(wanted, found, folder, dtype)

    by_file = defaultdict(list)
    for name, header in found.items():
        by_file[header.file].append(wanted[name])
    shaped, structure = jax.tree.flatten(shapes)
    leaves: list[Any] = list(shaped)
    reading = _with_bar(_read(by_file), len(wanted), f"Loading {folder.name}", progress)
    for tensor, value in reading:
        i, layer = tensor.leaf, tensor.stack_index
        if layer is None:
            leaves[i] = jnp.asarray(value.reshape(shaped[i].shape), dtypes[i])
        else:
            if leaves[i] is shaped[i]:
                leaves[i] = jnp.zeros(shaped[i].shape, dtypes[i])
            leaves[i] = _put(leaves[i], layer, value.reshape(shaped[i].shape[1:]))
    return jax.tree.unflatten(structure, leaves)


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
    """
    folder = Path(folder).absolute()
    if folder.is_file():
        raise FileExistsError(f"{folder} is a file: give a folder.")
    old = sorted(path.name for path in _checkpoint_files(folder))
    if old and not overwrite:
        raise FileExistsError(
            f"{folder} already holds a checkpoint ({', '.join(old[:3])} …): choose another folder, "
            "or pass overwrite=True to replace it."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial_folder = Path(tempfile.mkdtemp(prefix=f".{folder.name}-partial-", dir=folder.parent))
    try:
        _write(model, partial_folder, max_shard_bytes)
        _replace(folder, partial_folder)
    except OSError as error:
        raise OSError(
            error.errno,
            f"Could not save the checkpoint to {folder}: {error.strerror or error}. What was there "
            "before is unchanged; make room or choose another place, and save again.",
        ) from error
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class _Header:
    file: Path
    shape: tuple[int, ...]
    dtype: str


def _read_headers(folder: Path, selected: Callable[[str], bool]) -> dict[str, _Header]:
    """Names, shapes and dtypes of the selected tensors in the folder, from the files' headers."""
    index, problems = folder / _INDEX, []
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{index} is damaged ({error!r}): fetch it again.") from error
        files = sorted(set(weight_map.values()))
    else:
        weight_map, files = {}, [_SINGLE]
        if not (folder / _SINGLE).is_file():
            raise FileNotFoundError(f"{folder} has neither {_SINGLE} nor {_INDEX}.")
    found = {}
    for name in files:
        path = folder / name
        if path.parent != folder or not path.is_file():
            problems.append(f"file {name} is missing")
            continue
        try:
            with safe_open(path, framework="numpy") as source:
                for tensor in source.keys():  # noqa: SIM118 (not a dict)
                    if tensor in found:
                        problems.append(f"{tensor} is in both {found[tensor].file.name} and {name}")
                    view = source.get_slice(tensor)
                    found[tensor] = _Header(path, tuple(view.get_shape()), view.get_dtype())
        except SafetensorError as error:
            problems.append(f"file {name} is truncated or damaged ({error})")
    problems += [
        f"{tensor} is not in {name}, where the index says it is"
        for tensor, name in weight_map.items()
        if tensor not in found and not any(name in problem for problem in problems)
    ]
    if problems:
        raise CheckpointError(_list(folder, problems))
    return {name: header for name, header in found.items() if selected(name)}


def _check(
    wanted: dict[str, Tensor], found: dict[str, _Header], folder: Path, dtype: DTypeLike | None
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
        if header.dtype not in _DTYPES:
            problems.append(f"{name} is {header.dtype}, but must be one of {', '.join(_DTYPES)}")
            continue
        kind = _DTYPES[header.dtype] if dtype is None else dtype
        if dtypes.setdefault(tensor.leaf, kind) != kind:
            problems.append(f"{name} differs in dtype from other layers: pass dtype=")
    if problems:
        raise CheckpointError(_list(folder, problems))
    return dtypes


def _list(folder: Path, problems: list[str]) -> str:
    lines = "\n".join(f"- {problem}" for problem in sorted(problems))
    return f"The checkpoint in {folder} can't be loaded:\n{lines}"


@partial(jax.jit, donate_argnums=0)
def _put(stack: Array, layer: Int[Array, ""], value: Array) -> Array:
    return stack.at[layer].set(value.astype(stack.dtype))


def _write(model: Llama4, folder: Path, max_shard_bytes: int) -> None:
    leaves = jax.tree.leaves(model)
    text_prefix = "" if model.config.vision_config is None else _TEXT_PREFIX
    shards, room = [[]], max_shard_bytes
    sizes = {}
    for tensor in tensors(model, text_prefix=text_prefix):
        size = int(np.prod(tensor.shape)) * leaves[tensor.leaf].dtype.itemsize
        if shards[-1] and size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        sizes[tensor.name] = size
        room -= size
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = _SINGLE
        if len(shards) > 1:
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        content = {tensor.name: _value(leaves[tensor.leaf], tensor) for tensor in shard}
        save_file(content, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(content, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True))
    config = model.config.to_hf() | {"torch_dtype": model.embed_tokens.dtype.name}
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _value(leaf: Float[Array, "..."], tensor: Tensor) -> np.ndarray:
    whole = leaf if tensor.stack_index is None else leaf[tensor.stack_index]
    return np.ascontiguousarray(np.asarray(whole).reshape(tensor.shape))


def _checkpoint_files(folder: Path) -> list[Path]:
    patterns = ("config.json", "*.safetensors", _INDEX)
    return [path for pattern in patterns for path in folder.glob(pattern)]


def _replace(folder: Path, complete: Path) -> None:
    """Puts the complete folder in the other's place, with the other's files that it lacks."""
    complete.chmod(0o755)  # mkdtemp's folders are private
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


def _read(by_file: dict[Path, list[Tensor]]) -> Iterator[tuple[Tensor, np.ndarray]]:
    for file, contents in by_file.items():
        # One file is open at a time, so that the pages of those read before can be let go.
        with safe_open(file, framework="numpy") as source:
            for tensor in contents:
                yield tensor, source.get_tensor(tensor.name)


def _with_bar(items: Iterator[T], total: int, title: str, progress: bool | None) -> Iterable[T]:
    if progress is None:
        progress = sys.stderr.isatty() and find_spec("tqdm") is not None
    if not progress:
        return items
    if find_spec("tqdm") is None:
        raise ImportError("A progress bar needs tqdm: pip install tqdm, or pass progress=False.")
    from tqdm import tqdm

    return tqdm(items, total=total, desc=title, unit="tensor")
