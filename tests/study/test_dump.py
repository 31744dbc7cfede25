"""The dump format: what is written is read, and what does not fit is refused by name."""

import contextlib
import json
import os
import struct
import zipfile

import numpy as np
import pytest
import torch
from models import make_config, make_model, random_ids
from safetensors.torch import save_file

from falcon_h1r.cli import main
from falcon_h1r.ops import REFERENCE
from falcon_h1r.study.dump import (
    Dump,
    Inputs,
    in_layout,
    read_dump,
    real_values,
    shape_of,
    take_dump,
    write_dump,
)
from falcon_h1r.study.faults import Patient
from falcon_h1r.taps import full_names, tap_of


@pytest.fixture(scope="module")
def model():
    return make_model(make_config(), ops=REFERENCE, dtype=torch.float64)


def mask_of(ids, *lengths_and_starts):
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, (start, length) in enumerate(lengths_and_starts):
        mask[row, start : start + length] = True
    return mask


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_dump_comes_back(tmp_path, model, suffix, dtype):
    ids = random_ids(model.config, 2, 11)
    patient = Patient(model, dtype=dtype)
    dump = take_dump(patient, patient.model, Inputs(ids, pieces=(4, 1, 6)), source="me")
    write_dump(tmp_path / f"d{suffix}", dump)
    back = read_dump(tmp_path / f"d{suffix}", model.config)
    assert torch.equal(back.inputs.ids, ids) and back.inputs.pieces == (4, 1, 6)
    assert back.inputs.mask is None and (back.dtype, back.source) == (dtype, "me")
    assert list(back.tensors) == list(dump.tensors) and len(back.tensors) > 3 * 40
    for name, tensor in dump.tensors.items():
        assert torch.equal(back.tensors[name].double(), tensor.double()), name
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"d{suffix}"]


def test_padded_rows_hold_what_each_row_alone_gives(tmp_path, model):
    """In the caller's layout: row 0 padded left, row 1 right, row 2 on both sides."""
    ids = random_ids(model.config, 3, 12)
    spans = ((5, 7), (0, 9), (2, 6))
    mask = mask_of(ids, *spans)
    dump = take_dump(Patient(model), model, Inputs(ids, mask))
    write_dump(tmp_path / "d.npz", dump)
    dump = read_dump(tmp_path / "d.npz", model.config)
    assert torch.equal(dump.inputs.mask, mask)
    alone = [
        take_dump(Patient(model), model, Inputs(ids[r : r + 1, s : s + n])).tensors
        for r, (s, n) in enumerate(spans)
    ]
    for name, tensor in dump.tensors.items():
        axes = tap_of(name).axes.split()
        if "l" in axes:
            found = real_values(name, tensor, mask)
            expected = torch.cat([real_values(name, row[name], None) for row in alone])
        elif "b" in axes:
            found, expected = tensor, torch.cat([row[name] for row in alone])
        else:
            found, expected = tensor, alone[0][name]
        assert torch.allclose(found, expected, rtol=1e-11, atol=1e-12), name


def test_every_tap_has_the_shape_that_is_demanded(model):
    ids = random_ids(model.config, 2, 9)
    names = full_names(model.config)
    dump = take_dump(Patient(model), model, Inputs(ids, pieces=(5, 1, 3)), names)
    assert set(dump.tensors) == set(names)
    for name, tensor in dump.tensors.items():
        assert tuple(tensor.shape) == shape_of(name, model.config, ids.shape), name


def small(model, **changes):
    ids = torch.tensor([[1, 2, 3]])
    tensors = {"input_ids": ids, "logits": torch.zeros(1, 3, model.config.vocab_size)}
    return tensors | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers.0.mamba.scan.z": torch.zeros(1)}, "did you mean 'layers.0.mamba.scan."),
        ({"logit": torch.zeros(1)}, "unknown tensor 'logit'; did you mean 'logits'?"),
        ({"layers.9.residual.in": torch.zeros(1)}, "unknown tensor 'layers.9.residual.in'"),
        ({"logits": torch.zeros(1, 3, 5)}, "logits has shape (1, 3, 5), expected (1, 3, 97)"),
        ({"logits": torch.zeros(1, 3, 97).int()}, "logits is torch.int32"),
        ({"input_ids": torch.tensor([[1, 2, 97]])}, "input_ids goes from 1 to 97"),
        ({"input_ids": torch.tensor([[1, -2, 9]])}, "input_ids goes from -2 to 9"),
        ({"input_ids": torch.tensor([1, 2, 3])}, "input_ids is (3,) torch.int64"),
        ({"input_ids": torch.zeros(1, 3)}, "input_ids is (1, 3) torch.float32"),
        ({"attention_mask": torch.ones(1, 4)}, "attention_mask has shape (1, 4)"),
        ({"input_ids": torch.ones(1, 10**5).long()}, "input_ids has 100000 columns, the model at"),
        ({"input_ids": torch.tensor(3)}, "input_ids is () torch.int64"),
        ({"input_ids": torch.ones(1, 3).bool()}, "input_ids is (1, 3) torch.bool"),
        ({"input_ids": torch.ones(1, 3).cfloat()}, "input_ids is (1, 3) torch.complex64"),
        ({"input_ids": torch.ones(1, 3).to(torch.uint64)}, "input_ids is (1, 3) torch.uint64"),
        ({"logits": torch.tensor(1.0)}, "logits has shape (), expected (1, 3, 97)"),
        ({"logits": torch.zeros(1, 3, 97).cdouble()}, "logits is torch.complex128"),
        ({"attention_mask": torch.ones(1, 3).cfloat()}, "attention_mask is torch.complex64"),
        ({"attention_mask": torch.zeros(1, 3)}, "attention_mask has a row of padding alone"),
        ({"pieces": torch.tensor(3)}, "pieces is () torch.int64"),
        ({"pieces": torch.tensor([3.0])}, "pieces is (1,) torch.float32"),
        ({"pieces": torch.ones(3).bool()}, "pieces is (3,) torch.bool"),
        ({"x" * 50_000: torch.zeros(1)}, "unknown tensor 'xxx"),
        ({"pieces": torch.tensor([1, 1])}, "pieces (1, 1) do not sum to the 3 columns"),
        ({"pieces": torch.tensor([3, 0])}, "pieces (3, 0)"),
        (
            {"pieces": torch.tensor([3]), "attention_mask": torch.ones(1, 3)},
            "attention_mask and pieces exclude one another",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, model, changes, message):
    np.savez(tmp_path / "d.npz", **{k: v.numpy() for k, v in small(model, **changes).items()})
    with pytest.raises(ValueError) as caught:
        read_dump(tmp_path / "d.npz", model.config)
    assert message in str(caught.value) and "d.npz" in str(caught.value)


def test_files_that_are_no_dumps(tmp_path, model):
    config = model.config
    with pytest.raises(ValueError, match="no such file"):
        read_dump(tmp_path / "missing.npz", config)
    for name, content in {
        "text.npz": b"hello",
        "short.safetensors": struct.pack("<Q", 10**9),
        "pickle.npz": None,
    }.items():
        path = tmp_path / name
        if content is None:
            np.savez(path, input_ids=np.array([{"a": 1}], dtype=object))
        else:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=r"safetensors|npz"):
            read_dump(path, config)
    np.savez(tmp_path / "none.npz", logits=np.zeros(3))
    with pytest.raises(ValueError, match="no tensor 'input_ids'"):
        read_dump(tmp_path / "none.npz", config)
    np.savez(tmp_path / "odd.npz", dtype=np.array("float7"), input_ids=np.array([[1]]))
    with pytest.raises(ValueError, match="metadata dtype is 'float7'"):
        read_dump(tmp_path / "odd.npz", config)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize(
    "dtype", ["int64", "bool", "float7", "complex64", "uint8", "float", "Tensor", "", "nn"]
)
def test_the_dtype_of_the_forward_is_a_floating_one(tmp_path, model, dtype, suffix):
    path = tmp_path / f"d{suffix}"
    if suffix == ".npz":
        np.savez(path, dtype=np.array(dtype), input_ids=np.array([[1]]))
    else:
        save_file({"input_ids": torch.tensor([[1]])}, path, {"dtype": dtype})
    with pytest.raises(ValueError, match=f"metadata dtype is '{dtype}', expected one of float32"):
        read_dump(path, model.config)


def test_damaged_npz_files_are_refused(tmp_path, model):
    """Any bit changed, any cut, in packed and unpacked ones; and what numpy has no words for."""
    arrays = {k: v.numpy() for k, v in small(model).items()}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "d.npz", **arrays)
        intact = (tmp_path / "d.npz").read_bytes()
        for place in [*range(0, len(intact), max(1, len(intact) // 150)), len(intact) - 1]:
            flipped = bytes([intact[place] ^ 0x55])
            for damaged in (intact[:place], intact[:place] + flipped + intact[place + 1 :]):
                (tmp_path / "d.npz").write_bytes(damaged)
                with contextlib.suppress(ValueError):
                    read_dump(tmp_path / "d.npz", model.config)
    header = b"{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000, 1000000), }"
    claims_much = b"\x93NUMPY\1\0v\0" + header.ljust(117) + b"\n"
    for member in (claims_much, b"hello"):
        with zipfile.ZipFile(tmp_path / "d.npz", "w") as file:
            file.writestr("input_ids.npy", member)
        with pytest.raises(ValueError, match="not a readable npz file"):
            read_dump(tmp_path / "d.npz", model.config)


def test_a_broken_deflate_is_refused(tmp_path, model):
    """zlib has an exception of its own."""
    with zipfile.ZipFile(tmp_path / "d.npz", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("input_ids.npy", bytes(range(256)) * 40)
        start = file.fp.tell()
    content = (tmp_path / "d.npz").read_bytes()
    begin = 30 + len("input_ids.npy")
    damaged = content[:begin] + b"\xff" * (start - begin) + content[start:]
    (tmp_path / "d.npz").write_bytes(damaged)
    with pytest.raises(ValueError, match="not a readable npz file"):
        read_dump(tmp_path / "d.npz", model.config)


def test_zeros_packed_to_fill_the_memory_are_refused(tmp_path, model):
    np.savez_compressed(tmp_path / "d.npz", input_ids=np.zeros((1, 2**23 + 1), dtype=np.int64))
    with pytest.raises(ValueError, match="bytes are packed into"):
        read_dump(tmp_path / "d.npz", model.config)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_places_that_cannot_be_written_or_read(tmp_path, model, suffix):
    dump = Dump(Inputs(random_ids(model.config, 1, 3)), {})
    with pytest.raises(FileNotFoundError, match="absent"):
        write_dump(tmp_path / "absent" / f"d{suffix}", dump)
    os.mkfifo(tmp_path / f"pipe{suffix}")
    with pytest.raises(ValueError, match="is a pipe, expected a regular file"):
        read_dump(tmp_path / f"pipe{suffix}", model.config)
    with pytest.raises(ValueError, match="is a device, expected a regular file"):
        read_dump("/dev/zero", model.config)


def test_the_command_says_where_it_cannot_write(tmp_path, capsys):
    out = str(tmp_path / "absent" / "x.safetensors")
    options = ["--dtype", "float32", "--layers", "0", "--paths", "prefill"]
    assert main(["parity", "--write-dump", out, *options]) == 2
    printed = capsys.readouterr()
    assert (
        str(tmp_path / "absent") in printed.err and printed.err.count("\n") == 1 and not printed.out
    )


def test_a_name_without_a_known_suffix_leaves_nothing(tmp_path, model):
    ids = random_ids(model.config, 1, 3)
    with pytest.raises(ValueError, match="ends in"):
        write_dump(tmp_path / "d.pt", Dump(Inputs(ids), {}))
    assert not list(tmp_path.iterdir())


def test_safetensors_metadata_is_plain(tmp_path, model):
    """Readable by other programs: the header's own metadata."""
    ids = random_ids(model.config, 1, 3)
    tensors = {"logits": torch.zeros(1, 3, 97, dtype=torch.bfloat16)}
    write_dump(tmp_path / "d.safetensors", Dump(Inputs(ids), tensors, torch.bfloat16, "x"))
    raw = (tmp_path / "d.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    assert header["__metadata__"] == {"dtype": "bfloat16", "source": "x"}
    assert header["logits"]["dtype"] == "BF16"


def test_the_layout_of_a_full_mask_is_left_alone():
    tensor = torch.arange(24.0).view(2, 3, 4)
    assert in_layout("residual.in", tensor, torch.ones(2, 3, dtype=torch.bool)) is tensor
    moved = in_layout(
        "self_attn.rope.q", tensor.view(2, 1, 3, 4), mask_of(torch.zeros(2, 5), (2, 3), (0, 2))
    )
    assert moved.shape == (2, 1, 5, 4)
    assert torch.equal(moved[0, 0, 2:], tensor[0]) and torch.equal(moved[1, 0, :2], tensor[1, :2])
    assert not moved[0, 0, :2].any() and not moved[1, 0, 2:].any()
