"""Llama 4 in JAX, as pure-pytree Equinox modules.

Here is the model, with its parts, and what most scripts use. The folders hold the rest, each named
in its own `__init__`: `layers`, `checkpoints`, `generation`, `training`, `distributed`,
`processing`, and `linen` for Flax.
"""

from llama4_eqx.checkpoints import CheckpointError as CheckpointError
from llama4_eqx.checkpoints import load_checkpoint as load_checkpoint
from llama4_eqx.checkpoints import save_checkpoint as save_checkpoint
from llama4_eqx.config import Llama4Config as Llama4Config
from llama4_eqx.decoder import Decoder as Decoder
from llama4_eqx.decoder_block import DecoderBlock as DecoderBlock
from llama4_eqx.decoder_layer import DecoderLayer as DecoderLayer
from llama4_eqx.generation import Greedy as Greedy
from llama4_eqx.generation import Sample as Sample
from llama4_eqx.generation import Sampler as Sampler
from llama4_eqx.generation import decode_step as decode_step
from llama4_eqx.generation import generate as generate
from llama4_eqx.generation import prefill as prefill
from llama4_eqx.generation import stream as stream
from llama4_eqx.kv_cache import KVCache as KVCache
from llama4_eqx.layers import MLP as MLP
from llama4_eqx.layers import Attention as Attention
from llama4_eqx.layers import MoE as MoE
from llama4_eqx.layers import RMSNorm as RMSNorm
from llama4_eqx.layers import VisionAttention as VisionAttention
from llama4_eqx.layers import token_positions as token_positions
from llama4_eqx.model import Llama4 as Llama4
from llama4_eqx.model import Output as Output
from llama4_eqx.model import encode_images as encode_images
from llama4_eqx.projector import MultiModalProjector as MultiModalProjector
from llama4_eqx.projector import PixelShuffleMLP as PixelShuffleMLP
from llama4_eqx.projector import VisionMLP2 as VisionMLP2
from llama4_eqx.projector import pixel_shuffle as pixel_shuffle
from llama4_eqx.quantization import Quantization as Quantization
from llama4_eqx.quantization import quantize as quantize
from llama4_eqx.regraft import with_config as with_config
from llama4_eqx.shape_checks import enable_shape_checks as enable_shape_checks
from llama4_eqx.summary import parameter_table as parameter_table
from llama4_eqx.text_config import RopeScaling as RopeScaling
from llama4_eqx.text_config import TextConfig as TextConfig
from llama4_eqx.text_config import determine_is_moe_layer as determine_is_moe_layer
from llama4_eqx.text_config import determine_is_nope_layer as determine_is_nope_layer
from llama4_eqx.vision import UnfoldConvolution as UnfoldConvolution
from llama4_eqx.vision import VisionEncoder as VisionEncoder
from llama4_eqx.vision import VisionEncoderLayer as VisionEncoderLayer
from llama4_eqx.vision import VisionMLP as VisionMLP
from llama4_eqx.vision import VisionModel as VisionModel
from llama4_eqx.vision_config import VisionConfig as VisionConfig

__version__ = "0.2.0"
