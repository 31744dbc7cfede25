"""Arbitrary damage: a file either loads to the same bits or is refused, never anything else."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoint.tiny_checkpoints import assert_same_weights, read_raw
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import load

from falcon_h1r.checkpoint import CheckpointError
from falcon_h1r.checkpoint.layout import read_header

FUZZ = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)


def loads_identically_or_refuses(folder, model) -> None:
    try:
        loaded = load(folder)
    except CheckpointError as error:
        assert "\n" not in str(error)
        assert str(folder) in str(error)
    else:
        assert_same_weights(loaded, model.state_dict())


# What replaces a run of bytes: noise, or the characters that structure a header.
PATCH = st.binary(max_size=6) | st.text('{}[]",:0123456789-.eBF8 \\u', max_size=4).map(str.encode)


@FUZZ
@given(place=st.floats(0, 1), removed=st.integers(0, 6), patch=PATCH)
def test_damaged_header(place, removed, patch, single, model):
    """Replace a run of bytes in the length or the header; the data stays, so bits must match."""
    file = single / "model.safetensors"
    intact = file.read_bytes()
    try:
        end = len(intact) - len(read_raw(file)[1])
        start = int(place * (end - 1))
        stop = min(start + removed, end)
        file.write_bytes(intact[:start] + patch + intact[stop:])
        loads_identically_or_refuses(single, model)
    finally:
        file.write_bytes(intact)


@FUZZ
@given(place=st.floats(0, 1), removed=st.integers(0, 20), patch=PATCH)
def test_damaged_index(place, removed, patch, sharded, model):
    file = sharded / "model.safetensors.index.json"
    intact = file.read_bytes()
    try:
        start = int(place * (len(intact) - 1))
        file.write_bytes(intact[:start] + patch + intact[start + removed :])
        loads_identically_or_refuses(sharded, model)
    finally:
        file.write_bytes(intact)


@FUZZ
@given(length=st.floats(0, 1))
def test_truncated_file(length, single):
    file = single / "model.safetensors"
    intact = file.read_bytes()
    try:
        file.write_bytes(intact[: int(length * (len(intact) - 1))])
        with pytest.raises(CheckpointError):
            load(single)
    finally:
        file.write_bytes(intact)


@FUZZ
@given(raw=st.binary(max_size=200))
def test_arbitrary_bytes_as_a_file(raw, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(raw)
    with pytest.raises(CheckpointError):
        read_header(file)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["dtype", "shape", "data_offsets", "BF16", "F8_E5M2", "__metadata__"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "a"]), inner)
    ),
    max_leaves=12,
)


@FUZZ
@given(entry=JSON, metadata=JSON)
def test_arbitrary_json_as_an_entry(entry, metadata, single):
    """Well-formed JSON of the wrong types in place of one tensor's entry."""
    header, data = read_raw(single / "model.safetensors")
    header["lm_head.weight"] = entry
    header["__metadata__"] = metadata
    raw = json.dumps(header).encode()
    file = single / "damaged"
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    with pytest.raises(CheckpointError) as error:
        read_header(file)
    assert str(file) in str(error.value)


@FUZZ
@given(content=JSON)
def test_arbitrary_json_as_an_index(content, sharded):
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": content}))
    with pytest.raises(CheckpointError, match=r"index\.json"):
        load(sharded)


@FUZZ
@given(place=st.floats(0, 1), removed=st.integers(0, 8), patch=PATCH)
def test_damaged_config(place, removed, patch, single, model):
    """A changed number may give another valid model; nothing but ValueError may be raised."""
    file = single / "config.json"
    intact = file.read_bytes()
    try:
        start = int(place * (len(intact) - 1))
        file.write_bytes(intact[:start] + patch + intact[start + removed :])
        try:
            loaded = load(single)
        except ValueError as error:
            assert str(single) in str(error)
        else:
            assert_same_weights(loaded, model.state_dict())
    finally:
        file.write_bytes(intact)


def test_the_intact_files_load(single, sharded, model):
    """What the tests above start from."""
    for folder in (single, sharded):
        assert_same_weights(load(folder, dtype=torch.bfloat16), model.state_dict())
