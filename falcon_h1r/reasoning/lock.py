"""One run per record folder: a lock that the system drops when its process ends."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".lock"


class FolderLock:
    """Holds a folder for one run; made with its parents if it is not there.

    Taken at once or not at all: ValueError where another run holds the folder, be it one of this
    process; OSError where the folder cannot be written. `release` removes the file of the lock, and
    the folders that were made for it if nothing was put into them. A context manager.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._made = [p for p in (self.folder, *self.folder.parents) if not p.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._path = self.folder / LOCK
        self._descriptor = None
        while self._descriptor is None:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                _lock(descriptor)
                # The run before may have removed the file since it was opened.
                current = _is_at(descriptor, self._path)
            except BlockingIOError:
                os.close(descriptor)
                raise ValueError(
                    f"{self.folder}: another run writes its records there; wait until it has "
                    "ended, or take another folder"
                ) from None
            except BaseException:
                os.close(descriptor)
                raise
            if current:
                self._descriptor = descriptor
            else:
                os.close(descriptor)

    def release(self) -> None:
        """Let others in; nothing where that was done before."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        if fcntl is not None:  # an open file cannot be removed on Windows
            with contextlib.suppress(OSError):
                self._path.unlink()
        os.close(descriptor)
        if fcntl is None:
            with contextlib.suppress(OSError):
                self._path.unlink()
        for folder in self._made:
            with contextlib.suppress(OSError):
                folder.rmdir()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *error) -> None:
        self.release()

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)


def _lock(descriptor: int) -> None:
    """Raises BlockingIOError where another holds it."""
    if fcntl is not None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    import msvcrt

    try:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    except PermissionError as error:
        raise BlockingIOError(*error.args) from None


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
