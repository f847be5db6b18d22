"""Which of several ways computes a layer's attention and experts."""

from dataclasses import dataclass
from typing import Literal, get_args

ExpertsBackend = Literal["dense", "ragged", "blocked", "hopper", "megablox", "rows"]
AttentionBackend = Literal["dense", "blockwise", "cudnn", "splash", "ring"]


@dataclass(frozen=True)
class Backends:
    """How to compute attention and experts; None takes what is fastest on the platform that the
    program is compiled for. All give the same values, up to rounding.

    `attention`: `"dense"`, with all scores at once, the oracle of the others and the one that has
    forward-mode derivatives; `"blockwise"`, in memory linear in the length; `"cudnn"`, a kernel for
    NVIDIA GPUs, for unpadded 16-bit rows; `"splash"`, one for TPUs, for rows without a cache;
    `"ring"`, which of rows sharded along the sequence sends keys round instead of gathering them,
    and is for all else as None.
    `experts`: see `layers.grouped_mlp`; `"dense"` has forward-mode derivatives.

    Raises a `ValueError` for an unknown name.
    """

    attention: AttentionBackend | None = None
    experts: ExpertsBackend | None = None

    def __post_init__(self) -> None:
        for part, kind in (("attention", AttentionBackend), ("experts", ExpertsBackend)):
            check_backend(getattr(self, part), get_args(kind), part)


def check_backend(name: str | None, known: tuple[str, ...], part: str) -> None:
    """Raises a `ValueError` for a name that isn't known."""
    if name is not None and name not in known:
        raise ValueError(f"backend of {part} must be None or one of {known}, got {name!r}")


BY_PLATFORM = Backends()
