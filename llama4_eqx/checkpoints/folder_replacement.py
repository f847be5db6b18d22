"""Replacing a folder so that a kill at any moment leaves the old one or the new one whole.

A `Staging` folder is filled under a hidden name and then committed:

- Beside the target: renamed to it, or exchanged with it by `renameat2`. Both are atomic.
- Inside the target, where the target itself can't be renamed: a mount point, the current folder, a
  parent that can't be written, or a file system without the exchange. Renaming the staging folder
  to `.checkpoint-complete` commits it; its files are then moved out one by one. `recover`, which
  every load and save calls, finishes what a kill interrupted.

A staging folder is locked while its process lives, so the next save to the same target can remove
those of killed processes.
"""

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows: there, savers don't exclude each other
    fcntl = None

_COMPLETE = ".checkpoint-complete"
_MANIFEST = "manifest.json"
_TOKEN = "[a-z0-9_]{8}"
_INSIDE = re.compile(rf"\.checkpoint-partial-{_TOKEN}")
_NO_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EXDEV, errno.EBUSY}
_NO_LINKS = {errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS}
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def target_folder(folder: str | os.PathLike[str]) -> Path:
    """Where a folder is to be written, links followed. Raises a `ValueError` for an empty name,
    which would be the working directory and is more likely a variable that isn't set."""
    if not os.fspath(folder):
        raise ValueError("The folder's name is empty: give one, or '.' for the working directory.")
    return Path(os.path.realpath(folder))


class Staging:
    """A hidden folder, `path`, whose content will replace that of `target` or become it.

    `target` must be free of symbolic links. Creating one removes the staging folders that killed
    processes left.
    """

    def __init__(self, target: Path):
        self.target, self.committed = target, False
        if target.parent.exists() and not target.parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{target.parent} is a file, not a folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        token = secrets.token_hex(4)
        with _locked(target):
            _recover(target)
            _remove_leftovers(target)
            self.path = target.with_name(f".{_short(target.name)}-partial-{token}")
            if target.exists():
                beside, self.path = self.path, target / f".checkpoint-partial-{token}"
                self.path.mkdir()
                if not _holds_current_folder(target):
                    # Fails for a mount point, or where the parent can't be written.
                    with contextlib.suppress(OSError):
                        os.rename(self.path, beside)
                        self.path = beside
            else:
                self.path.mkdir()
            self._lock = _lock(self.path)

    def commit(
        self,
        *,
        check: Callable[[], None] = lambda: None,
        replaced: Callable[[], Iterable[str]] = lambda: (),
    ) -> None:
        """Puts the content in the target's place; other files of the target stay.

        Under a lock, so that of two processes one comes first: `check` raises if the target must
        not be replaced now; `replaced` names the target's files that are to go.
        """
        _sync_folder(self.path)
        with _locked(self.target):
            check()
            _recover(self.target)
            if not self.target.exists():
                os.rename(self.path, self.target)
                _sync_folder(self.target.parent)
            elif not self._exchanged({*replaced()}):
                self._move_in({*replaced()})

    def discard(self) -> None:
        """Removes the folder if it wasn't committed, and what a commit replaced."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _exchanged(self, replaced: set[str]) -> bool:
        if self.path.parent == self.target:
            return False
        new = set(os.listdir(self.path))
        try:
            _link_tree(self.target, self.path, skip=new | replaced)
            shutil.copystat(self.target, self.path)
            _exchange(self.path, self.target)
        except OSError as error:
            if error.errno not in _NO_EXCHANGE:
                raise
            for name in set(os.listdir(self.path)) - new:
                _remove(self.path / name)
            return False
        _sync_folder(self.target.parent)
        return True

    def _move_in(self, replaced: set[str]) -> None:
        manifest = {"files": sorted(os.listdir(self.path)), "replaced": sorted(replaced)}
        with (self.path / _MANIFEST).open("w") as file:
            json.dump(manifest, file)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(self.path)
        os.rename(self.path, self.target / _COMPLETE)
        self.committed = True
        _sync_folder(self.target)
        try:
            _finish(self.target)
        except OSError as error:
            raise OSError(
                error.errno,
                f"The new checkpoint is complete in {self.target / _COMPLETE}, but can't be moved "
                f"out of it: {error.strerror or error}. The next load or save will try again.",
            ) from error


def recover(target: Path) -> None:
    """Finishes what a killed save to the folder left unfinished. Does nothing otherwise."""
    if target.exists() and not (target / _COMPLETE).exists():
        return
    with _locked(target):
        _recover(target)


def _recover(target: Path) -> None:
    if (target / _COMPLETE).exists():
        _finish(target)
    elif not target.exists():
        # Version 0.2.0 renamed the old folder before the new one.
        retired = _beside(target, "old")
        if retired:
            os.rename(max(retired, key=lambda path: path.stat().st_mtime), target)


def _finish(target: Path) -> None:
    """Moves the files out of the committed folder. May be killed and called again."""
    staged = target / _COMPLETE
    if (staged / _MANIFEST).exists():
        manifest = json.loads((staged / _MANIFEST).read_text())
        waiting = [name for name in manifest["files"] if (staged / name).exists()]
        gone = {*manifest["replaced"]} - {*manifest["files"]}
        # Without config.json nobody takes a mixture of two checkpoints for one.
        if "config.json" in waiting:
            gone.add("config.json")
        for name in sorted(gone):
            (target / name).unlink(missing_ok=True)
        for name in sorted(waiting, key=lambda name: name == "config.json"):
            os.replace(staged / name, target / name)
        _sync_folder(target)
    shutil.rmtree(staged)


def _remove_leftovers(target: Path) -> None:
    found = _beside(target, "partial")
    if target.exists():
        found += [path for path in target.iterdir() if _INSIDE.fullmatch(path.name)]
    for path in found:
        lock = _lock(path, exclusive=True)
        if lock is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _beside(target: Path, kind: str) -> list[Path]:
    """The hidden folders of this kind beside the target."""
    name = re.compile(rf"\.{re.escape(_short(target.name))}-{kind}-{_TOKEN}")
    try:
        return [path for path in target.parent.iterdir() if name.fullmatch(path.name)]
    except OSError:  # a parent that isn't there, or can't be read
        return []


def _short(name: str) -> str:
    """The name, or a hash where a longer one wouldn't fit a file system's 255 bytes."""
    coded = os.fsencode(name)
    return name if len(coded) < 200 else hashlib.sha256(coded).hexdigest()[:32]


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Excludes others that save to the target, where the file system has locks."""
    lock = _lock(target.parent, exclusive=True, wait=True)
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _lock(folder: Path, *, exclusive: bool = False, wait: bool = False) -> int | None:
    """Locks the folder until the result is closed or the process ends; None if that fails."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
        fcntl.flock(descriptor, kind if wait else kind | fcntl.LOCK_NB)
    except OSError:  # held by another process, or not supported
        os.close(descriptor)
        return None
    return descriptor


def _holds_current_folder(folder: Path) -> bool:
    try:
        current = Path.cwd().resolve()
    except OSError:  # it was removed
        return False
    return current.is_relative_to(folder)


def _link_tree(source: Path, target: Path, skip: set[str]) -> None:
    """Hard-links the files of one folder into another: no bytes are copied where links exist."""
    with os.scandir(source) as entries:
        for entry in entries:
            if entry.name in skip or _INSIDE.fullmatch(entry.name):
                continue
            path = target / entry.name
            if entry.is_dir(follow_symlinks=False):
                path.mkdir()
                _link_tree(Path(entry.path), path, set())
                shutil.copystat(entry.path, path)
                continue
            try:
                os.link(entry.path, path, follow_symlinks=False)
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                shutil.copy2(entry.path, path, follow_symlinks=False)


def _exchange(first: Path, second: Path) -> None:
    """Exchanges the names of two folders in one atomic step."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    paths = os.fsencode(first), os.fsencode(second)
    if renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _sync_folder(folder: Path) -> None:
    """Makes renames in the folder survive a power cut, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
