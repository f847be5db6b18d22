"""Loading Hugging Face checkpoint folders: `config.json` and safetensors files."""

import dataclasses
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, TypeVar

import equinox as eqx
import jax
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from llama4_eqx import config_file, hf_config
from llama4_eqx.argument_checks import float_dtype
from llama4_eqx.axes import leaf_name
from llama4_eqx.checkpoints.bitsandbytes import with_bitsandbytes
from llama4_eqx.checkpoints.compressed import with_compressed
from llama4_eqx.checkpoints.errors import CheckpointError
from llama4_eqx.checkpoints.fit import check, equal
from llama4_eqx.checkpoints.folder_kinds import require_checkpoint
from llama4_eqx.checkpoints.folder_replacement import recover
from llama4_eqx.checkpoints.foreign import check_parts
from llama4_eqx.checkpoints.generation_config import with_generation_ids
from llama4_eqx.checkpoints.leaves import LeafPlan, as_stored, plain, rounded
from llama4_eqx.checkpoints.safetensors_reading import Header, read_headers, slices
from llama4_eqx.checkpoints.tensor_names import Tensor, tensors
from llama4_eqx.checkpoints.tensor_spellings import (
    TEXT_PREFIX,
    Single,
    Stored,
    find_tensors,
    is_vision,
)
from llama4_eqx.config import Llama4Config
from llama4_eqx.distributed.rules import RulesLike
from llama4_eqx.distributed.sharding import shardings, with_mesh
from llama4_eqx.layers.quantized import is_quantized
from llama4_eqx.model import Llama4
from llama4_eqx.quantization import Quantization
from llama4_eqx.regraft import with_config

T = TypeVar("T")
_ATTEMPTS = 5
AS_STORED = "as stored"


def load_checkpoint(
    folder: str | os.PathLike[str],
    *,
    part: Literal["whole", "text", "vision"] | str = "whole",
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    rules: RulesLike | None = None,
    make: Callable[[Llama4], Llama4] | None = None,
    config: Llama4Config | None = None,
    quantize: Quantization | Literal["as stored"] | str | None = None,
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
    integers in groups) and of `bitsandbytes` (nf4, fp4, int8) are dequantised to the dtype that
    they were made from, exactly as those libraries do it. Activations aren't quantised here,
    whatever the checkpoint says of them.

    With `quantize=Quantization()`, weights become `Quantized` ones as they are read. With
    `quantize="as stored"`, those of the decoder that `compressed-tensors` has stored, with scales
    and without zero points, keep their very numbers; integers of other than four or eight bits
    become int8, and all other weights are as without it.

    `make` is needed where `save_checkpoint` has stored parts of a user's own classes: it puts such
    parts into a model of the folder's config. With a `config`, the parameters that were loaded get
    another one, as `llama4_eqx.with_config` does it.

    With a mesh and rules, the model is sharded as `shard` does it, and each process reads only what
    its devices hold. With several processes, each must make the same call.

    Raises `CheckpointError` with every missing, surplus, misshapen or damaged tensor before
    anything is loaded, `FileNotFoundError` where files are missing, and `ValueError` for a mesh
    without rules or rules that don't fit it.
    """
    if isinstance(quantize, str) and quantize != AS_STORED:
        raise ValueError(f"quantize must be a Quantization or {AS_STORED!r}, not {quantize!r}.")
    if quantize is not None and config is not None:
        raise ValueError(
            "quantize= doesn't go with another config: load, then use llama4_eqx.with_config and "
            "llama4_eqx.quantize."
        )
    if (mesh is None) != (rules is None):
        raise ValueError("A mesh and rules go together: pass both, or neither to load unsharded.")
    if part not in ("whole", "text", "vision"):
        raise ValueError(f"part must be 'whole', 'text' or 'vision', not {part!r}.")
    if dtype is not None:
        dtype = float_dtype(dtype)
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
    quantize: Quantization | str | None,
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

    stored = _quantized_weights(read_headers(folder), folder)
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
        elif not equal(found[embedding], found[head]):
            text_config = dataclasses.replace(config.text_config, tie_word_embeddings=False)
            config = dataclasses.replace(config, text_config=text_config)
            shapes = _shapes(config, make)
            wanted = [t for t in tensors(shapes, text_prefix=prefix) if selected(t.name)]
    dtypes = check(wanted, found, problems, folder, dtype)

    shaped, structure = jax.tree.flatten(shapes)
    plans = _plans(shapes, wanted, found, dtypes, quantize)
    likes = [old if p is None else p.shapes for p, old in zip(plans, shaped, strict=True)]
    placed: list[Any] = [None] * len(likes)
    if mesh is not None and rules is not None:
        tree = shardings(jax.tree.unflatten(structure, likes), mesh, rules)
        placed = jax.tree.leaves(tree, is_leaf=is_quantized)
    leaves: list[Any] = [None] * len(likes)
    reading = _with_bar(_open(wanted, found), len(wanted), f"Loading {folder.name}", progress)
    for tensor, get_slice in reading:
        i, plan = tensor.leaf, plans[tensor.leaf]
        if plan is not None:
            leaves[i] = plan.put(leaves[i], tensor, found[tensor.name], get_slice, placed[i])
    leaves = [like if leaf is None else leaf for leaf, like in zip(leaves, likes, strict=True)]
    model = jax.tree.unflatten(structure, leaves)
    return model if mesh is None or rules is None else with_mesh(model, mesh, rules)


def _quantized_weights(headers: dict[str, Header], folder: Path) -> Mapping[str, Single]:
    """The tensors of a folder, with one thing in place of each quantised weight's parts."""
    settings = hf_config.quantization(config_file.read_config(folder))
    if settings is None:
        return headers
    if settings["quant_method"] == "bitsandbytes":
        return with_bitsandbytes(headers, folder)
    return with_compressed(headers, settings, folder)


def _shapes(config: Llama4Config, make: Callable[[Llama4], Llama4] | None) -> Llama4:
    def init(key: PRNGKeyArray) -> Llama4:
        model = Llama4(config, key=key)
        return model if make is None else make(model)

    return eqx.filter_eval_shape(init, jax.random.key(0))


def _plans(
    shapes: Llama4,
    wanted: list[Tensor],
    found: dict[str, Stored],
    dtypes: dict[int, Any],
    quantize: Quantization | str | None,
) -> list[LeafPlan | None]:
    """What each leaf is made of; None for those that aren't read."""
    named = jax.tree_util.tree_leaves_with_path(shapes)
    scheme = Quantization() if quantize == AS_STORED else quantize
    inputs = {} if not isinstance(scheme, Quantization) else scheme.inputs(shapes)
    tensors_of = defaultdict(list)
    for tensor in wanted:
        tensors_of[tensor.leaf].append((tensor, found[tensor.name]))

    def plan(i: int, name: str, shape: tuple[int, ...]) -> LeafPlan | None:
        if i not in dtypes:
            return None
        if name in inputs and quantize == AS_STORED:
            return as_stored(shape, dtypes[i], tensors_of[i]) or plain(shape, dtypes[i])
        if name in inputs and isinstance(scheme, Quantization):
            return rounded(shape, dtypes[i], inputs[name], scheme)
        return plain(shape, dtypes[i])

    return [plan(i, leaf_name(path), leaf.shape) for i, (path, leaf) in enumerate(named)]


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


def _open(
    wanted: list[Tensor], found: dict[str, Stored]
) -> Iterator[tuple[Tensor, Callable[[Header], Any]]]:
    def files(tensor: Tensor) -> tuple[Path, ...]:
        return found[tensor.name].files

    for _, contents in groupby(sorted(wanted, key=files), key=files):
        # A file is open only while it is read, so that the pages of those before can be let go.
        with ExitStack() as stack:
            get_slice = slices(stack)
            for tensor in contents:
                yield tensor, get_slice


def _with_bar(items: Iterator[T], total: int, title: str, progress: bool | None) -> Iterable[T]:
    if progress is None:
        progress = sys.stderr.isatty() and find_spec("tqdm") is not None
    if not progress:
        return items
    if find_spec("tqdm") is None:
        raise ImportError("A progress bar needs tqdm: pip install tqdm, or pass progress=False.")
    from tqdm import tqdm

    return tqdm(items, total=total, desc=title, unit="tensor")
