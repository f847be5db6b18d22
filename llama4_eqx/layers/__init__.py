"""The layers: modules with explicit sizes that know no config, and what they are built from."""

from llama4_eqx.layers.attention import Attention as Attention
from llama4_eqx.layers.attention import TemperatureTuning as TemperatureTuning
from llama4_eqx.layers.cache import CacheSpan as CacheSpan
from llama4_eqx.layers.cache import KVCache as KVCache
from llama4_eqx.layers.cache import LayerCache as LayerCache
from llama4_eqx.layers.context import Context as Context
from llama4_eqx.layers.context import Execution as Execution
from llama4_eqx.layers.grouped import grouped_mlp as grouped_mlp
from llama4_eqx.layers.interfaces import FeedForward as FeedForward
from llama4_eqx.layers.interfaces import SequenceMixer as SequenceMixer
from llama4_eqx.layers.mask import TokenPositions as TokenPositions
from llama4_eqx.layers.mask import attention_mask as attention_mask
from llama4_eqx.layers.mask import token_positions as token_positions
from llama4_eqx.layers.mlp import MLP as MLP
from llama4_eqx.layers.moe import Experts as Experts
from llama4_eqx.layers.moe import MoE as MoE
from llama4_eqx.layers.norm import LayerNorm as LayerNorm
from llama4_eqx.layers.norm import RMSNorm as RMSNorm
from llama4_eqx.layers.probe import Edit as Edit
from llama4_eqx.layers.probe import Probe as Probe
from llama4_eqx.layers.remat import RematPolicy as RematPolicy
from llama4_eqx.layers.rope import RotaryEmbedding as RotaryEmbedding
from llama4_eqx.layers.rope import Rotation as Rotation
from llama4_eqx.layers.sites import Readings as Readings
from llama4_eqx.layers.sites import Sites as Sites
from llama4_eqx.layers.vision_attention import VisionAttention as VisionAttention
