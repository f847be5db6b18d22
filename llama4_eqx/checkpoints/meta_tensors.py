"""Meta's tensors under Hugging Face's names, joined from the files among which they are sharded.

The names and the axis along which each tensor is sharded are those of llama-models 0.3.0
(`checkpoint.py` and the modules' load hooks).
"""

import re
from collections.abc import Iterator
from typing import Any

from llama4_eqx.checkpoints.errors import CheckpointError
from llama4_eqx.config import Llama4Config

# Meta's tensor, Hugging Face's, and the axis that is sharded among Meta's files (- if none).
_WHOLE = """
    tok_embeddings.weight     language_model.model.embed_tokens.weight  0
    norm.weight               language_model.model.norm.weight          -
    output.weight             language_model.lm_head.weight             0
    vision_projection.weight  multi_modal_projector.linear_1.weight     0
"""
# After `layers.N.`, and after `language_model.model.layers.N.`; some have two names at Meta.
_TEXT_LAYER = """
    attention_norm.weight                  input_layernorm.weight            -
    attention.wqkv.layer_norm_weight       input_layernorm.weight            -
    ffn_norm.weight                        post_attention_layernorm.weight   -
    feed_forward.norm.weight               post_attention_layernorm.weight   -
    feed_forward.mlp.layer_norm_weight     post_attention_layernorm.weight   -
    attention.wq.weight                    self_attn.q_proj.weight           0
    attention.wk.weight                    self_attn.k_proj.weight           0
    attention.wv.weight                    self_attn.v_proj.weight           0
    attention.wo.weight                    self_attn.o_proj.weight           1
    feed_forward.w1.weight                 feed_forward.gate_proj.weight     0
    feed_forward.w3.weight                 feed_forward.up_proj.weight       0
    feed_forward.w2.weight                 feed_forward.down_proj.weight     1
    feed_forward.mlp.fc2_weight            feed_forward.down_proj.weight     1
    feed_forward.w_in_shared_FD.weight     feed_forward.shared_expert.gate_proj.weight  0
    feed_forward.w_swiglu_FD.weight        feed_forward.shared_expert.up_proj.weight    0
    feed_forward.w_out_shared_DF.weight    feed_forward.shared_expert.down_proj.weight  1
    feed_forward.shared_expert.w1.weight   feed_forward.shared_expert.gate_proj.weight  0
    feed_forward.shared_expert.w3.weight   feed_forward.shared_expert.up_proj.weight    0
    feed_forward.shared_expert.w2.weight   feed_forward.shared_expert.down_proj.weight  1
"""
# After `vision_embeddings.`, and after `vision_model.`
_VISION = """
    vision_adapter.mlp.c_fc.weight           vision_adapter.mlp.fc1.weight  0
    vision_adapter.mlp.c_proj.weight         vision_adapter.mlp.fc2.weight  1
    vision_encoder.class_embedding           class_embedding                -
    vision_encoder.positional_embedding_vlm  positional_embedding_vlm       -
    vision_encoder.conv1._linear.weight      patch_embedding.linear.weight  0
    vision_encoder.ln_pre.weight             layernorm_pre.weight           -
    vision_encoder.ln_pre.bias               layernorm_pre.bias             -
    vision_encoder.ln_post.weight            layernorm_post.weight          -
    vision_encoder.ln_post.bias              layernorm_post.bias            -
"""
# After `vision_embeddings.vision_encoder.transformer.resblocks.N.`, and after
# `vision_model.model.layers.N.`
_VISION_LAYER = """
    ln_1.weight         input_layernorm.weight           -
    ln_1.bias           input_layernorm.bias             -
    ln_2.weight         post_attention_layernorm.weight  -
    ln_2.bias           post_attention_layernorm.bias    -
    attn.wq.weight      self_attn.q_proj.weight          0
    attn.wk.weight      self_attn.k_proj.weight          0
    attn.wv.weight      self_attn.v_proj.weight          0
    attn.wo.weight      self_attn.o_proj.weight          1
    attn.wq.bias        self_attn.q_proj.bias            0
    attn.wk.bias        self_attn.k_proj.bias            0
    attn.wv.bias        self_attn.v_proj.bias            0
    attn.wo.bias        self_attn.o_proj.bias            -
    mlp.c_fc.weight     mlp.fc1.weight                   0
    mlp.c_fc.bias       mlp.fc1.bias                     0
    mlp.c_proj.weight   mlp.fc2.weight                   1
    mlp.c_proj.bias     mlp.fc2.bias                     -
"""
# The experts' three tensors under both of Meta's spellings: gates, ups, downs.
_EXPERTS = (("moe_w_in_eD_F", "moe_w_swiglu_eD_F", "moe_w_out_eF_D"), ("w1", "w3", "w2"))


def _table(text: str) -> dict[str, tuple[str, int | None]]:
    rows = [line.split() for line in text.strip().splitlines()]
    return {meta: (ours, None if axis == "-" else int(axis)) for meta, ours, axis in rows}


# Prefixes of Meta's and of Hugging Face's names, and the table for the rest; the first match wins.
_RULES = (
    (
        r"vision_embeddings\.vision_encoder\.transformer\.resblocks\.(\d+)\.",
        r"vision_model.model.layers.\1.",
        _table(_VISION_LAYER),
    ),
    (r"vision_embeddings\.", "vision_model.", _table(_VISION)),
    (r"layers\.(\d+)\.", r"language_model.model.layers.\1.", _table(_TEXT_LAYER)),
    ("", "", _table(_WHOLE)),
)


def converted(sharded: dict[str, list[Any]], config: Llama4Config) -> Iterator[tuple[str, Any]]:
    """Hugging Face's names and whole tensors, from the shards of some of Meta's."""
    import torch

    text = config.text_config
    experts: dict[str, dict[str, Any]] = {}
    for name, pieces in sharded.items():
        match, prefix, table = next(
            (found, found.expand(prefix), table)
            for pattern, prefix, table in _RULES
            if (found := re.match(pattern, name))
        )
        key = name[match.end() :]
        if key in table:
            ours, axis = table[key]
            yield prefix + ours, pieces[0] if axis is None else torch.cat(pieces, axis)
        elif key == "attention.wqkv.weight":
            heads = (text.num_attention_heads, *[text.num_key_value_heads] * 2)
            sizes = [count * text.head_dim // len(pieces) for count in heads]
            parts = zip(*(piece.split(sizes) for piece in pieces), strict=True)
            for letter, part in zip("qkv", parts, strict=True):
                yield f"{prefix}self_attn.{letter}_proj.weight", torch.cat(part)
        elif key == "feed_forward.mlp.fc1_weight":
            parts = zip(*(piece.chunk(2) for piece in pieces), strict=True)
            for word, part in zip(("gate", "up"), parts, strict=True):
                yield f"{prefix}feed_forward.{word}_proj.weight", torch.cat(part)
        elif key == "feed_forward.router_DE":
            yield f"{prefix}feed_forward.router.weight", pieces[0].T
        elif key.startswith("feed_forward.experts."):
            experts.setdefault(prefix, {})[key.rpartition(".")[2]] = pieces
        else:
            raise CheckpointError(f"The tensor {name} is none of Llama 4's.")
    for prefix, found in experts.items():
        names = next((names for names in _EXPERTS if set(names) == set(found)), None)
        if names is None:
            raise CheckpointError(f"The experts of {prefix} have the tensors {sorted(found)}.")
        shape = text.num_local_experts, text.hidden_size, -1
        gate, up = (torch.cat([p.reshape(shape) for p in found[n]], 2) for n in names[:2])
        yield f"{prefix}feed_forward.experts.gate_up_proj", torch.cat([gate, up], 2)
        shape = text.num_local_experts, -1, text.hidden_size
        down = torch.cat([piece.reshape(shape) for piece in found[names[2]]], 1)
        yield f"{prefix}feed_forward.experts.down_proj", down
