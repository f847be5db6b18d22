"""The named sites at which a probe looks into a layer.

A module passes each value that it shows through `sites(name, value)`, and lists names and axes in
its class variable `sites`. Without a probe this returns the value and adds nothing to a program.
"""

from collections.abc import Iterable, Mapping

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from llama4_eqx.layers.collectives import UNSHARDED, AxisNames, MeshAxes, match_vma, pvary
from llama4_eqx.layers.probe import LayerNumber, Probe

Readings = dict[str, Array]


class Sites:
    """The sites of one layer during one trace: edits what passes and keeps what is to be read.

    `words` has the axis words of each site; `layer` is None outside of the layers. The values in
    `readings` belong to the trace that they were made in, which must return them.
    """

    def __init__(
        self,
        probe: Probe | None = None,
        words: Mapping[str, str] | None = None,
        *,
        layer: LayerNumber | None = None,
        mesh_axes: MeshAxes = UNSHARDED,
    ) -> None:
        self.probe = Probe() if probe is None else probe
        self.readings: Readings = {}
        self._words = words or {}
        self._layer = -1 if layer is None else layer
        self._mesh_axes = mesh_axes

    def __call__(self, site: str, value: Array) -> Array:
        """The value after the probe's edits."""
        if self.probe.edits(site):
            value = self._edited(site, value)
        if site in self.probe.read:
            self.readings[site] = value
        return value

    def _edited(self, site: str, value: Array) -> Array:
        """Each device gathers the whole value, edits it and takes its own shard back."""
        if site not in self._words:
            raise ValueError(
                f"A layer shows the site {site!r} without listing it, so its axes aren't known: "
                "add it to the class variable `sites` of your module. A wrapper takes over those "
                "of what it wraps, as in `sites = Attention.sites`."
            )
        words = self._words[site]
        axes = value_axes(words, value.ndim - len(words.split()) + 1, self._mesh_axes)
        whole = value
        for axis, names in enumerate(axes):
            for name in reversed(names):
                whole = lax.all_gather(whole, name, axis=axis, tiled=True, to="invarying")
        edited = self.probe.apply(site, whole, self._layer)
        for axis, names in enumerate(axes):
            if names:
                start = lax.axis_index(names) * value.shape[axis]
                edited = lax.dynamic_slice_in_dim(
                    pvary(edited, names), start, value.shape[axis], axis
                )
        return match_vma(edited, value)[0]


NO_SITES = Sites()


def value_axes(words: str, batch_ndim: int, mesh_axes: MeshAxes) -> list[AxisNames]:
    """The mesh axes that shard each axis of a site's value, which has `batch_ndim` batch axes."""
    batch = tuple(name for name in mesh_axes.tokens if name not in mesh_axes.seq)
    sharded = {
        "seq": mesh_axes.seq,
        "q_seq": mesh_axes.seq,
        "heads": mesh_axes.heads,
        "kv_heads": mesh_axes.heads,
    }
    axes: list[AxisNames] = []
    for word in words.split():
        axes += (
            [batch, *[()] * batch_ndim][:batch_ndim] if word[0] == "*" else [sharded.get(word, ())]
        )
    return axes


def in_layer_order(cycle: Iterable[Readings]) -> Readings:
    """Joins the readings of a cycle's layers, each with a leading axis of repeats, along one
    leading axis in the order of the layers."""
    found = _by_site(cycle)
    return {site: lax.collapse(jnp.stack(each, axis=1), 0, 2) for site, each in found.items()}


def concatenated(blocks: Iterable[Readings]) -> Readings:
    """Joins the readings of successive blocks along their leading axis of layers."""
    return {site: jnp.concatenate(each) for site, each in _by_site(blocks).items()}


def _by_site(parts: Iterable[Readings]) -> dict[str, list[Array]]:
    found: dict[str, list[Array]] = {}
    for part in parts:
        for site, value in part.items():
            found.setdefault(site, []).append(value)
    for site, values in found.items():
        shapes = sorted({value.shape[1:] for value in values})
        if len(shapes) > 1:
            raise ValueError(
                f"The layers' values at {site!r} have different shapes, such as {shapes[0]} and "
                f"{shapes[1]}, so they can't be read together: read it in an edit instead."
            )
    return found
