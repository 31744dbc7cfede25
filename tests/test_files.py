"""Files and folders that are written whole or not at all."""

import os

import pytest

from falcon_h1r.files import whole_file, whole_folder, write_file


class Crash(BaseException):
    """Not an Exception, like KeyboardInterrupt."""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


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
    assert str(path) in str(error.value) and "writing-" not in str(error.value)


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
