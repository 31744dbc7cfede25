"""A cache file whose checksum fits, but that no `save` has written: its tensors are not trusted."""

import os
import re

import pytest
import torch
from models import make_config, make_model, random_ids
from safetensors.torch import save_file

from falcon_h1r import cache_file
from falcon_h1r.cache import TENSORS, Cache
from falcon_h1r.files import whole_file
from falcon_h1r.tensor_file import read_header, write_safetensors, write_tensors


@pytest.fixture(scope="module")
def model():
    return make_model(make_config(num_hidden_layers=1))


@pytest.fixture(scope="module")
def tensors(model):
    """Two rows, the longer of 6 tokens."""
    cache = model.new_cache(2, 9)
    with torch.no_grad():
        mask = torch.arange(6) < torch.tensor([4, 6])[:, None]
        model(random_ids(model.config, 2, 6), attention_mask=mask, cache=cache)
    content = cache.snapshot()
    return {name: getattr(content, name).contiguous() for name in (*TENSORS, "lengths")}


def forge(path, tensors, model):
    """Any tensors with a checksum and fingerprint that fit."""
    metadata = {
        "format": cache_file.FORMAT,
        "fingerprint": cache_file.fingerprint(model),
        "content": cache_file._sha256(tensors),
    }
    save_file(tensors, path, metadata)


def test_what_is_forged_well_is_read(tmp_path, model, tensors):
    forge(tmp_path / "c", tensors, model)
    loaded = Cache.load(tmp_path / "c", model)
    assert all(torch.equal(getattr(loaded, name), tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    ("values", "dtype", "words"),
    [
        ([-5, 6], torch.int64, "lengths -5, 6, expected some of 0 .. 6"),
        ([4, 7], torch.int64, "lengths 4, 7, expected some of 0 .. 6"),
        ([4, -(2**63)], torch.int64, "lengths 4, -9223372036854775808"),
        ([4, 2**63 - 1], torch.int64, "lengths 4, 9223372036854775807"),
        ([1.5, 6.0], torch.float64, r"lengths is \[2\] torch.float64, expected \[2\] torch.int64"),
        ([4, 6], torch.int32, "lengths is .*int32"),
        ([True, True], torch.bool, "lengths is .*bool"),
        ([4, 6, 6], torch.int64, r"lengths is \[3\].*expected \[2\]"),
        ([4], torch.int64, r"lengths is \[1\].*expected \[2\]"),
        ([], torch.int64, r"lengths is \[0\].*expected \[2\]"),
        (4, torch.int64, r"lengths is \[\].*expected \[2\]"),
        ([[4, 6]], torch.int64, r"lengths is \[1, 2\].*expected \[2\]"),
    ],
)
def test_lengths(tmp_path, model, tensors, values, dtype, words):
    forge(tmp_path / "c", tensors | {"lengths": torch.tensor(values, dtype=dtype)}, model)
    with pytest.raises(ValueError, match=words) as caught:
        Cache.load(tmp_path / "c", model)
    assert str(tmp_path / "c") in str(caught.value) and "\n" not in str(caught.value)


CHANGES = {
    "flat": lambda t: t.flatten(),
    "0-d": lambda t: t.flatten()[0],
    "one axis less": lambda t: t[0],
    "one axis more": lambda t: t[None],
    "no rows": lambda t: t[:, :0],
    "one row": lambda t: t[:, :1],
    "no layers": lambda t: t[:0],
    "two layers": lambda t: t.repeat(2, *[1] * (t.dim() - 1)),
    "no last axis": lambda t: t[..., :0],
    "axes swapped": lambda t: t.transpose(-1, -3),
    "another dtype": lambda t: t.half(),
    "integers": lambda t: t.long(),
    "one position": lambda t: t[:, :, :, :1],
    "no positions": lambda t: t[:, :, :, :0],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", TENSORS)
def test_shapes(tmp_path, model, tensors, name, change):
    changed = CHANGES[change](tensors[name]).contiguous()
    if changed.shape == tensors[name].shape and changed.dtype == tensors[name].dtype:
        pytest.skip("no change of this tensor")
    forge(tmp_path / "c", tensors | {name: changed.clone()}, model)
    with pytest.raises(ValueError, match=r"c: \w+ is \[.*expected \[") as caught:
        Cache.load(tmp_path / "c", model)
    assert "\n" not in str(caught.value)


def test_all_rows_and_all_positions_away(tmp_path, model, tensors):
    for keep in ((slice(None), slice(0)), (slice(None),) * 3 + (slice(0),)):
        cut = {name: tensors[name][keep[: tensors[name].dim()]] for name in ("keys", "values")}
        if len(keep) == 2:
            cut = {name: tensors[name][:, :0] for name in TENSORS} | {"lengths": torch.tensor([])}
        changed = {name: value.contiguous() for name, value in (tensors | cut).items()}
        forge(tmp_path / "c", changed, model)
        with pytest.raises(ValueError, match="expected"):
            Cache.load(tmp_path / "c", model)


def test_a_disk_that_is_full_is_an_error_of_the_system(tmp_path, model):
    """The safetensors package has an exception of its own for it."""
    import resource

    cache, path = model.new_cache(4, 400), tmp_path / "c"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match=re.escape(str(path))):
            cache.save(path, model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written_or_read(tmp_path, model):
    cache = model.new_cache(1, 4)
    with pytest.raises(FileNotFoundError, match="absent"):
        cache.save(tmp_path / "absent" / "c", model)
    with pytest.raises(ValueError, match="/dev/full is not a regular file"):
        cache.save("/dev/full", model)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(ValueError, match="expected a regular file"):
            Cache.load(path, model)
    with pytest.raises(IsADirectoryError):
        Cache.load(tmp_path, model)


def test_the_file_that_is_written_is_the_one_that_is_locked(tmp_path):
    """A writer that puts another file in its place would look abandoned to the next."""
    with whole_file(tmp_path / "c") as new:
        inode = new.stat().st_ino
        write_safetensors(new, [], lambda file, spec: None, {"a": "b"})
        assert new.stat().st_ino == inode
    assert read_header(tmp_path / "c") == ([], {"a": "b"})


def test_dtypes_that_the_format_does_not_have_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tensor 'x' is torch.complex64"):
        write_tensors(tmp_path / "c", {"x": torch.zeros(2).cfloat()}, {})
    assert list(tmp_path.iterdir()) == []
