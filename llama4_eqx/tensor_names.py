"""Which tensor of a Hugging Face checkpoint each leaf of the model is.

One table. A leaf equals its tensor but for its shape: parentheses join axes that the checkpoint
keeps as one. Leaves of stacked layers hold one tensor of each layer. Nothing is transposed.
"""

import math
import re
from dataclasses import dataclass

import jax

from llama4_eqx.model import Llama4

# leaf, tensor, axes of the tensor
_MODEL_TABLE = (
    ("embed_tokens", "model.embed_tokens.weight", "vocab hidden"),
    ("decoder.norm.weight", "model.norm.weight", "hidden"),
    ("lm_head", "lm_head.weight", "vocab hidden"),
)
_LAYER_TABLE = (
    ("input_layernorm.weight", "input_layernorm.weight", "hidden"),
    ("post_attention_layernorm.weight", "post_attention_layernorm.weight", "hidden"),
    ("self_attn.q_proj", "self_attn.q_proj.weight", "(heads head_dim) hidden"),
    ("self_attn.k_proj", "self_attn.k_proj.weight", "(kv_heads head_dim) hidden"),
    ("self_attn.v_proj", "self_attn.v_proj.weight", "(kv_heads head_dim) hidden"),
    ("self_attn.o_proj", "self_attn.o_proj.weight", "hidden (heads head_dim)"),
    ("self_attn.q_bias", "self_attn.q_proj.bias", "(heads head_dim)"),
    ("self_attn.k_bias", "self_attn.k_proj.bias", "(kv_heads head_dim)"),
    ("self_attn.v_bias", "self_attn.v_proj.bias", "(kv_heads head_dim)"),
    ("self_attn.o_bias", "self_attn.o_proj.bias", "hidden"),
    ("feed_forward.gate_proj", "feed_forward.gate_proj.weight", "ff hidden"),
    ("feed_forward.up_proj", "feed_forward.up_proj.weight", "ff hidden"),
    ("feed_forward.down_proj", "feed_forward.down_proj.weight", "hidden ff"),
    ("feed_forward.router", "feed_forward.router.weight", "experts hidden"),
    (
        "feed_forward.experts.gate_up_proj",
        "feed_forward.experts.gate_up_proj",
        "experts hidden (2 ff)",
    ),
    ("feed_forward.experts.down_proj", "feed_forward.experts.down_proj", "experts ff hidden"),
    (
        "feed_forward.shared_expert.gate_proj",
        "feed_forward.shared_expert.gate_proj.weight",
        "ff hidden",
    ),
    (
        "feed_forward.shared_expert.up_proj",
        "feed_forward.shared_expert.up_proj.weight",
        "ff hidden",
    ),
    (
        "feed_forward.shared_expert.down_proj",
        "feed_forward.shared_expert.down_proj.weight",
        "hidden ff",
    ),
)


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint: its name and shape there, and where in the model it lies:
    in which leaf (counted as `jax.tree.leaves` does), and in which layer of a stacked one."""

    name: str
    shape: tuple[int, ...]
    leaf: int
    stack_index: int | None


def tensors(model: Llama4, *, prefix: str = "") -> list[Tensor]:
    """Every tensor of the model's checkpoint; `model` may hold arrays or their shapes.

    `prefix` comes before each name, as `language_model.` does in a multimodal checkpoint.
    """
    found = []
    depth = model.decoder.depth_of_stack
    cycle = 0 if model.decoder.blocks is None else len(model.decoder.blocks.layers)
    model_table = {leaf: (name, axes) for leaf, name, axes in _MODEL_TABLE}
    layer_table = {leaf: (name, axes) for leaf, name, axes in _LAYER_TABLE}
    for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(model)):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        in_layer = re.fullmatch(r"decoder\.(blocks|tail)\.layers\.(\d+)\.(.+)", name)
        if in_layer is None:
            tensor, axes = model_table[name]
            found.append(Tensor(prefix + tensor, _joined(leaf.shape, axes), i, None))
            continue
        part, number, rest = in_layer[1], int(in_layer[2]), in_layer[3]
        tensor, axes = layer_table[rest]
        if part == "tail":
            full = f"{prefix}model.layers.{depth * cycle + number}.{tensor}"
            found.append(Tensor(full, _joined(leaf.shape, axes), i, None))
        else:
            shape = _joined(leaf.shape[1:], axes)
            for repeat in range(depth):
                full = f"{prefix}model.layers.{repeat * cycle + number}.{tensor}"
                found.append(Tensor(full, shape, i, repeat))
    return found


def _joined(sizes: tuple[int, ...], axes: str) -> tuple[int, ...]:
    """The sizes with those in parentheses multiplied: 4, 8, 5 by `(a b) c` gives 32, 5."""
    rest = list(sizes)
    groups = [len(group.split()) for group in re.findall(r"\([^)]*\)|\S+", axes)]
    return tuple(math.prod(rest.pop(0) for _ in range(group)) for group in groups)
