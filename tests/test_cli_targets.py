"""Files that commands write: what is there is kept, and a folder is no file."""

import pytest
from tiny_cli import run

WRITERS = {
    "dissect": ["dissect", "2+3", "-n", "0", "--no-switches", "--out"],
    "parity": ["parity", "--paths", "prefill", "--layers", "0", "--out"],
    "dump": ["parity", "--paths", "prefill", "--layers", "0", "--write-dump"],
    "budget": ["parity", "--paths", "prefill", "--layers", "0", "--write-budget"],
    "calibration": ["doctor", "--self-test", "--pairs", "1", "--write-calibration"],
    "gguf": ["convert", "--to", "gguf", "--no-vocabulary", "--out"],
}
SUFFIX = {"dissect": ".html", "parity": ".md", "dump": ".npz"}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_that_is_there_is_kept(capsys, tmp_path, writer):
    path = tmp_path / f"mine{SUFFIX.get(writer, '.json')}"
    path.write_text("mine")
    status, out, err = run(capsys, *WRITERS[writer], path)
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert f"{path} exists; --force replaces it" in err
    assert path.read_text() == "mine"


@pytest.mark.parametrize("writer", [*WRITERS, "bench", "plot"])
def test_a_folder_is_no_file(capsys, tmp_path, monkeypatch, writer):
    monkeypatch.chdir(tmp_path)
    bench = ["bench", "ops", "--quick"]
    argv = {**WRITERS, "bench": [*bench, "--out"], "plot": [*bench, "--plot"]}[writer]
    folder = tmp_path / f"folder{'.png' if writer == 'plot' else SUFFIX.get(writer, '')}"
    folder.mkdir()
    for path in [folder] if writer in ("plot", "parity", "gguf") else [folder, "."]:
        status, out, err = run(capsys, *argv, path, *(["--force"] * (argv[0] != "bench")))
        assert (status, out) == (2, "") and err.count("\n") == 1, err
        assert "folder" in err and "PosixPath" not in err


def test_the_default_page_is_kept_too_and_force_replaces_it(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["dissect", "2+3", "-n", "0", "--no-switches"]
    (tmp_path / "dissect.html").write_text("mine")
    status, _, err = run(capsys, *argv)
    assert status == 2 and "--out: dissect.html exists; --force replaces it" in err
    assert run(capsys, *argv, "--force")[0] == 0
    assert (tmp_path / "dissect.html").read_text().startswith("<!doctype html>")
