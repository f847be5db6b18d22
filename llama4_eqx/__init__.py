"""Llama 4 in JAX, as pure-pytree Equinox modules."""

from llama4_eqx.checkpoint import CheckpointError as CheckpointError
from llama4_eqx.checkpoint import load_checkpoint as load_checkpoint
from llama4_eqx.checkpoint import save_checkpoint as save_checkpoint
from llama4_eqx.config import Llama4Config as Llama4Config
from llama4_eqx.config import RopeScaling as RopeScaling
from llama4_eqx.config import TextConfig as TextConfig
from llama4_eqx.config import VisionConfig as VisionConfig
from llama4_eqx.config import determine_is_moe_layer as determine_is_moe_layer
from llama4_eqx.config import determine_is_nope_layer as determine_is_nope_layer
from llama4_eqx.decoder import Decoder as Decoder
from llama4_eqx.decoder import DecoderBlock as DecoderBlock
from llama4_eqx.decoder import DecoderLayer as DecoderLayer
from llama4_eqx.generate import decode_step as decode_step
from llama4_eqx.generate import generate as generate
from llama4_eqx.generate import prefill as prefill
from llama4_eqx.generate import stream as stream
from llama4_eqx.layers.cache import KVCache as KVCache
from llama4_eqx.model import Llama4 as Llama4
from llama4_eqx.model import Output as Output
from llama4_eqx.sampling import Greedy as Greedy
from llama4_eqx.sampling import Sample as Sample
from llama4_eqx.sampling import Sampler as Sampler
