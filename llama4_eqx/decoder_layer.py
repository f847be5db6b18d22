"""One layer of the decoder: attention and a feed-forward network, each added to what it reads."""

from typing import ClassVar

import equinox as eqx
import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from llama4_eqx.layers.attention import Attention, TemperatureTuning
from llama4_eqx.layers.context import Context
from llama4_eqx.layers.interfaces import FeedForward, SequenceMixer, takes_row_shards
from llama4_eqx.layers.mlp import MLP
from llama4_eqx.layers.moe import MoE
from llama4_eqx.layers.norm import RMSNorm
from llama4_eqx.text_config import TextConfig


class DecoderLayer(eqx.Module):
    """`h = x + self_attn(norm(x))`, then `h + feed_forward(norm(h))`; RoPE or NoPE, and dense or a
    mixture of experts."""

    input_layernorm: RMSNorm
    self_attn: SequenceMixer
    post_attention_layernorm: RMSNorm
    feed_forward: FeedForward
    stream_sites: ClassVar[dict[str, str]] = {
        "resid_pre": "*batch seq hidden",
        "attn_out": "*batch seq hidden",
        "resid_mid": "*batch seq hidden",
        "ff_out": "*batch seq hidden",
        "resid_post": "*batch seq hidden",
    }

    def __init__(
        self, config: TextConfig, layer_id: int, *, dtype: DTypeLike, key: PRNGKeyArray
    ) -> None:
        attention_key, feed_forward_key = jax.random.split(key)
        hidden, init_std = config.hidden_size, config.initializer_range
        nope = config.layer_is_nope(layer_id)
        tuned = nope and config.attn_temperature_tuning
        self.input_layernorm = RMSNorm(hidden, eps=config.rms_norm_eps, dtype=dtype)
        self.post_attention_layernorm = RMSNorm(hidden, eps=config.rms_norm_eps, dtype=dtype)
        self.self_attn = Attention(
            hidden,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            use_rope=not nope,
            chunk_size=config.layer_chunk_size(layer_id),
            qk_norm_eps=config.rms_norm_eps if config.use_qk_norm else None,
            temperature=TemperatureTuning(config.attn_scale, config.floor_scale) if tuned else None,
            bias=config.attention_bias,
            dropout=config.attention_dropout,
            init_std=init_std,
            dtype=dtype,
            key=attention_key,
        )
        if config.layer_is_moe(layer_id):
            self.feed_forward = MoE(
                config.num_local_experts,
                hidden,
                config.intermediate_size,
                top_k=config.num_experts_per_tok,
                init_std=init_std,
                dtype=dtype,
                key=feed_forward_key,
            )
        else:
            self.feed_forward = MLP(
                hidden,
                config.intermediate_size_mlp,
                init_std=init_std,
                dtype=dtype,
                key=feed_forward_key,
            )

    @property
    def takes_row_shards(self) -> bool:
        """Whether both parts take rows sharded for sequence parallelism."""
        return takes_row_shards(self.self_attn) and takes_row_shards(self.feed_forward)

    @property
    def sites(self) -> dict[str, str]:
        """The sites that this layer shows to a probe, and their axes."""
        return self.stream_sites | self.self_attn.sites | self.feed_forward.sites

    def __call__(
        self,
        x: Float[Array, "*batch seq hidden"],
        context: Context,
        cache: PyTree | None = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> tuple[
        Float[Array, "*batch seq hidden"],
        PyTree | None,
        Float[Array, "*batch seq experts"] | None,
    ]:
        """The layer's output, its cache, and its router's logits (None for a dense layer)."""
        sites = context.execution.sites
        x = sites("resid_pre", x)
        attended, cache = self.self_attn(self.input_layernorm(x), context, cache, key=key)
        x = sites("resid_mid", x + sites("attn_out", attended))
        out, router_logits = self.feed_forward(
            self.post_attention_layernorm(x), execution=context.execution
        )
        return sites("resid_post", x + sites("ff_out", out)), cache, router_logits
