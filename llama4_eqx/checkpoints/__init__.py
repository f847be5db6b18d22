"""Checkpoints: Hugging Face folders, Meta's files, and the state of a training run.

`convert_meta_checkpoint` needs the extra `meta`, `TrainCheckpointer` the extra `train`.
"""

from llama4_eqx.checkpoints.adapter_reading import load_adapter as load_adapter
from llama4_eqx.checkpoints.adapter_saving import save_adapter as save_adapter
from llama4_eqx.checkpoints.errors import CheckpointError as CheckpointError
from llama4_eqx.checkpoints.generation_config import GenerationConfig as GenerationConfig
from llama4_eqx.checkpoints.generation_config import (
    load_generation_config as load_generation_config,
)
from llama4_eqx.checkpoints.hugging_face import load_checkpoint as load_checkpoint
from llama4_eqx.checkpoints.meta import convert_meta_checkpoint as convert_meta_checkpoint
from llama4_eqx.checkpoints.saving import save_checkpoint as save_checkpoint
from llama4_eqx.checkpoints.training_run import Checkpointable as Checkpointable
from llama4_eqx.checkpoints.training_run import TrainCheckpointer as TrainCheckpointer
from llama4_eqx.checkpoints.writable import require_writable as require_writable
