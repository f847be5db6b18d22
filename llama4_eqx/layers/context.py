"""What every layer of one forward call shares."""

import equinox as eqx

from llama4_eqx.layers.cache import CacheSpan
from llama4_eqx.layers.collectives import UNSHARDED, MeshAxes
from llama4_eqx.layers.mask import TokenPositions
from llama4_eqx.layers.rope import Rotation


class Context(eqx.Module):
    """What a forward call passes to each layer beside the residual stream.

    `span` is set when there is a cache; `mesh_axes` when the layers run inside `jax.shard_map`.
    """

    tokens: TokenPositions
    rotation: Rotation
    span: CacheSpan | None = None
    mesh_axes: MeshAxes = eqx.field(static=True, default=UNSHARDED)
