"""Checksums of a folder's files, and what is wrong with a folder that has them."""

import hashlib
import os
from pathlib import Path

SUMS = "sha256sums.txt"
# Orbax writes these when our sums are made already. They tell nothing that we read.
_UNLISTED = {SUMS, "_CHECKPOINT_METADATA", "commit_success.txt"}


def write_sums(folder: Path) -> None:
    """Adds the checksums of all files, in the form of the command `sha256sum`."""
    with open(folder / SUMS, "w") as file:
        file.writelines(f"{_sha256(folder / name)}  {name}\n" for name in _listed(folder))
        file.flush()
        os.fsync(file.fileno())


def damage(folder: Path) -> str | None:
    """What is wrong with the folder; None where every file is as it was written."""
    try:
        lines = [line.partition("  ") for line in (folder / SUMS).read_text().splitlines()]
        sums = {name: digest for digest, _, name in lines}
        files = _listed(folder)
        for name in sorted({*sums, *files}):
            if name not in files:
                return f"{name} is missing"
            if name not in sums:
                return f"{name} isn't listed in {SUMS}"
            if _sha256(folder / name) != sums[name]:
                return f"{name} isn't as it was written"
    except (OSError, UnicodeDecodeError) as error:
        return str(error)
    return None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _listed(folder: Path) -> list[str]:
    """The files that the sums cover. Hidden ones aren't ours."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name[0] != "."]
    return sorted({path.relative_to(folder).as_posix() for path in paths} - _UNLISTED)
