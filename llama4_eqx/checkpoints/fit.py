"""Whether the tensors of a folder fit a model."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from llama4_eqx.checkpoints.errors import cannot_load
from llama4_eqx.checkpoints.leaves import plain_view
from llama4_eqx.checkpoints.safetensors_reading import DTYPES, slices
from llama4_eqx.checkpoints.tensor_names import Tensor
from llama4_eqx.checkpoints.tensor_spellings import Stored, is_vision


def check(
    wanted: list[Tensor],
    found: dict[str, Stored],
    problems: list[str],
    folder: Path,
    dtype: DTypeLike | None,
) -> dict[int, Any]:
    """The dtype of each leaf; raises one error with everything that doesn't fit."""
    problems = [*problems, *_missing({tensor.name for tensor in wanted}, found)]
    dtypes = {}
    for tensor in wanted:
        name = tensor.name
        if name not in found:
            continue
        stored = found[name]
        if stored.shape != tensor.shape:
            problems.append(f"{name} has shape {stored.shape}, but must have {tensor.shape}")
        if stored.dtype not in DTYPES:
            problems.append(f"{name} is {stored.dtype}, but must be one of {', '.join(DTYPES)}")
            continue
        kind = DTYPES[stored.dtype] if dtype is None else dtype
        if dtypes.setdefault(tensor.leaf, kind) != kind:
            problems.append(f"{name} differs in dtype from other layers: pass dtype=")
    if problems:
        raise cannot_load(folder, problems)
    return dtypes


def _missing(names: set[str], found: dict[str, Stored]) -> list[str]:
    for others, what, mend in (
        ({n for n in names if is_vision(n)}, "vision encoder and projector", "text"),
        ({n for n in names if not is_vision(n)}, "text decoder", "vision"),
    ):
        if others and not others & found.keys() and found:
            return [f'all tensors of the {what} are missing: pass part="{mend}" to do without']
    problems = []
    for name in names - found.keys():
        if name.endswith("lm_head.weight"):
            problems.append(
                f"{name} is missing, and config.json doesn't tie it to the embeddings: if they are "
                "the same, set tie_word_embeddings to true there"
            )
        else:
            problems.append(f"{name} is missing")
    return problems


def equal(first: Stored, second: Stored) -> bool:
    """Whether two matrices hold the same numbers, read a few rows at a time."""
    if first.shape != second.shape or not {first.dtype, second.dtype} <= DTYPES.keys():
        return False
    with ExitStack() as stack:
        get_slice = slices(stack)
        views = [plain_view(stored, get_slice) for stored in (first, second)]
        rows, width = first.shape
        step = max(1, 2**24 // max(width, 1))
        pieces = (slice(start, min(start + step, rows)) for start in range(0, rows, step))
        return all(np.array_equal(views[0][piece, :], views[1][piece, :]) for piece in pieces)
