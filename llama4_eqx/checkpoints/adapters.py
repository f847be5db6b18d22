"""Adapters in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`.

PEFT keeps two matrices for a weight W of a linear layer, and adds `scale · lora_B · lora_A` to W.
For the experts' weights, which have three axes (PEFT's `target_parameters`), the ranks of all
experts lie along one axis: of A expert by expert, of B with the experts innermost. Where a module
has two such weights, the first is stored under `base_layer`. Source: peft 0.21.
"""

import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from llama4_eqx.axes import MatrixAxes, leaf_name, matrix_axes
from llama4_eqx.checkpoints.errors import CheckpointError, listed
from llama4_eqx.checkpoints.folder_replacement import Staging
from llama4_eqx.checkpoints.tensor_names import Tensor, tensors
from llama4_eqx.checkpoints.tensor_spellings import TEXT_PREFIX, known_name
from llama4_eqx.layers.quantized import weight_shapes
from llama4_eqx.model import Llama4
from llama4_eqx.training.lora import LoRA, Update

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KEY = re.compile(
    r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.default)?(\.weight)?"
)
_INNER = ".base_layer"
# Settings that change the function, and the values at which they don't.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "layer_replication": (None,),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None,),
    "use_bdlora": (None, False),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
}


def load_adapter(model: Llama4, folder: str | os.PathLike[str]) -> LoRA:
    """A model with the adapter of a PEFT folder: `load_adapter(model, folder).merged()` to use it,
    or train it further as any `LoRA`.

    Reads LoRA of attention, dense, shared and experts' weights, embeddings and head, with rank and
    alpha patterns and rank-stabilised scaling. Layers of one leaf that have different ranks get the
    largest, filled up with zeros.

    Raises `CheckpointError` for other kinds of adapters and for what doesn't fit the model.
    """
    folder = Path(folder)
    config = _read_config(folder)
    found = _read_weights(folder)
    default = config["lora_alpha"] / _divisor(config, config["r"])
    shapes = weight_shapes(model)
    slots, matrices = _slots(shapes), matrix_axes(shapes)
    names = _leaf_names(shapes)
    updates: dict[int, dict[int | None, _Factors]] = defaultdict(dict)
    problems = []
    for module, weights in found.items():
        target = known_name(_tensor_of(module, found, config), slots)
        if target is None or weights.keys() != {"A", "B"}:
            what = "isn't in this model" if target is None else "lacks lora_A or lora_B"
            problems.append(f"{module} {what}")
            continue
        for tensor in slots[target]:
            axes = matrices[names[tensor.leaf]]
            factors = None if axes is None else _factors(tensor, axes, **weights)
            if factors is None:
                shapes = ", ".join(str(weights[side].shape) for side in "AB")
                problems.append(f"{module} has matrices of {shapes}, which don't fit {target}")
                break
            scale = _scale(config, target, factors.right.shape[-2])
            scaled = factors.left * np.asarray(scale / default, factors.left.dtype)
            updates[tensor.leaf][tensor.stack_index] = factors._replace(left=scaled)
    if problems:
        raise CheckpointError(f"The adapter in {folder} doesn't fit:\n{listed(sorted(problems))}")
    leaves = jax.tree.leaves(shapes)
    joined = {names[i]: _joined(layers, leaves[i].shape[0]) for i, layers in updates.items()}
    return LoRA(model, rank=1, alpha=default, key=jax.random.key(0)).with_updates(joined)


def save_adapter(lora: LoRA, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Writes the updates as a PEFT adapter of the checkpoint that the model came from or goes to.

    The gate and up projections of experts are one weight in a checkpoint; if their updates have
    different left factors, the adapter's has the sum of their ranks.

    Raises `FileExistsError` for an existing adapter without `overwrite`.
    """
    folder = Path(os.path.realpath(folder))

    def refuse() -> None:
        if (folder / CONFIG).exists() and not overwrite:
            raise FileExistsError(f"{folder} holds an adapter: pass overwrite=True to replace it.")

    refuse()
    weights, ranks, experts = {}, {}, []
    for name, factors in _by_tensor(lora).items():
        module, a, b = name.removesuffix(".weight"), factors.right, factors.left
        ranks[module] = factors.right.shape[-2]
        side = "lora_{}.weight"
        if a.ndim == 3:
            experts.append(module)
            module, _, parameter = module.rpartition(".")
            others = f"{module}.down_proj" in lora_names(lora)
            module += _INNER * (parameter == "gate_up_proj" and others)
            a, b = a.reshape(-1, a.shape[-1]), b.transpose(1, 2, 0).reshape(b.shape[1], -1)
        elif module.endswith("embed_tokens"):
            side, a, b = "lora_embedding_{}", b.T, a.T
        weights |= {f"{_PREFIX}{module}.{side.format(s)}": x for s, x in (("A", a), ("B", b))}
    if not weights:
        raise ValueError("The LoRA has no updates: choose patterns that match some weights.")
    rank = max(set(ranks.values()), key=list(ranks.values()).count)
    odd = {re.escape(module): r for module, r in ranks.items() if r != rank}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": lora.scale * rank,
        "lora_dropout": 0.0,
        "target_modules": sorted(ranks.keys() - set(experts)),
        "target_parameters": sorted(experts) or None,
        "rank_pattern": odd,
        "alpha_pattern": {module: lora.scale * r for module, r in odd.items()},
        "bias": "none",
    }
    staging = Staging(folder)
    try:
        contiguous = {name: np.ascontiguousarray(array) for name, array in weights.items()}
        save_file(contiguous, staging.path / WEIGHTS, metadata={"format": "pt"})
        (staging.path / CONFIG).write_text(json.dumps(config, indent=2))
        staging.commit(check=refuse, replaced=lambda: [CONFIG, WEIGHTS])
    finally:
        staging.discard()


class _Factors(NamedTuple):
    """One weight's update, `left · right`; with a leading axis of experts if it has one."""

    left: np.ndarray
    right: np.ndarray


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}: give the folder of a PEFT adapter.")
    try:
        config = json.loads(path.read_bytes())
        rank, alpha = config["r"], config["lora_alpha"]
        valid = rank >= 1 and math.isfinite(alpha) and alpha != 0
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} isn't the config of a LoRA: r and lora_alpha.") from error
    if config.get("peft_type") != "LORA" or not valid:
        kind = config.get("peft_type")
        raise CheckpointError(f"{path} is of a {kind} adapter: only LoRA can be read.")
    odd = [name for name, neutral in _NEUTRAL.items() if config.get(name) not in neutral]
    if odd:
        raise CheckpointError(
            f"{path} asks for {odd[0]} = {json.dumps(config[odd[0]])[:80]}, which isn't plain "
            "LoRA: merge the adapter with peft (`merge_and_unload`) and load the result."
        )
    return config


def _read_weights(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """The matrices A and B of each module, those of an embedding as of a linear layer."""
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").exists()
        more = ": adapter_model.bin is a pickle, so save it anew with peft" if pickled else ""
        raise FileNotFoundError(f"{folder} has no {WEIGHTS}{more}.")
    found: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                if name.endswith(f"{_INNER}.weight"):  # of an embedding, which peft adds unchanged
                    continue
                match = _KEY.fullmatch(name.removeprefix(_PREFIX))
                if match is None:
                    raise CheckpointError(f"{path} has {name}, which isn't a factor of a LoRA.")
                array, side = file.get_tensor(name), match["side"]
                if match["embedding"]:
                    array, side = array.T, "B" if side == "A" else "A"
                found[match["module"]][side] = array
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged ({error}): fetch it again.") from error
    return found


def _tensor_of(module: str, found: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The name of the tensor that a module's factors update."""
    if not module.removesuffix(_INNER).endswith("experts"):
        return f"{module}.weight"
    outer = module.removesuffix(_INNER)
    if module == outer and outer + _INNER not in found:
        targets = str(config.get("target_parameters"))
        return f"{outer}.{'gate_up_proj' if 'gate_up_proj' in targets else 'down_proj'}"
    return f"{outer}.{'down_proj' if module == outer else 'gate_up_proj'}"


def _slots(model: Llama4) -> dict[str, list[Tensor]]:
    """The leaves, or halves, of each tensor of the model's checkpoint."""
    prefix = "" if model.config.vision_config is None else TEXT_PREFIX
    slots: dict[str, list[Tensor]] = defaultdict(list)
    for tensor in tensors(model, text_prefix=prefix):
        slots[tensor.name].append(tensor)
    return slots


def _factors(tensor: Tensor, axes: MatrixAxes, A: np.ndarray, B: np.ndarray) -> _Factors | None:  # noqa: N803
    """The update of a leaf's layer, or None if the matrices don't fit."""
    *stack, rows, columns = tensor.shape
    if len(tensor.shape) == 2:
        fits = A.ndim == B.ndim == 2 and B.shape == (rows, len(A)) and A.shape[1] == columns
        return _Factors(B, A) if fits else None
    experts = stack[0] if len(stack) == 1 else 0
    if not experts or A.ndim != 2 or B.ndim != 2 or len(A) % experts or len(A) != B.shape[1]:
        return None
    by_expert = A.reshape(experts, -1, A.shape[1])
    others = B.reshape(len(B), -1, experts).transpose(2, 0, 1)
    if (len(B), A.shape[1]) == (columns, rows) and rows != columns:  # in to out, as older ones do
        by_expert, others = others.swapaxes(1, 2), by_expert.swapaxes(1, 2)
    elif (len(B), A.shape[1]) != (rows, columns):
        return None
    width = tensor.shape_in_leaf[-1]
    return _Factors(others, by_expert[..., tensor.offset : tensor.offset + width])


def _divisor(config: Mapping[str, Any], rank: int) -> float:
    return math.sqrt(rank) if config.get("use_rslora") else float(rank)


def _scale(config: Mapping[str, Any], tensor: str, rank: int) -> float:
    module, alpha = tensor.removesuffix(".weight"), config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return alpha / _divisor(config, rank)


def _joined(layers: Mapping[int | None, _Factors], depth: int) -> Update:
    """The factors of a leaf; layers that the adapter leaves out get zeros."""
    if None in layers:
        return Update(*map(jnp.asarray, layers[None]))
    rank = max(factors.right.shape[-2] for factors in layers.values())
    some = next(iter(layers.values()))
    left = np.zeros((depth, *some.left.shape[:-1], rank), some.left.dtype)
    right = np.zeros((depth, *some.right.shape[:-2], rank, some.right.shape[-1]), some.right.dtype)
    for i, factors in layers.items():
        own = factors.right.shape[-2]
        left[i, ..., :own], right[i, ..., :own, :] = factors
    return Update(jnp.asarray(left), jnp.asarray(right))


def _leaf_names(model: Llama4) -> list[str]:
    return [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(model)]


def lora_names(lora: LoRA) -> set[str]:
    """The names of the tensors that are updated, without `.weight`."""
    shapes = weight_shapes(lora.model)
    names = _leaf_names(shapes)
    return {
        name.removesuffix(".weight")
        for name, parts in _slots(shapes).items()
        if any(names[part.leaf] in lora.updates for part in parts)
    }


def _by_tensor(lora: LoRA) -> dict[str, _Factors]:
    """The factors of each tensor of the checkpoint that is updated."""
    shapes = weight_shapes(lora.model)
    names = _leaf_names(shapes)
    arrays = {name: jax.tree.map(np.asarray, update) for name, update in lora.updates.items()}
    found = {}
    for tensor, parts in _slots(shapes).items():
        halves = []
        for part in parts:
            update = arrays.get(names[part.leaf])
            if update is not None:
                index = () if part.stack_index is None else part.stack_index
                halves.append((part, _Factors(update.left[index], update.right[index])))
        if halves:
            found[tensor] = halves[0][1] if halves[0][0].half is None else _of_halves(halves)
    return found


def _of_halves(halves: list[tuple[Tensor, _Factors]]) -> _Factors:
    """One update of a tensor whose halves have an update each, or only one of them."""
    lefts = [factors.left for _, factors in halves]
    shared = len(halves) == 2 and np.array_equal(lefts[0], lefts[1])
    right = []
    for part, factors in halves:
        ends = [(0, 0)] * factors.right.ndim
        width = factors.right.shape[-1]
        ends[-1] = (0, 0) if shared else (part.offset, width - part.offset)
        right.append(np.pad(factors.right, ends))
    if shared:
        return _Factors(lefts[0], np.concatenate(right, axis=-1))
    return _Factors(np.concatenate(lefts, axis=-1), np.concatenate(right, axis=-2))
