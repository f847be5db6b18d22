"""For `plan.py`: a picture of who holds what."""

import re
from pathlib import Path

import jax
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from jax.sharding import Mesh

import llama4_eqx as l4
from llama4_eqx.axes import axis_words, leaf_name

matplotlib.use("Agg")


def draw(model: l4.Llama4, mesh: Mesh, path: Path) -> None:
    """One panel for each way in which a matrix lies on the mesh."""
    words, panels = axis_words(model), {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(model):
        name = leaf_name(key_path)
        if len(words[name]) - words[name].count("layers") > 1:
            panels.setdefault((words[name], leaf.shape), (name.split(".")[-1], leaf))
    columns = 4
    lines = -(-len(panels) // columns)
    _, axes = plt.subplots(lines, columns, figsize=(16, 4.4 * lines), squeeze=False)
    for place in axes.flat:
        place.axis("off")
    for place, ((names, shape), (name, leaf)) in zip(axes.flat, panels.items(), strict=False):
        draw_parts(place, name, names, shape, leaf.sharding, mesh)
    path.parent.mkdir(parents=True, exist_ok=True)
    plt.tight_layout()
    plt.savefig(path, dpi=80)


def draw_parts(place, name, words, shape, sharding, mesh) -> None:
    """A matrix cut into its parts, each with the number of the first device that holds it."""
    named = list(zip(words, shape, strict=True))
    cut = [axis for axis, names in enumerate(sharding.spec) if names]
    down, across = (*cut, *(axis for axis in range(len(shape)) if axis not in cut))[:2]
    holders = {}
    for device, part in sharding.devices_indices_map(shape).items():
        corner = tuple(piece.start or 0 for piece in part)
        holders.setdefault((corner[down], corner[across]), []).append(device.id)
    rows, columns = (sorted({corner[i] for corner in holders}) for i in (0, 1))
    first = np.array([[min(holders[row, column]) for column in columns] for row in rows])
    place.imshow(first, aspect="auto", cmap="turbo", vmin=0, vmax=mesh.size - 1)
    if max(first.shape) <= 16:
        for (row, column), device in np.ndenumerate(first):
            place.text(column, row, device, ha="center", va="center", color="white", fontsize=8)
    sizes = " × ".join(word if word == "2" else f"{word} {size}" for word, size in named)
    cuts = ", ".join(f"{named[axis][0]} by {sharding.spec[axis]}" for axis in cut)
    copies = len(next(iter(holders.values())))
    title = f"{name}\n{sizes}\n{cuts or 'whole'}; each part on {copies} devices"
    place.set_title(re.sub("[(),']", "", title), fontsize=9)
