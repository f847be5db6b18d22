"""Loading Hugging Face checkpoint folders: `config.json` and safetensors files."""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Int, Num, PRNGKeyArray
from safetensors import safe_open

from llama4_eqx.axes import leaf_name
from llama4_eqx.checkpoints.compressed import with_compressed
from llama4_eqx.checkpoints.errors import CheckpointError, cannot_load
from llama4_eqx.checkpoints.folder_kinds import require_checkpoint
from llama4_eqx.checkpoints.folder_replacement import recover
from llama4_eqx.checkpoints.foreign import check_parts
from llama4_eqx.checkpoints.generation_config import with_generation_ids
from llama4_eqx.checkpoints.safetensors_io import DTYPES, Header, read_headers, reader
from llama4_eqx.checkpoints.tensor_names import Tensor, tensors
from llama4_eqx.checkpoints.tensor_spellings import (
    TEXT_PREFIX,
    Stored,
    find_tensors,
    is_vision,
    view,
)
from llama4_eqx.config import Llama4Config
from llama4_eqx.distributed.rules import RulesLike
from llama4_eqx.distributed.sharding import shardings, with_mesh
from llama4_eqx.layers.quantized import Quantized
from llama4_eqx.model import Llama4
from llama4_eqx.quantization import Quantization
from llama4_eqx.regraft import with_config

T = TypeVar("T")
_ATTEMPTS = 5


def load_checkpoint(
    folder: str | os.PathLike[str],
    *,
    part: Literal["whole", "text", "vision"] | str = "whole",
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    rules: RulesLike | None = None,
    make: Callable[[Llama4], Llama4] | None = None,
    config: Llama4Config | None = None,
    quantize: Quantization | None = None,
    progress: bool | None = None,
) -> Llama4:
    """Reads a checkpoint folder, text-only or multimodal.

    Of a multimodal one, `part="text"` gives a text-only model, and `part="vision"` one that can
    only `encode_images`: the leaves of its decoder are shapes, not arrays.

    Tensors are loaded one by one, so the peak of memory is the model and one tensor. `dtype` is
    that of the parameters, the files' own if None (on a CPU, float32 is faster). `progress` shows a
    bar (needs tqdm), if None only where stderr is a terminal.

    What is in the folder is read as `transformers` reads it: `model.safetensors` goes before an
    index, `generation_config.json` gives the stop ids, and a tied config whose file has another
    head gives an untied model.

    Quantised weights of `compressed-tensors` (FP8 per tensor, channel or block, int8, and packed
    integers in groups) are dequantised to the dtype of their scales, exactly as that library does
    it. Activations aren't quantised here, whatever the checkpoint says of them.

    With `quantize=Quantization()`, weights become `Quantized` ones as they are read.

    `make` is needed where `save_checkpoint` has stored parts of a user's own classes: it puts such
    parts into a model of the folder's config. With a `config`, the parameters that were loaded get
    another one, as `llama4_eqx.with_config` does it.

    With a mesh and rules, the model is sharded as `shard` does it, and each process reads only what
    its devices hold. With several processes, each must make the same call.

    Raises `CheckpointError` with every missing, surplus, misshapen or damaged tensor before
    anything is loaded, `FileNotFoundError` where files are missing, and `ValueError` for a mesh
    without rules or rules that don't fit it.
    """
    if quantize is not None and (mesh is not None or config is not None):
        raise ValueError(
            "quantize= goes with neither a mesh nor another config: load, quantise with "
            "llama4_eqx.quantize, and then shard."
        )
    if (mesh is None) != (rules is None):
        raise ValueError("A mesh and rules go together: pass both, or neither to load unsharded.")
    if part not in ("whole", "text", "vision"):
        raise ValueError(f"part must be 'whole', 'text' or 'vision', not {part!r}.")
    if dtype is not None:
        dtype = _float_dtype(dtype)
    folder = Path(folder)
    for _ in range(_ATTEMPTS):
        recover(Path(os.path.realpath(folder)))
        before = _identity(folder)
        try:
            model = _load(folder, part, dtype, mesh, rules, make, quantize, progress)
        except (OSError, ValueError):
            if _identity(folder) == before:
                raise
        else:
            if _identity(folder) == before:
                return model if config is None else with_config(model, config)
            del model
    raise CheckpointError(
        f"{folder} was replaced {_ATTEMPTS} times while it was read: load it when it is at rest."
    )


def _load(
    folder: Path,
    part: str,
    dtype: DTypeLike | None,
    mesh: Mesh | None,
    rules: RulesLike | None,
    make: Callable[[Llama4], Llama4] | None,
    quantize: Quantization | None,
    progress: bool | None,
) -> Llama4:
    require_checkpoint(folder)
    config = Llama4Config.from_hf(folder)
    text_config = with_generation_ids(folder, config.text_config)
    config = dataclasses.replace(config, text_config=text_config)
    multimodal = config.vision_config is not None
    if part == "vision" and not multimodal:
        raise CheckpointError(f"The checkpoint in {folder} is text-only: it has no vision part.")
    if part == "text":
        config = dataclasses.replace(config, vision_config=None)
    prefix = TEXT_PREFIX if multimodal else ""

    def selected(name: str) -> bool:
        if part == "vision":
            return is_vision(name)
        return config.vision_config is not None or not is_vision(name)

    stored = with_compressed(read_headers(folder), folder)
    headers = {name: header for name, header in stored.items() if selected(name)}
    shapes = _shapes(config, make)
    if part != "vision":
        check_parts(folder, shapes, made=make is not None)
    wanted = [t for t in tensors(shapes, text_prefix=prefix) if selected(t.name)]
    known = {tensor.name: tensor.shape for tensor in wanted}
    head, embedding = f"{prefix}lm_head.weight", f"{prefix}model.embed_tokens.weight"
    if embedding in known:
        known[head] = known[embedding]
    found, problems = find_tensors(headers, known)
    if config.text_config.tie_word_embeddings and head in found:
        if embedding not in found:
            found[embedding] = found[head]
        elif not _equal(found[embedding], found[head]):
            text_config = dataclasses.replace(config.text_config, tie_word_embeddings=False)
            config = dataclasses.replace(config, text_config=text_config)
            shapes = _shapes(config, make)
            wanted = [t for t in tensors(shapes, text_prefix=prefix) if selected(t.name)]
    dtypes = _check(wanted, found, problems, folder, dtype)

    shaped, structure = jax.tree.flatten(shapes)
    leaves: list[Any] = list(shaped)
    leaf_shardings: list[NamedSharding | None] = [None] * len(leaves)
    if mesh is not None and rules is not None:
        leaf_shardings = jax.tree.leaves(shardings(shapes, mesh, rules))
    inputs = _quantized_inputs(shapes, quantize)
    reading = _with_bar(_open(wanted, found), len(wanted), f"Loading {folder.name}", progress)
    for tensor, source in reading:
        i, layer, sharding = tensor.leaf, tensor.stack_index, leaf_shardings[tensor.leaf]
        value = _read(source, tensor, sharding, DTYPES[found[tensor.name].dtype])
        if i in inputs:
            new = inputs[i](jnp.asarray(value, dtypes[i]), layer)
            leaves[i] = _put_quantized(leaves[i], shaped[i].shape, layer, new)
        elif layer is None:
            leaves[i] = jnp.asarray(value, dtypes[i])
        else:
            if leaves[i] is shaped[i]:
                leaves[i] = jnp.zeros(shaped[i].shape, dtypes[i], device=sharding)
            put = jax.jit(_put, donate_argnums=0, out_shardings=sharding)
            leaves[i] = put(leaves[i], layer, value)
    model = jax.tree.unflatten(structure, leaves)
    return model if mesh is None or rules is None else with_mesh(model, mesh, rules)


def _shapes(config: Llama4Config, make: Callable[[Llama4], Llama4] | None) -> Llama4:
    def init(key: PRNGKeyArray) -> Llama4:
        model = Llama4(config, key=key)
        return model if make is None else make(model)

    return eqx.filter_eval_shape(init, jax.random.key(0))


def _quantized_inputs(
    shapes: Llama4, quantize: Quantization | None
) -> dict[int, Callable[[Array, int | None], Quantized]]:
    """For each leaf to be quantised, what does so with it or with one of its layers."""
    if quantize is None:
        return {}
    names = [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]

    def convert(axes: tuple[int, ...]) -> Callable[[Array, int | None], Quantized]:
        def of_layer(value: Array, layer: int | None) -> Quantized:
            inputs = axes if layer is None else tuple(axis - 1 for axis in axes)
            return jax.jit(partial(quantize.of, inputs=inputs))(value)

        return of_layer

    return {names.index(name): convert(axes) for name, axes in quantize.inputs(shapes).items()}


def _put_quantized(old: Any, shape: tuple[int, ...], layer: int | None, new: Quantized) -> Any:
    if layer is None:
        return new
    if not isinstance(old, Quantized):
        depth = shape[0]
        old = jax.tree.map(lambda x: jnp.zeros((depth, *x.shape), x.dtype), new)
    put = jax.jit(_put, donate_argnums=0)
    return jax.tree.map(lambda stack, one: put(stack, layer, one), old, new)


def _float_dtype(dtype: Any) -> Any:
    try:
        dtype = jnp.dtype(dtype)
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError("dtype must be a floating-point dtype such as bfloat16 or float32.")
    return dtype


def _identity(folder: Path) -> list[tuple[Any, ...]]:
    """What changes if the checkpoint in the folder is replaced."""
    try:
        names = [".", *(name for name in os.listdir(folder) if _is_content(name))]
        stats = [(name, (folder / name).stat()) for name in sorted(names)]
    except OSError:
        return []
    return [(name, s.st_dev, s.st_ino, s.st_size * (name != ".")) for name, s in stats]


def _is_content(name: str) -> bool:
    return name.endswith((".safetensors", ".json")) and not name.startswith(".")


def _check(
    wanted: list[Tensor],
    found: dict[str, Stored],
    problems: list[str],
    folder: Path,
    dtype: DTypeLike | None,
) -> dict[int, Any]:
    """The dtype of each leaf; raises one error with everything that doesn't fit."""
    problems = [*problems, *_missing({tensor.name for tensor in wanted}, found)]
    dtypes = {}
    for tensor in wanted:
        name = tensor.name
        if name not in found:
            continue
        stored = found[name]
        if stored.shape != tensor.shape:
            problems.append(f"{name} has shape {stored.shape}, but must have {tensor.shape}")
        if stored.dtype not in DTYPES:
            problems.append(f"{name} is {stored.dtype}, but must be one of {', '.join(DTYPES)}")
            continue
        kind = DTYPES[stored.dtype] if dtype is None else dtype
        if dtypes.setdefault(tensor.leaf, kind) != kind:
            problems.append(f"{name} differs in dtype from other layers: pass dtype=")
    if problems:
        raise cannot_load(folder, problems)
    return dtypes


def _missing(names: set[str], found: dict[str, Stored]) -> list[str]:
    for others, what, mend in (
        ({n for n in names if is_vision(n)}, "vision encoder and projector", "text"),
        ({n for n in names if not is_vision(n)}, "text decoder", "vision"),
    ):
        if others and not others & found.keys() and found:
            return [f'all tensors of the {what} are missing: pass part="{mend}" to do without']
    problems = []
    for name in names - found.keys():
        if name.endswith("lm_head.weight"):
            problems.append(
                f"{name} is missing, and config.json doesn't tie it to the embeddings: if they are "
                "the same, set tie_word_embeddings to true there"
            )
        else:
            problems.append(f"{name} is missing")
    return problems


def _equal(first: Stored, second: Stored) -> bool:
    """Whether two matrices hold the same numbers, read a few rows at a time."""
    if first.shape != second.shape or not {first.dtype, second.dtype} <= DTYPES.keys():
        return False
    with ExitStack() as stack:
        views = [_view(stored, stack, {}) for stored in (first, second)]
        rows, width = first.shape
        step = max(1, 2**24 // max(width, 1))
        pieces = (slice(start, min(start + step, rows)) for start in range(0, rows, step))
        return all(np.array_equal(views[0][piece, :], views[1][piece, :]) for piece in pieces)


def _open(wanted: list[Tensor], found: dict[str, Stored]) -> Iterator[tuple[Tensor, Any]]:
    def files(tensor: Tensor) -> tuple[Path, ...]:
        return found[tensor.name].files

    for _, contents in groupby(sorted(wanted, key=files), key=files):
        # A file is open only while it is read, so that the pages of those before can be let go.
        with ExitStack() as stack:
            sources: dict[Path, Any] = {}
            for tensor in contents:
                yield tensor, _view(found[tensor.name], stack, sources)


def _view(stored: Stored, stack: ExitStack, sources: dict[Path, Any]) -> Any:
    def get_slice(header: Header) -> Any:
        if header.file not in sources:
            sources[header.file] = stack.enter_context(safe_open(header.file, framework="numpy"))
        return sources[header.file].get_slice(header.name)

    return view(stored, get_slice)


def _read(view: Any, tensor: Tensor, sharding: NamedSharding | None, dtype: Any) -> Any:
    """The leaf, or its layer, sharded like the leaf; on the host without a sharding."""
    read, shape = reader(view, tensor.axes, tensor.offset), tensor.shape_in_leaf
    if sharding is None:
        return read((slice(None),) * len(shape))
    if tensor.stack_index is not None:
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return jax.make_array_from_callback(shape, sharding, read, dtype=dtype)


def _put(stack: Num[Array, "..."], layer: Int[Array, ""], value: Num[Array, "..."]) -> Array:
    # `stack.at[layer].set(…)` would copy a bfloat16 stack on CPUs.
    return lax.dynamic_update_index_in_dim(stack, value.astype(stack.dtype), layer, axis=0)


def _with_bar(items: Iterator[T], total: int, title: str, progress: bool | None) -> Iterable[T]:
    if progress is None:
        progress = sys.stderr.isatty() and find_spec("tqdm") is not None
    if not progress:
        return items
    if find_spec("tqdm") is None:
        raise ImportError("A progress bar needs tqdm: pip install tqdm, or pass progress=False.")
    from tqdm import tqdm

    return tqdm(items, total=total, desc=title, unit="tensor")
