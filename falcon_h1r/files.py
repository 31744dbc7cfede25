"""Files and folders that are there whole or not at all, and files that are read with a bound.

What is to be written goes beside its place, onto the disk, and then takes that place in one rename.
So a reader never sees half of it, and a failure leaves what was there before. A writer holds a lock
on what it writes, and the lock ends with its process: the next writer clears away what a killed one
left.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows: there nothing is locked, so nothing is cleared away
    fcntl = None

# What a file is that begins so: said to those who took it for another one.
_STARTS = (
    (
        b"version https://git-lfs",
        "a git-lfs pointer, not the file (git lfs pull fetches it)",
    ),
    (b"GGUF", "a GGUF file, which llama.cpp reads"),
    (b"PK\x03\x04", "a zip archive, as torch.save writes (nothing is ever unpickled)"),
    (b"\x80\x02", "a pickle (nothing is ever unpickled)"),
    (b"\x80\x03", "a pickle (nothing is ever unpickled)"),
    (b"\x80\x04", "a pickle (nothing is ever unpickled)"),
    (b"\x80\x05", "a pickle (nothing is ever unpickled)"),
    (b"\x93NUMPY", "a numpy file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\xfd7zXZ", "an xz archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"\x00" * 8, "zero bytes at its start, as an unfinished download leaves them"),
)
_HTML = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype|html|head|\?xml|!--)", re.IGNORECASE)


def foreign_kind(start: bytes) -> str | None:
    """What a file is by its first bytes (64 are enough), where that is a well-known other kind."""
    if _HTML.match(start):
        return "an HTML or XML page, as a failed download leaves it"
    return next((kind for magic, kind in _STARTS if start.startswith(magic)), None)


def open_file(path: str | Path, error: type[ValueError] = ValueError) -> BinaryIO:
    """Open a regular file for reading: a pipe or a device may have no end.

    Raises OSError where it cannot be opened, `error` where it is no regular file.
    """
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # for the latter the system has its error
        kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(mode), "a device")
        raise error(f"{path} is {kind}, expected a regular file")
    return open(path, "rb")


def read_file(path: str | Path, most: int, error: type[ValueError] = ValueError) -> bytes:
    """The bytes of a regular file of at most `most` bytes; errors as in `open_file`."""
    with open_file(path, error) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise error(f"{path}: more than {most} bytes, expected at most so many")
    return content


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """The path of a new file that replaces `path` if the block succeeds, and vanishes if not.

    The new file has the suffix of `path`, for writers that choose a format by it. A link is
    followed: what it points to is replaced. What a killed writer of `path` left is removed.
    Raises OSError, naming `path`, where a file cannot be written; ValueError where `path` is
    something else than a file.
    """
    target = Path(os.path.realpath(os.path.expanduser(path)))
    if os.path.lexists(target) and not target.is_file():
        raise ValueError(f"{path} is not a regular file, expected one or none")
    new = None
    try:
        _clear(target.parent, target.stem, target.suffix)
        # A place that cannot be written is refused before the work.
        new, lock = _claim(
            lambda token: target.with_name(_name(target.stem, "writing", token, target.suffix)),
            lambda place: open(place, "xb").close(),
        )
        with lock:
            yield new
            _sync(new)
            os.replace(new, target)
    except OSError as error:
        name = os.path.basename(str(error.filename or ""))
        if error.errno is not None and (not name or name.startswith(f".{target.stem}.writing-")):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        if new is not None:
            with contextlib.suppress(OSError):
                new.unlink()


def write_file(path: str | Path, content: str | bytes) -> None:
    """Replace `path` by these bytes, or this text in UTF-8; errors as in `whole_file`."""
    with whole_file(path) as new:
        new.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """A new folder that takes the place of `path` if the block succeeds, and vanishes if not.

    Parents are created. A folder that is there is replaced as a whole, by two renames. A writer
    that is killed between them leaves the old folder under `.NAME.replaced-*` and the new one under
    `.NAME.writing-*`, both whole: `settle_folder` then puts the new one in its place. It is called
    here first, so nothing that killed writers left stays for ever. A link is followed.
    Raises OSError where a folder cannot be written.
    """
    target = Path(os.path.realpath(os.path.expanduser(path)))
    new_parents = [parent for parent in target.parents if not parent.exists()]
    folder = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        settle_folder(target)
        folder, lock = _claim(
            lambda token: target.with_name(_name(target.name, "writing", token)), Path.mkdir
        )
        replaced = target.with_name(_name(target.name, "replaced", folder.name[-8:]))
        with lock:
            yield folder
            for file in [*folder.rglob("*"), folder]:
                _sync(file)
            occupied = target.exists()
            if occupied:
                os.rename(target, replaced)
            try:
                os.rename(folder, target)
            except BaseException:
                if occupied:
                    os.rename(replaced, target)
                raise
    except BaseException:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        for parent in new_parents:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise
    _sync(target.parent)
    if occupied:
        shutil.rmtree(replaced)


def settle_folder(path: str | Path) -> None:
    """Finish what a killed `whole_folder` of `path` had begun, and remove what killed ones left.

    Where the kill came between its two renames, the new folder takes its place. What a living
    writer works on is not touched. Raises OSError where a folder cannot be renamed.
    """
    target = Path(os.path.realpath(os.path.expanduser(path)))
    for old in _left(target.parent, target.name, "replaced"):
        new = target.with_name(_name(target.name, "writing", old.name[-8:]))
        with _abandoned(new) as dead:
            if not dead and new.exists():
                continue  # its writer lives, and is just there
            if not os.path.lexists(target):
                os.rename(new if dead else old, target)
        if old.exists():
            shutil.rmtree(old, ignore_errors=True)
    _clear(target.parent, target.name)


def _name(stem: str, state: str, token: str, suffix: str = "") -> str:
    return f".{stem}.{state}-{token}{suffix}"


def _left(folder: Path, stem: str, state: str, suffix: str = "") -> list[Path]:
    """What writers of a target in `folder` have there, living or killed."""
    pattern = re.compile(re.escape(_name(stem, state, "")) + "[0-9a-f]{8}" + re.escape(suffix))
    try:
        return [folder / name for name in os.listdir(folder) if pattern.fullmatch(name)]
    except OSError:
        return []


def _clear(folder: Path, stem: str, suffix: str = "") -> None:
    for path in _left(folder, stem, "writing", suffix):
        with _abandoned(path) as dead, contextlib.suppress(OSError):
            if dead and path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif dead:
                path.unlink()


def _claim(
    name: Callable[[str], Path], make: Callable[[Path], None]
) -> tuple[Path, contextlib.ExitStack]:
    """Make a new file or folder and lock it; the lock lasts until the stack is closed."""
    while True:
        path, held = name(secrets.token_hex(4)), contextlib.ExitStack()
        make(path)
        locked = _lock(path, held)
        if locked is None or (locked and path.exists()):
            return path, held
        held.close()  # another writer took it for abandoned before it was locked


@contextlib.contextmanager
def _abandoned(path: Path) -> Iterator[bool]:
    """Whether the writer of `path` is dead; the lock is held meanwhile."""
    with contextlib.ExitStack() as held:
        yield bool(_lock(path, held))


def _lock(path: Path, held: contextlib.ExitStack) -> bool | None:
    """Lock a file or folder: whether that went well; None where it cannot be locked at all."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    held.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _sync(path: Path) -> None:
    """Put a file or folder onto the disk: a rename must not outrun what it publishes."""
    if os.name != "posix" and path.is_dir():
        return  # there a folder cannot be opened
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
