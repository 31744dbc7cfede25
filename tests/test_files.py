"""Files and folders that are written whole or not at all."""

import errno
import os
import signal
import socket
import sys

import pytest

from falcon_h1r.files import (
    foreign_kind,
    read_file,
    settle_folder,
    whole_file,
    whole_folder,
    write_file,
)

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a child process")


class Crash(BaseException):
    """Not an Exception, like KeyboardInterrupt."""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def in_child(work, kill_at=None):
    """Run work() in a process of its own, killed at its kill_at-th access to files; its status."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    steps = [0]

    def count(event, args):
        if event.startswith(("open", "os.", "shutil.", "fcntl.")):
            steps[0] += 1  # the kill is an event too
            if steps[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    status = 1
    try:
        if kill_at is not None:
            sys.addaudithook(count)
        work()
        status = 0
    finally:
        os._exit(status)


def test_the_new_file_is_seen_only_when_it_is_complete(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("old")
    with whole_file(path) as new:
        assert new.parent == tmp_path and new.suffix == ".png"
        new.write_text("half")
        assert path.read_text() == "old"
        new.write_text("new")
    assert path.read_text() == "new" and names(tmp_path) == ["a.png"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Crash()], ids=type)
@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
def test_a_failed_file_leaves_what_was_there(tmp_path, error, existing):
    path = tmp_path / "a"
    if existing:
        path.write_text("old")
    with pytest.raises(type(error)), whole_file(path) as new:
        new.write_text("half")
        raise error
    assert names(tmp_path) == (["a"] if existing else [])
    assert not existing or path.read_text() == "old"


def test_a_file_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        function = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *args, f=function, name=name: (calls.append(name), f(*args))
        )
    write_file(tmp_path / "a", b"bytes")
    assert calls == ["fsync", "replace"] and (tmp_path / "a").read_bytes() == b"bytes"


def test_text_is_written_in_utf8(tmp_path):
    write_file(tmp_path / "a", "é\n")
    assert (tmp_path / "a").read_bytes() == "é\n".encode()


def test_errors_name_the_path_that_was_asked_for(tmp_path):
    path = tmp_path / "missing" / "a"
    with pytest.raises(FileNotFoundError) as error:
        write_file(path, "")
    assert str(error.value) == f"[Errno 2] No such file or directory: '{path}'"


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "missing" / "a"):
        pytest.fail("the block ran")


def test_only_files_are_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(ValueError, match=f"{name} is not a regular file"):
            write_file(tmp_path / name, "")
    assert names(tmp_path) == ["folder", "pipe"]


def test_links_are_followed(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_file(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "a" / "b"
    for content in ("old", "new"):
        with whole_folder(path) as new:
            (new / content).write_text(content)
            assert not (path / content).exists()
    assert names(path) == ["new"] and names(path.parent) == ["b"]


@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
def test_a_failed_folder_leaves_what_was_there(tmp_path, existing):
    path = tmp_path / "a" / "b"
    if existing:
        path.mkdir(parents=True)
        (path / "old").touch()
    with pytest.raises(Crash), whole_folder(path) as new:
        (new / "half").touch()
        raise Crash
    assert names(tmp_path) == (["a"] if existing else [])
    assert not existing or (names(path) == ["old"] and names(path.parent) == ["b"])


def test_a_full_disk_is_told_with_the_path(tmp_path):
    """A write that fails has no file name of its own."""
    with pytest.raises(OSError, match="No space") as error, whole_file(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(tmp_path / "a") in str(error.value)


@needs_fork
def test_what_a_killed_writer_left_is_cleared_by_the_next(tmp_path):
    def stop_halfway():
        with whole_file(tmp_path / "a.txt") as new, whole_folder(tmp_path / "b") as folder:
            new.write_text("half")
            (folder / "half").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(stop_halfway) == -signal.SIGKILL
    foreign = [".a.txt.writing-12345678", ".a.writing-1234567g.txt", ".b.writing-123"]
    for name in foreign:
        (tmp_path / name).touch()
    assert len(names(tmp_path)) == 5
    write_file(tmp_path / "a.txt", "new")
    with whole_folder(tmp_path / "b"):
        pass
    assert names(tmp_path) == sorted([*foreign, "a.txt", "b"])


@needs_fork
def test_what_a_living_writer_writes_is_left_alone(tmp_path):
    with whole_file(tmp_path / "a") as first, whole_folder(tmp_path / "b") as folder:
        first.write_text("first")
        (folder / "first").touch()
        assert in_child(lambda: write_file(tmp_path / "a", "second")) == 0
        with whole_folder(tmp_path / "b") as other:
            (other / "second").touch()
        settle_folder(tmp_path / "b")
        assert first.read_text() == "first" and names(folder) == ["first"]
        assert (tmp_path / "a").read_text() == "second" and names(tmp_path / "b") == ["second"]
    assert (tmp_path / "a").read_text() == "first" and names(tmp_path / "b") == ["first"]
    assert names(tmp_path) == ["a", "b"]


def write_folder(path, word):
    with whole_folder(path) as new:
        for name in ("x", "y"):
            (new / name).write_text(word)


def words(path):
    return {file.name: file.read_text() for file in path.iterdir()}


@needs_fork
@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
def test_a_kill_at_any_step_loses_nothing(tmp_path, existing):
    """Old or new stands there whole, at once for a reader that settles, and the next save is as
    ever."""
    old, new, again = (dict.fromkeys("xy", word) for word in ("old", "new", "again"))
    windows = 0
    for step in range(1, 1000):
        path = tmp_path / str(step) / "c"
        if existing:
            write_folder(path, "old")
        status = in_child(lambda path=path: write_folder(path, "new"), kill_at=step)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        if existing and not path.exists():
            windows += 1
            settle_folder(path)
            assert words(path) == new
        assert not path.exists() or words(path) in ([old, new] if existing else [new])
        write_folder(path, "again")
        assert words(path) == again and names(path.parent) == ["c"], step
    assert 10 < step < 999 and words(path) == new and windows == existing


@needs_fork
def test_an_old_folder_alone_comes_back(tmp_path):
    """Its successor is gone: somebody cleared away one of the two."""
    write_folder(tmp_path / "c", "old")
    os.rename(tmp_path / "c", tmp_path / ".c.replaced-01234567")
    settle_folder(tmp_path / "c")
    assert words(tmp_path / "c") == dict.fromkeys("xy", "old") and names(tmp_path) == ["c"]


@pytest.mark.parametrize("kind", ["pipe", "device", "endless", "long", "socket"])
def test_only_regular_files_of_bounded_size_are_read(tmp_path, kind):
    path = tmp_path / "a"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    elif kind == "long":
        os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 2**40)
    else:
        path = tmp_path / {"device": "/dev/null", "endless": "/dev/zero"}[kind]
    expected = "more than 99 bytes" if kind == "long" else r"is a .*, expected a regular file"
    with pytest.raises(ValueError, match=f"{path}.*{expected}"):
        read_file(path, 99)


def test_files_are_known_by_how_they_begin():
    for start, kind in {
        b"version https://git-lfs.github.com/spec/v1\noid sha256:1": "git-lfs",
        b"GGUF\3\0\0\0": "GGUF",
        b"PK\3\4\x14\0": "zip",
        b"\x80\x02}q\x00X": "pickle",
        b"\n <!DOCTYPE html>": "HTML",
        b"<html lang=": "HTML",
        bytes(64): "zero bytes",
    }.items():
        assert kind in foreign_kind(start)
    for start in (b"", b"{}", b'{"a": "<html>"}', b"\x08\0\0\0\0\0\0\0{}      ", b"hello"):
        assert foreign_kind(start) is None
