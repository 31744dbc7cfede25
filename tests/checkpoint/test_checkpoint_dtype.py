"""In which dtype a checkpoint is stored, and is loaded where none is given."""

import json
import re

import pytest
import torch
from checkpoint.tiny_checkpoints import assert_same_weights, write_checkpoint
from models import load, make_config, make_model, stream_modules
from safetensors.torch import load_file, save_file
from tiny_cli import run

from falcon_h1r.checkpoint import CheckpointError, stored_dtype
from falcon_h1r.checkpoint.layout import EMBEDDING, FLOAT32_PARAMETERS

NORM = "model.final_layernorm.weight"
STATE = "model.layers.0.mamba.A_log"


def change(folder, **dtypes):
    """Store some tensors in another dtype, or leave them out; names with _ for the dots."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, dtype in dtypes.items():
        tensor = tensors.pop(name)
        if dtype is not None:
            tensors[name] = tensor.to(dtype)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_weights_are_as_they_are_stored(tmp_path, dtype):
    model = make_model(make_config(), dtype=dtype)
    folder = write_checkpoint(tmp_path / "c", model)
    assert stored_dtype(folder) == dtype
    assert_same_weights(load(folder), model.state_dict())
    assert stream_modules(folder).model.dtype == dtype


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({STATE: torch.float32}, torch.bfloat16),
        ({STATE: torch.float64}, torch.bfloat16),
        ({NORM: torch.float32}, torch.float32),
        ({NORM: torch.float16}, torch.float32),
        ({EMBEDDING: torch.float64}, torch.float64),
    ],
    ids=["state", "wider-state", "wider-norm", "neither-is-wider", "wider-embedding"],
)
def test_of_mixed_dtypes_the_one_that_rounds_nothing(single, changes, expected):
    change(single, **changes)
    assert stored_dtype(single) == expected
    loaded = load(single)
    assert loaded.dtype == stream_modules(single).model.dtype == expected
    for name, tensor in load_file(single / "model.safetensors").items():
        if not name.endswith(FLOAT32_PARAMETERS):
            assert torch.equal(loaded.state_dict()[name].double(), tensor.double()), name


def test_a_checkpoint_of_nothing_else_has_the_dtype_of_its_states(tmp_path):
    save_file({STATE: torch.zeros(2)}, tmp_path / "model.safetensors")
    assert stored_dtype(tmp_path) == torch.float32
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="hold no tensors"):
        stored_dtype(tmp_path)


def test_the_parameters_that_do_not_count_are_those_that_a_model_widens(model):
    wide = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.float32}
    assert wide == {name for name in model.state_dict() if name.endswith(FLOAT32_PARAMETERS)}
    assert len(wide) == 3 * model.config.num_hidden_layers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_dtypes_by_name(single, dtype):
    assert load(single, dtype=dtype).dtype == getattr(torch, dtype)
    assert stream_modules(single, dtype=dtype).model.dtype == getattr(torch, dtype)


def test_a_dtype_is_refused_before_anything_is_looked_for():
    with pytest.raises(CheckpointError) as error:
        load("no/such", dtype="half")
    accepted = "one of float32, bfloat16, float16, float64"
    assert str(error.value) == f"dtype is 'half', expected {accepted}"


@pytest.fixture
def without_embedding(tmp_path):
    """A sharded checkpoint whose index and shards lack the embedding; a dump of the whole one."""
    folder = write_checkpoint(tmp_path / "c", make_model(make_config()), shards=2)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    file = folder / content["weight_map"].pop(EMBEDDING)
    index.write_text(json.dumps(content))
    change_file = load_file(file)
    del change_file[EMBEDDING]
    save_file(change_file, file)
    return folder


@pytest.mark.parametrize("command", ["convert", "parity", "doctor"])
def test_a_checkpoint_without_an_embedding_is_refused_in_one_line(
    capsys, tmp_path, without_embedding, command
):
    out = tmp_path / "out"
    argv = {
        "convert": ["convert", without_embedding, "--to", "safetensors", "--out", out],
        "parity": ["parity", "--model", without_embedding],
        "doctor": ["doctor", "--model", without_embedding, "--dump", tmp_path / "d.safetensors"],
    }[command]
    save_file(
        {"input_ids": torch.zeros(1, 3).long(), "logits": torch.zeros(1, 3, 97)},
        tmp_path / "d.safetensors",
    )
    status, printed, err = run(capsys, *argv)
    assert (status, printed) == (2, "") and err.count("\n") == 1 and not out.exists()
    assert re.search(rf"1 missing: {re.escape(EMBEDDING)} \[97, 48\]", err), err
