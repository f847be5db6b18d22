"""Writing the updates of a `LoRA` as an adapter; see `adapter_layout`."""

import json
import os
import re

import jax
import numpy as np
from safetensors.numpy import save_file

from llama4_eqx.argument_checks import check_type
from llama4_eqx.checkpoints.adapter_layout import (
    CONFIG,
    INNER,
    PREFIX,
    WEIGHTS,
    Factors,
    leaf_names,
    tensors_by_name,
)
from llama4_eqx.checkpoints.folder_replacement import Staging, target_folder
from llama4_eqx.checkpoints.tensor_names import Tensor
from llama4_eqx.layers.quantized import weight_shapes
from llama4_eqx.training.lora import LoRA


def save_adapter(lora: LoRA, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Writes the updates as a PEFT adapter of the checkpoint that the model came from or goes to.

    The gate and up projections of experts are one weight in a checkpoint; if their updates have
    different left factors, the adapter's has the sum of their ranks.

    Raises `FileExistsError` for an existing adapter without `overwrite`.
    """
    check_type("lora", lora, LoRA, "save a model with save_checkpoint")
    folder = target_folder(folder)

    def refuse() -> None:
        if (folder / CONFIG).exists() and not overwrite:
            raise FileExistsError(f"{folder} holds an adapter: pass overwrite=True to replace it.")

    refuse()
    weights, ranks, experts = {}, {}, []
    updated = _by_tensor(lora)
    for name, factors in updated.items():
        module, a, b = name.removesuffix(".weight"), factors.right, factors.left
        ranks[module] = factors.right.shape[-2]
        side = "lora_{}.weight"
        if a.ndim == 3:
            experts.append(module)
            module, _, parameter = module.rpartition(".")
            both = parameter == "gate_up_proj" and f"{module}.down_proj" in updated
            module += INNER * both
            a, b = a.reshape(-1, a.shape[-1]), b.transpose(1, 2, 0).reshape(b.shape[1], -1)
        elif module.endswith("embed_tokens"):
            side, a, b = "lora_embedding_{}", b.T, a.T
        weights |= {f"{PREFIX}{module}.{side.format(s)}": x for s, x in (("A", a), ("B", b))}
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


def _by_tensor(lora: LoRA) -> dict[str, Factors]:
    """The factors of each tensor of the checkpoint that is updated."""
    shapes = weight_shapes(lora.model)
    names = leaf_names(shapes)
    arrays = {name: jax.tree.map(np.asarray, update) for name, update in lora.updates.items()}
    found = {}
    for tensor, parts in tensors_by_name(shapes).items():
        halves = []
        for part in parts:
            update = arrays.get(names[part.leaf])
            if update is not None:
                index = () if part.stack_index is None else part.stack_index
                halves.append((part, Factors(update.left[index], update.right[index])))
        if halves:
            found[tensor] = halves[0][1] if halves[0][0].half is None else _of_halves(halves)
    return found


def _of_halves(halves: list[tuple[Tensor, Factors]]) -> Factors:
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
        return Factors(lefts[0], np.concatenate(right, axis=-1))
    return Factors(np.concatenate(lefts, axis=-1), np.concatenate(right, axis=-2))
