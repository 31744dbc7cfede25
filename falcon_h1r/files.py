"""Files and folders that are there whole or not at all.

What is to be written goes beside its place, onto the disk, and then takes that place in one rename.
So a reader never sees half of it, and a failure leaves what was there before.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """The path of a new file that replaces `path` if the block succeeds, and vanishes if not.

    The new file has the suffix of `path`, for writers that choose a format by it. A link is
    followed: what it points to is replaced.
    Raises OSError, naming `path`, where a file cannot be written; ValueError where `path` is
    something else than a file.
    """
    target = Path(os.path.realpath(os.path.expanduser(path)))
    if os.path.lexists(target) and not target.is_file():
        raise ValueError(f"{path} is not a regular file, expected one or none")
    new = target.with_name(f".{target.stem}.writing-{secrets.token_hex(4)}{target.suffix}")
    try:
        open(new, "xb").close()  # a place that cannot be written is refused before the work
        yield new
        _sync(new)
        os.replace(new, target)
    except OSError as error:
        if error.errno is not None and error.filename in (None, str(new)):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        with contextlib.suppress(OSError):
            new.unlink()


def write_file(path: str | Path, content: str | bytes) -> None:
    """Replace `path` by these bytes, or this text in UTF-8; errors as in `whole_file`."""
    with whole_file(path) as new:
        new.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """A new folder that takes the place of `path` if the block succeeds, and vanishes if not.

    Parents are created. A folder that is there is replaced as a whole, by two renames: a crash
    between them leaves it under `.NAME.replaced-*` beside `path`. A link is followed.
    Raises OSError where a folder cannot be written.
    """
    target = Path(os.path.realpath(os.path.expanduser(path)))
    new_parents = [parent for parent in target.parents if not parent.exists()]
    folder = target.with_name(f".{target.name}.writing-{secrets.token_hex(4)}")
    replaced = target.with_name(f".{target.name}.replaced-{secrets.token_hex(4)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
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
        shutil.rmtree(folder, ignore_errors=True)
        for parent in new_parents:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise
    _sync(target.parent)
    if occupied:
        shutil.rmtree(replaced)


def _sync(path: Path) -> None:
    """Put a file or folder onto the disk: a rename must not outrun what it publishes."""
    if os.name != "posix" and path.is_dir():
        return  # there a folder cannot be opened
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
