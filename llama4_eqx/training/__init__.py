"""Training: the step, its losses, what optimisers need to know, LoRA, and load balancing.

`llama4_eqx.training.data` makes batches of packed documents; it needs the extra `train`, so import
it by its own name.
"""

from llama4_eqx.axes import select as select
from llama4_eqx.training.expert_bias import get_expert_bias as get_expert_bias
from llama4_eqx.training.expert_bias import update_expert_bias as update_expert_bias
from llama4_eqx.training.expert_bias import with_expert_bias as with_expert_bias
from llama4_eqx.training.expert_bias import without_expert_bias as without_expert_bias
from llama4_eqx.training.lora import LoRA as LoRA
from llama4_eqx.training.losses import NextTokenLoss as NextTokenLoss
from llama4_eqx.training.losses import RouterReport as RouterReport
from llama4_eqx.training.losses import TokenLoss as TokenLoss
from llama4_eqx.training.losses import next_token_loss as next_token_loss
from llama4_eqx.training.losses import router_report as router_report
from llama4_eqx.training.losses import token_loss as token_loss
from llama4_eqx.training.optimizers import decay_mask as decay_mask
from llama4_eqx.training.optimizers import muon_dimensions as muon_dimensions
from llama4_eqx.training.step import LossFunction as LossFunction
from llama4_eqx.training.step import StepMetrics as StepMetrics
from llama4_eqx.training.step import TrainState as TrainState
from llama4_eqx.training.step import TrainStep as TrainStep
from llama4_eqx.training.step import init_train_state as init_train_state
from llama4_eqx.training.step import make_train_step as make_train_step
