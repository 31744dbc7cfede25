"""`resolve`: local folders, and the hub without a network."""

from __future__ import annotations

import builtins
import shutil
from pathlib import Path

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import constants, errors
from models import load

from falcon_h1r import FalconH1Config
from falcon_h1r.checkpoint import CheckpointError, resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_local_folder(single, monkeypatch):
    assert resolve(single) == single
    assert resolve(str(single)) == single
    monkeypatch.chdir(single.parent)
    assert resolve(single.name) == Path(single.name)
    assert resolve(f"./{single.name}/") == Path(single.name)
    assert load(single.name).source == single
    monkeypatch.setenv("HOME", str(single.parent))
    assert resolve(f"~/{single.name}") == single


def test_local_folder_shadows_a_repository(single, monkeypatch, tmp_path):
    shutil.copytree(single, tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/name") == Path("owner/name")


NO_FOLDER = "missing ./missing ../owner/name /owner/name ~/none a/b/c a/ C:\\x".split()


@pytest.mark.parametrize(
    "path",
    ["", *NO_FOLDER, "owner/na me", "nul\0", "x" * 5000, Path("owner/name")],
    ids=lambda path: repr(path)[:20],
)
def test_paths_that_do_not_exist(path, monkeypatch):
    """Whatever looks like a path never becomes a request to the hub."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve(path)


@pytest.mark.parametrize("path", [None, 3, b"owner/name"])
def test_other_types(path):
    with pytest.raises(
        CheckpointError, match="expected a folder, a hub repository owner/name or 'h1r-pico'"
    ):
        resolve(path)


def test_a_file_is_not_a_checkpoint(single):
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a file, expected the folder"):
        resolve(single / "model.safetensors")


def test_revision_of_a_local_folder_is_refused(single):
    with pytest.raises(CheckpointError, match="revision='main' was given for the local folder"):
        load(single, revision="main")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty hub cache, and no way out."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def test_offline_cache(cache, sharded, config):
    """A cache as the hub client lays it out: a snapshot of links into a folder of blobs."""
    repo = cache / "models--owner--name"
    snapshot = repo / "snapshots" / COMMIT
    for folder in (snapshot, repo / "blobs", repo / "refs"):
        folder.mkdir(parents=True)
    (repo / "refs" / "v1").write_text(COMMIT)
    for number, file in enumerate(sorted(sharded.iterdir())):
        file.rename(repo / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")

    assert resolve("owner/name", revision="v1") == snapshot
    assert resolve("owner/name", revision=COMMIT) == snapshot
    assert load("owner/name", revision="v1").source == snapshot
    assert FalconH1Config.from_pretrained("owner/name", revision="v1") == config
    with pytest.raises(CheckpointError) as error:
        resolve("owner/name", revision="v2")
    for part in ("'owner/name'", "'v2'", "cache", "HF_HUB_OFFLINE"):
        assert part in str(error.value)


def test_offline_and_not_in_the_cache(cache):
    with pytest.raises(CheckpointError) as error:
        load("owner/name")
    for part in ("'owner/name'", "no local folder", "cache", "HF_HUB_OFFLINE"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def http_error(kind):
    request = httpx2.Request("GET", "https://example.invalid")
    return kind("first line\nsecond line", response=httpx2.Response(404, request=request))


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (http_error(errors.RepositoryNotFoundError), "no such hub repository"),
        (http_error(errors.RevisionNotFoundError), "no such revision"),
        (http_error(errors.GatedRepoError), "restricted"),
        (http_error(errors.HfHubHTTPError), "download failed: HfHubHTTPError: first line"),
        (errors.LocalEntryNotFoundError("x"), "cannot be reached"),
        (httpx2.ProxyError("no way"), "download failed: ProxyError: no way"),
        (OSError(28, "No space left on device"), "No space left"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_of_the_hub(error, part, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError) as caught:
        resolve("owner/name", revision="abc")
    assert "\n" not in str(caught.value)
    for piece in ("'owner/name'", "'abc'", part):
        assert piece in str(caught.value)


REPOSITORY_FILES = {
    "config.json": True,
    "generation_config.json": True,
    "tokenizer.json": True,
    "tokenizer.model": True,
    "merges.txt": True,
    "chat_template.jinja": True,
    "additional_chat_templates/tool_use.jinja": True,
    "additional_chat_templates/notes.txt": False,
    "additional_chat_templates/old/tool_use.jinja": False,
    "other/tool_use.jinja": False,
    "model.safetensors.index.json": True,
    "model-00001-of-00002.safetensors": None,  # with the weights only
    "model.safetensors": None,
    "consolidated.safetensors": False,
    "original/model.safetensors": False,
    "original/params.json": False,
    "pytorch_model.bin": False,
    "model.pt": False,
    "training_args.bin": False,
    "modeling_custom.py": False,
    "README.md": False,
}


@pytest.mark.parametrize("weights", [True, False])
def test_what_is_fetched(weights, monkeypatch, tmp_path):
    def download(repo_id, *, revision, allow_patterns, ignore_patterns):
        assert (repo_id, revision) == ("owner/name", "v1")
        kept = huggingface_hub.utils.filter_repo_objects(
            REPOSITORY_FILES, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        wanted = [n for n, w in REPOSITORY_FILES.items() if (weights if w is None else w)]
        assert list(kept) == wanted
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("owner/name", "v1", weights=weights) == tmp_path


def test_without_huggingface_hub(monkeypatch):
    real_import = builtins.__import__

    def no_hub(name, *args, **kwargs):
        if name.startswith("huggingface_hub"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_hub)
    with pytest.raises(CheckpointError, match="install huggingface_hub"):
        resolve("owner/name")
