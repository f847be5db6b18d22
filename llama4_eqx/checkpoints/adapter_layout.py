"""Adapters in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`.

PEFT keeps two matrices for a weight W of a linear layer, and adds `scale · lora_B · lora_A` to W.
For the experts' weights, which have three axes (PEFT's `target_parameters`), the ranks of all
experts lie along one axis: of A expert by expert, of B with the experts innermost. Where a module
has two such weights, the first is stored under `base_layer`. Source: peft 0.21.
"""

from collections import defaultdict
from typing import NamedTuple

import jax
import numpy as np

from llama4_eqx.axes import leaf_name
from llama4_eqx.checkpoints.tensor_names import Tensor, tensors
from llama4_eqx.checkpoints.tensor_spellings import TEXT_PREFIX
from llama4_eqx.model import Llama4

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
INNER = ".base_layer"


class Factors(NamedTuple):
    """One weight's update, `left · right`; with a leading axis of experts if it has one."""

    left: np.ndarray
    right: np.ndarray


def tensors_by_name(model: Llama4) -> dict[str, list[Tensor]]:
    """The leaves, or halves, of each tensor of the model's checkpoint."""
    prefix = "" if model.config.vision_config is None else TEXT_PREFIX
    named: dict[str, list[Tensor]] = defaultdict(list)
    for tensor in tensors(model, text_prefix=prefix):
        named[tensor.name].append(tensor)
    return named


def leaf_names(model: Llama4) -> list[str]:
    """The names of the model's leaves, in their order."""
    return [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(model)]
