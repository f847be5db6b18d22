"""The note in `config.json` of which layers have parts that a user has written."""

import json
from pathlib import Path
from typing import Any

from llama4_eqx.checkpoints.errors import CheckpointError
from llama4_eqx.layers.foreign import foreign_parts
from llama4_eqx.model import Llama4

FOREIGN_PARTS = "llama4_eqx_parts"


def parts_note(model: Llama4) -> dict[str, dict[str, str]]:
    """The paths and class names of such parts, by the layer's number; `model` may hold shapes."""
    blocks = model.decoder.blocks
    layers = [block.layers[i % len(block.layers)] for block in blocks for i in range(block.depth)]
    parts = {str(number): foreign_parts(layer) for number, layer in enumerate(layers)}
    return {number: found for number, found in parts.items() if found}


def check_parts(folder: Path, shapes: Llama4, *, made: bool) -> None:
    """Raises `CheckpointError` if the folder's note isn't that of the model to be loaded."""
    noted = json.loads((folder / "config.json").read_text()).get(FOREIGN_PARTS) or {}
    if noted == parts_note(shapes):
        return
    found: Any = noted.items() if isinstance(noted, dict) else ()
    named = [
        f"layer {number} with {path or 'the whole layer'} = {kind}"
        for number, parts in found
        if isinstance(parts, dict)
        for path, kind in parts.items()
    ]
    shown = "; ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")
    if made:
        raise CheckpointError(
            f"make gives other parts than {folder} has: it holds {shown or 'none'}."
        )
    raise CheckpointError(
        f"{folder} has parts that aren't Llama 4's: {shown}. Pass make=, which puts them into a "
        "model: make=lambda model: llama4_eqx.research.replaced(model, …)."
    )
