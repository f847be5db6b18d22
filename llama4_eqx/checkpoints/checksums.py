"""Checksums of the files in a folder: writing them, and finding damage."""

import hashlib
import os
from pathlib import Path

CHECKSUMS = "sha256sums.txt"
# Orbax writes these after our checksums; we read nothing of them.
_UNLISTED = {CHECKSUMS, "_CHECKPOINT_METADATA", "commit_success.txt"}


def write_checksums(folder: Path) -> None:
    """Writes the checksums of all files, as `sha256sum` does."""
    with open(folder / CHECKSUMS, "w") as file:
        file.writelines(f"{_sha256(folder / name)}  {name}\n" for name in _listed(folder))
        file.flush()
        os.fsync(file.fileno())


def damage(folder: Path) -> str | None:
    """What is wrong with the folder; None if every file is as it was written."""
    try:
        lines = [line.partition("  ") for line in (folder / CHECKSUMS).read_text().splitlines()]
        checksums = {name: digest for digest, _, name in lines}
        files = _listed(folder)
        for name in sorted({*checksums, *files}):
            if name not in files:
                return f"{name} is missing"
            if name not in checksums:
                return f"{name} isn't listed in {CHECKSUMS}"
            if _sha256(folder / name) != checksums[name]:
                return f"{name} isn't as it was written"
    except (OSError, UnicodeDecodeError) as error:
        return str(error)
    return None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _listed(folder: Path) -> list[str]:
    """The files that the checksums cover. Hidden files aren't ours."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name[0] != "."]
    return sorted({path.relative_to(folder).as_posix() for path in paths} - _UNLISTED)
