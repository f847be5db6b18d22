"""Reading an adapter as a `LoRA`; see `adapter_layout`."""

import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from llama4_eqx.argument_checks import check_type
from llama4_eqx.axes import MatrixAxes, matrix_axes
from llama4_eqx.checkpoints.adapter_layout import (
    CONFIG,
    INNER,
    PREFIX,
    WEIGHTS,
    Factors,
    leaf_names,
    tensors_by_name,
)
from llama4_eqx.checkpoints.errors import CheckpointError, listed
from llama4_eqx.checkpoints.file_kinds import damage
from llama4_eqx.checkpoints.tensor_names import Tensor
from llama4_eqx.checkpoints.tensor_spellings import known_name, unwrapped
from llama4_eqx.layers.quantized import weight_shapes
from llama4_eqx.model import Llama4
from llama4_eqx.training.lora import LoRA, Update

_KEY = re.compile(
    r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.default)?(\.weight)?"
)
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
    check_type("model", model, Llama4, "an adapter goes onto a model without one")
    folder = Path(folder)
    config = _read_config(folder)
    found = _read_weights(folder)
    default = config["lora_alpha"] / _divisor(config, config["r"])
    shapes = weight_shapes(model)
    slots, matrices = tensors_by_name(shapes), matrix_axes(shapes)
    names = leaf_names(shapes)
    updates: dict[int, dict[int | None, Factors]] = defaultdict(dict)
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
    if not joined:
        raise CheckpointError(f"The adapter in {folder} has no matrices.")
    lora = LoRA(model, *joined, rank=1, alpha=default, key=jax.random.key(0))
    return lora.with_updates(joined)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}: give the folder of a PEFT adapter.")
    try:
        config = json.loads(path.read_bytes())
        kind, rank, alpha = config.get("peft_type"), config.get("r"), config.get("lora_alpha")
        alphas = [alpha, *(config.get("alpha_pattern") or {}).values()]
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} isn't the config of an adapter.") from error
    if kind != "LORA":
        raise CheckpointError(f"{path} is of a {kind} adapter: only LoRA can be read.")
    if not (type(rank) is int and 1 <= rank < 2**31 and all(map(_is_alpha, alphas))):
        raise CheckpointError(
            f"{path} isn't the config of a LoRA: r must be a whole number from 1, and "
            "lora_alpha and the values of alpha_pattern numbers, but not 0."
        )
    odd = [name for name, neutral in _NEUTRAL.items() if config.get(name) not in neutral]
    if odd:
        raise CheckpointError(
            f"{path} asks for {odd[0]} = {json.dumps(config[odd[0]])[:80]}, which isn't plain "
            "LoRA: merge the adapter with peft (`merge_and_unload`) and load the result."
        )
    return config


def _is_alpha(value: Any) -> bool:
    """Whether float32 can hold its ratio to any rank, and that to another one's."""
    return type(value) in (int, float) and 1e-30 < abs(value) < 1e30


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
                if name.endswith(f"{INNER}.weight"):  # of an embedding, which peft adds unchanged
                    continue
                match = _KEY.fullmatch(unwrapped(name).removeprefix(PREFIX))
                if match is None:
                    raise CheckpointError(f"{path} has {name}, which isn't a factor of a LoRA.")
                array, side = file.get_tensor(name), match["side"]
                if match["embedding"]:
                    array, side = array.T, "B" if side == "A" else "A"
                found[match["module"]][side] = array
    except SafetensorError as error:
        raise CheckpointError(f"{path.parent}: {damage(path, error)}.") from error
    return found


def _tensor_of(module: str, found: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The name of the tensor that a module's factors update."""
    if not module.removesuffix(INNER).endswith("experts"):
        return f"{module}.weight"
    outer = module.removesuffix(INNER)
    if module == outer and outer + INNER not in found:
        targets = str(config.get("target_parameters"))
        return f"{outer}.{'gate_up_proj' if 'gate_up_proj' in targets else 'down_proj'}"
    return f"{outer}.{'down_proj' if module == outer else 'gate_up_proj'}"


def _factors(tensor: Tensor, axes: MatrixAxes, A: np.ndarray, B: np.ndarray) -> Factors | None:  # noqa: N803
    """The update of a leaf's layer, or None if the matrices don't fit."""
    *stack, rows, columns = tensor.shape
    if len(tensor.shape) == 2:
        fits = A.ndim == B.ndim == 2 and B.shape == (rows, len(A)) and A.shape[1] == columns
        return Factors(B, A) if fits else None
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
    return Factors(others, by_expert[..., tensor.offset : tensor.offset + width])


def _divisor(config: Mapping[str, Any], rank: int) -> float:
    return math.sqrt(rank) if config.get("use_rslora") else float(rank)


def _scale(config: Mapping[str, Any], tensor: str, rank: int) -> float:
    module, alpha = tensor.removesuffix(".weight"), config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return alpha / _divisor(config, rank)


def _joined(layers: Mapping[int | None, Factors], depth: int) -> Update:
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
