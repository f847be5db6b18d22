"""Which tensor of a Hugging Face checkpoint each leaf of the model is.

The tables below hold the whole mapping. A leaf equals its tensor but for its shape: parentheses
join axes that are one axis of the checkpoint, and `ff | …` is the first half of an axis, `… | ff`
the second. Leaves of stacked layers hold one tensor of each layer. Nothing is transposed. Leaves of
parts that users have written keep their own names and axes.
"""

import math
import re
from dataclasses import dataclass

import jax

from llama4_eqx.axes import leaf_name
from llama4_eqx.layers.foreign import foreign_parts
from llama4_eqx.model import Llama4


def _table(text: str) -> dict[str, tuple[str, str]]:
    """Lines of leaf, tensor and the tensor's axes, as `leaf -> (tensor, axes)`."""
    rows = [re.split(r"\s{2,}", line.strip()) for line in text.strip().splitlines()]
    return {leaf: (tensor, axes) for leaf, tensor, axes in rows}


TEXT = _table("""
    embed_tokens           model.embed_tokens.weight   vocab hidden
    decoder.norm.weight    model.norm.weight           hidden
    lm_head                lm_head.weight              vocab hidden
""")

TEXT_LAYER = _table("""
    input_layernorm.weight           input_layernorm.weight            hidden
    post_attention_layernorm.weight  post_attention_layernorm.weight   hidden
    self_attn.q_proj                 self_attn.q_proj.weight           (heads head_dim) hidden
    self_attn.k_proj                 self_attn.k_proj.weight           (kv_heads head_dim) hidden
    self_attn.v_proj                 self_attn.v_proj.weight           (kv_heads head_dim) hidden
    self_attn.o_proj                 self_attn.o_proj.weight           hidden (heads head_dim)
    self_attn.q_bias                 self_attn.q_proj.bias             (heads head_dim)
    self_attn.k_bias                 self_attn.k_proj.bias             (kv_heads head_dim)
    self_attn.v_bias                 self_attn.v_proj.bias             (kv_heads head_dim)
    self_attn.o_bias                 self_attn.o_proj.bias             hidden
    feed_forward.gate_proj           feed_forward.gate_proj.weight     ff hidden
    feed_forward.up_proj             feed_forward.up_proj.weight       ff hidden
    feed_forward.down_proj           feed_forward.down_proj.weight     hidden ff
    feed_forward.router              feed_forward.router.weight        experts hidden
    feed_forward.experts.gate_proj   feed_forward.experts.gate_up_proj  experts hidden ff | …
    feed_forward.experts.up_proj     feed_forward.experts.gate_up_proj  experts hidden … | ff
    feed_forward.experts.down_proj   feed_forward.experts.down_proj     experts ff hidden
    feed_forward.shared_expert.gate_proj  feed_forward.shared_expert.gate_proj.weight  ff hidden
    feed_forward.shared_expert.up_proj    feed_forward.shared_expert.up_proj.weight    ff hidden
    feed_forward.shared_expert.down_proj  feed_forward.shared_expert.down_proj.weight  hidden ff
""")

PROJECTOR = _table("""
    multi_modal_projector.linear_1  multi_modal_projector.linear_1.weight  hidden vision_out
""")

# Below `vision_model`, in the model and in the checkpoint.
VISION = _table("""
    class_embedding           class_embedding                vision_hidden
    positional_embedding_vlm  positional_embedding_vlm       patches vision_hidden
    patch_embedding.linear    patch_embedding.linear.weight  vision_hidden (channels patch patch)
    layernorm_pre.weight      layernorm_pre.weight           vision_hidden
    layernorm_pre.bias        layernorm_pre.bias             vision_hidden
    layernorm_post.weight     layernorm_post.weight          vision_hidden
    layernorm_post.bias       layernorm_post.bias            vision_hidden
    vision_adapter.mlp.fc1    vision_adapter.mlp.fc1.weight  vision_mid vision_ff
    vision_adapter.mlp.fc2    vision_adapter.mlp.fc2.weight  vision_out vision_mid
""")

VISION_LAYER = _table("""
    input_layernorm.weight           input_layernorm.weight           vision_hidden
    input_layernorm.bias             input_layernorm.bias             vision_hidden
    post_attention_layernorm.weight  post_attention_layernorm.weight  vision_hidden
    post_attention_layernorm.bias    post_attention_layernorm.bias    vision_hidden
    self_attn.q_proj                 self_attn.q_proj.weight          (heads head_dim) vision_hidden
    self_attn.k_proj                 self_attn.k_proj.weight          (heads head_dim) vision_hidden
    self_attn.v_proj                 self_attn.v_proj.weight          (heads head_dim) vision_hidden
    self_attn.o_proj                 self_attn.o_proj.weight          vision_hidden (heads head_dim)
    self_attn.q_bias                 self_attn.q_proj.bias            (heads head_dim)
    self_attn.k_bias                 self_attn.k_proj.bias            (heads head_dim)
    self_attn.v_bias                 self_attn.v_proj.bias            (heads head_dim)
    self_attn.o_bias                 self_attn.o_proj.bias            vision_hidden
    mlp.fc1                          mlp.fc1.weight                   vision_ff vision_hidden
    mlp.fc2                          mlp.fc2.weight                   vision_hidden vision_ff
    mlp.fc1_bias                     mlp.fc1.bias                     vision_ff
    mlp.fc2_bias                     mlp.fc2.bias                     vision_hidden
""")


@dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint, or a half of one, and its place in the model.

    `axes` has for each of the tensor's axes the sizes of the leaf's axes that it joins. `half` is
    None, or 0 or 1 for the first or second half of the tensor's last axis. `leaf` counts leaves as
    `jax.tree.leaves` does; `stack_index` is the layer in a stacked leaf.
    """

    name: str
    axes: tuple[tuple[int, ...], ...]
    half: int | None
    leaf: int
    stack_index: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole tensor's shape in the checkpoint."""
        return self._with_both_halves(tuple(math.prod(joined) for joined in self.axes))

    @property
    def shape_in_leaf(self) -> tuple[int, ...]:
        """The shape of the leaf, or of one of its layers."""
        return tuple(size for joined in self.axes for size in joined)

    @property
    def shape_in_file(self) -> tuple[int, ...]:
        """The whole tensor's shape, in the leaf's axes."""
        return self._with_both_halves(self.shape_in_leaf)

    @property
    def offset(self) -> int:
        """Where the leaf begins along the tensor's last axis."""
        return self.half * self.shape_in_leaf[-1] if self.half else 0

    def _with_both_halves(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape if self.half is None else (*shape[:-1], 2 * shape[-1])


def tensors(model: Llama4, *, text_prefix: str = "") -> list[Tensor]:
    """The tensors, or halves of them, of the model's checkpoint; `model` may hold arrays or shapes.

    `text_prefix` precedes the decoder's names: `language_model.` in a multimodal checkpoint.
    """
    leaves = jax.tree_util.tree_leaves_with_path(model)
    names = [leaf_name(path) for path, _ in leaves]
    return [
        tensor
        for i, (name, (_, leaf)) in enumerate(zip(names, leaves, strict=True))
        for tensor in _tensors_of_leaf(model, i, name, leaf.shape, text_prefix)
    ]


def _tensors_of_leaf(
    model: Llama4, leaf: int, name: str, shape: tuple[int, ...], text_prefix: str
) -> list[Tensor]:
    def whole(prefix: str, row: tuple[str, str | None]) -> list[Tensor]:
        return [Tensor(prefix + row[0], *_axes(shape, row[1]), leaf, None)]

    def stacked(prefix: str, numbers: range, row: tuple[str, str | None]) -> list[Tensor]:
        axes = _axes(shape[1:], row[1])
        return [Tensor(f"{prefix}{n}.{row[0]}", *axes, leaf, i) for i, n in enumerate(numbers)]

    in_encoder = name.removeprefix("vision_model.")
    in_encoder_layer = name.removeprefix("vision_model.model.blocks.")
    in_decoder = re.fullmatch(r"decoder\.blocks\.(\d+)\.layers\.(\d+)\.(.+)", name)
    if name in PROJECTOR:
        return whole("", PROJECTOR[name])
    if name in TEXT:
        return whole(text_prefix, TEXT[name])
    if name != in_encoder and in_encoder in VISION:
        return whole("vision_model.", VISION[in_encoder])
    if name != in_encoder_layer and in_encoder_layer in VISION_LAYER:
        row = VISION_LAYER[in_encoder_layer]
        return stacked("vision_model.model.layers.", range(shape[0]), row)
    row = None if in_decoder is None else _row_in_layer(model, in_decoder)
    if in_decoder is None or row is None:
        if name.endswith(".expert_bias"):
            raise ValueError(
                f"{name} has no place in a checkpoint of Llama 4: remove it with "
                "llama4_eqx.training.without_expert_bias(model) before saving."
            )
        raise ValueError(f"The leaf {name} has no tensor: add it to the tables of tensor_names.py.")
    number = int(in_decoder[2])
    layers = f"{text_prefix}model.layers."
    *before, block = model.decoder.blocks[: int(in_decoder[1]) + 1]
    first = sum(b.depth for b in before)
    if block.repeats is None:
        return whole(f"{layers}{first + number}.", row)
    return stacked(layers, range(first + number, first + block.depth, len(block.layers)), row)


def _row_in_layer(model: Llama4, in_decoder: re.Match[str]) -> tuple[str, str | None] | None:
    """The tensor of a layer's leaf and its axes, None for those of the leaf itself."""
    block, number, name = int(in_decoder[1]), int(in_decoder[2]), in_decoder[3]
    layer = model.decoder.blocks[block].layers[number]
    if any(f"{name}.".startswith(path) for path in foreign_parts(layer)):
        return name, None
    return TEXT_LAYER.get(name)


def _axes(
    sizes: tuple[int, ...], row: str | None
) -> tuple[tuple[tuple[int, ...], ...], int | None]:
    """The sizes joined as a row of a table joins them, and which half of the tensor they are:
    sizes 4, 8, 5 and `(a b) c | …` give ((4, 8), (5,)) and 0."""
    if row is None:
        return tuple((size,) for size in sizes), None
    half = 0 if row.endswith("| …") else 1 if "… |" in row else None
    rest = list(sizes)
    groups = [len(group.split()) for group in re.findall(r"\([^)]*\)|[^\s|…]+", row)]
    return tuple(tuple(rest.pop(0) for _ in range(group)) for group in groups), half
