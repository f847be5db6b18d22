"""The error of checkpoints that can't be loaded."""

from collections.abc import Iterable
from pathlib import Path

_MAX_LISTED = 20


class CheckpointError(ValueError):
    """A checkpoint that doesn't fit its config or the run, or is damaged; lists what is wrong."""


def cannot_load(folder: Path, problems: Iterable[str]) -> CheckpointError:
    """One error for all the problems."""
    lines = listed(sorted(dict.fromkeys(problems)))
    return CheckpointError(f"The checkpoint in {folder} can't be loaded:\n{lines}")


def listed(problems: list[str]) -> str:
    """The first problems, one a line, and the number of the others."""
    lines = [f"- {problem}" for problem in problems[:_MAX_LISTED]]
    if len(problems) > _MAX_LISTED:
        lines.append(f"- … and {len(problems) - _MAX_LISTED} more")
    return "\n".join(lines)
