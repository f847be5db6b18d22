"""Tools for looking into a model and changing what it computes: edits for a `Probe`, the logit
lens, activation and attribution patching, direct logit attribution, routing, and putting other
modules in place of a layer's parts."""

from llama4_eqx.layers.probe import Edit as Edit
from llama4_eqx.layers.probe import Probe as Probe
from llama4_eqx.research.attribution import LogitAttribution as LogitAttribution
from llama4_eqx.research.attribution import direct_logit_attribution as direct_logit_attribution
from llama4_eqx.research.edits import Ablate as Ablate
from llama4_eqx.research.edits import Add as Add
from llama4_eqx.research.edits import At as At
from llama4_eqx.research.edits import Patch as Patch
from llama4_eqx.research.edits import Scale as Scale
from llama4_eqx.research.edits import ban_experts as ban_experts
from llama4_eqx.research.edits import force_experts as force_experts
from llama4_eqx.research.lens import TunedLens as TunedLens
from llama4_eqx.research.lens import logit_lens as logit_lens
from llama4_eqx.research.lens import tuned_lens_loss as tuned_lens_loss
from llama4_eqx.research.patching import attribution_patching as attribution_patching
from llama4_eqx.research.patching import patch_sweep as patch_sweep
from llama4_eqx.research.routing import routing_counts as routing_counts
from llama4_eqx.research.swapping import in_layers as in_layers
from llama4_eqx.research.swapping import layer as layer
from llama4_eqx.research.swapping import replaced as replaced
from llama4_eqx.research.swapping import separated as separated
