"""What every layer of one forward call shares."""

from dataclasses import dataclass, replace

import equinox as eqx

from llama4_eqx.layers.backends import BY_PLATFORM, Backends
from llama4_eqx.layers.cache import CacheSpan
from llama4_eqx.layers.collectives import UNSHARDED, MeshAxes
from llama4_eqx.layers.mask import TokenPositions
from llama4_eqx.layers.rope import Rotation
from llama4_eqx.layers.sites import NO_SITES, Sites


@dataclass(frozen=True)
class Execution:
    """How a layer runs: `mesh_axes` is set inside `jax.shard_map`; `backends` say how attention and
    experts are computed; `sites` show a probe what the layer computes."""

    mesh_axes: MeshAxes = UNSHARDED
    backends: Backends = BY_PLATFORM
    sites: Sites = NO_SITES


PLAIN = Execution()


class Context(eqx.Module):
    """What a forward call passes to each layer beside the residual stream. `span` is set when there
    is a cache."""

    tokens: TokenPositions
    rotation: Rotation
    span: CacheSpan | None = None
    execution: Execution = eqx.field(static=True, default=PLAIN)

    def with_sites(self, sites: Sites) -> "Context":
        """The context of one layer."""
        execution = replace(self.execution, sites=sites)
        return Context(self.tokens, self.rotation, self.span, execution)
