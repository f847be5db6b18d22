"""The error of checkpoints that can't be loaded."""

from pathlib import Path


class CheckpointError(ValueError):
    """A checkpoint that doesn't fit its config or the run, or is damaged; lists what is wrong."""


def cannot_load(folder: Path, problems: list[str]) -> CheckpointError:
    """One error with all the problems."""
    lines = "\n".join(f"- {problem}" for problem in sorted(problems))
    return CheckpointError(f"The checkpoint in {folder} can't be loaded:\n{lines}")
