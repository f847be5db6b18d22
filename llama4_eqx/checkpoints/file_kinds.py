"""Naming files that aren't what their names say, by their first bytes."""

from pathlib import Path

_LARGEST_HEADER = 100_000_000  # bytes of a safetensors file, whose length comes first
_LFS = b"version https://git-lfs"
_PICKLED = "a pickled PyTorch file, which is never loaded: use the weights in safetensors"
# First bytes, and what a file that has them is.
_KINDS = (
    (_LFS, "a Git LFS pointer, not the file itself: run `git lfs pull`"),
    (b"GGUF", "a GGUF file, which isn't supported: use the bf16 release"),
    (b"PK\x03\x04", _PICKLED),  # a zip archive, as torch.save writes one
    (b"\x80", _PICKLED),
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
    text = start.decode("utf-8", errors="replace").strip()
    if text and text.isprintable() and "\ufffd" not in text[:-1]:
        return f'a text that begins "{text}": fetch the file again'
    return None


def damage(path: Path, error: Exception) -> str:
    """What a file is that safetensors can't read, or how it says so."""
    kind = file_kind(path)
    return f"{path.name} is {kind or f'truncated or damaged ({error}): fetch it again'}"


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(64)
