"""Naming files that aren't what their names say, by their first bytes."""

from pathlib import Path

_LARGEST_HEADER = 100_000_000  # bytes of a safetensors file, whose length comes first
_LFS = b"version https://git-lfs"
PICKLED = "a pickled PyTorch file, which is never loaded: use the weights in safetensors"
# First bytes, and what a file that has them is.
_KINDS = (
    (_LFS, "a Git LFS pointer, not the file itself: run `git lfs pull`"),
    (b"GGUF", "a GGUF file, which isn't supported: use the bf16 release"),
    (b"PK\x03\x04", PICKLED),  # a zip archive, as torch.save writes one
    (b"\x80", PICKLED),
    (b"\x1f\x8b", "a gzip archive: unpack it"),
    (b"BZh", "a bzip2 archive: unpack it"),
    (b"\xfd7zXZ", "an xz archive: unpack it"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive: unpack it"),
    (b"<", "a web page, saved in the file's place: fetch it again"),
)


def is_lfs_pointer(path: Path) -> bool:
    """Whether Git LFS left a pointer in the file's place."""
    return _start(path).startswith(_LFS)


def file_kind(path: Path) -> str | None:
    """What a file is and what to do, if it is of a known kind other than safetensors."""
    start = _start(path)
    if len(start) > 8 and int.from_bytes(start[:8], "little") <= _LARGEST_HEADER:
        return None
    for first_bytes, kind in _KINDS:
        if start.lstrip().startswith(first_bytes):
            return kind
    return None


def damage(path: Path, error: Exception) -> str:
    """What a file is that safetensors can't read, or how it says so."""
    kind = file_kind(path) or _text(path) or f"truncated or damaged ({error}): fetch it again"
    return f"{path.name} is {kind}"


def _text(path: Path) -> str | None:
    """How a text begins, such as a server's message."""
    decoded = _start(path).decode("utf-8", errors="replace").rstrip("\ufffd")  # a cut character
    text = " ".join(decoded.split())
    if text and text.isprintable() and "\ufffd" not in text:
        return f'a text that begins "{text}": fetch the file again'
    return None


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(64)
