"""Loading: bits, dtypes, tied heads, memory, and what happens on the way."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from checkpoint.tiny_checkpoints import (
    assert_same_weights,
    needs_proc,
    peak_growth,
    write_checkpoint,
)
from models import load, make_config, make_model
from safetensors.torch import load_file, save_file

from falcon_h1r import FalconH1Config
from falcon_h1r.checkpoint import (
    CheckpointError,
    inspect,
    read_generation_config,
)
from falcon_h1r.ops import REFERENCE, TORCH

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def dtype_id(dtype):
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_same_dtype_is_bit_exact(layout, model, request):
    loaded = load(request.getfixturevalue(layout), dtype=torch.bfloat16)
    assert_same_weights(loaded, model.state_dict())
    assert not loaded.training
    assert loaded.source == request.getfixturevalue(layout)
    assert all(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("stored", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("wanted", DTYPES, ids=dtype_id)
def test_dtype_is_converted_on_the_way(stored, wanted, config, tmp_path):
    tensors = {k: v.to(stored) for k, v in make_model(config).state_dict().items()}
    folder = write_checkpoint(tmp_path / "c", make_model(config))
    save_file(tensors, folder / "model.safetensors")
    wide = torch.promote_types(wanted, torch.float32)
    expected = {
        name: tensor.to(wide if name.endswith(("A_log", ".D", "dt_bias")) else wanted)
        for name, tensor in tensors.items()
    }
    assert_same_weights(load(folder, dtype=wanted), expected)


def test_conversion_is_right_across_pieces(config, tmp_path, monkeypatch):
    """A tensor larger than the staging buffer, whose size is no multiple of the buffer's."""
    monkeypatch.setattr("falcon_h1r.checkpoint.loader._PIECE", 100)
    model = make_model(config)
    folder = write_checkpoint(tmp_path / "c", model)
    assert_same_weights(load(folder, dtype=torch.float32), model.state_dict())
    expected = {name: t.double() for name, t in model.state_dict().items()}
    assert_same_weights(load(folder, dtype=torch.float64), expected)


def test_large_tensors_and_large_reads(config, tmp_path, monkeypatch):
    """The huge-page path: tensors of 2 MiB and more, one of them no multiple of a page."""
    model = make_model(make_config(vocab_size=70_001), dtype=torch.bfloat16)
    folder = write_checkpoint(tmp_path / "c", model)
    loaded = load(folder)
    assert_same_weights(loaded, model.state_dict())
    loaded(torch.tensor([[70_000, 3]])).sum().backward()
    assert loaded.lm_head.weight.grad is not None


def test_ops_and_device_reach_the_model(single):
    table = TORCH._replace(ssd_scan=REFERENCE.ssd_scan)
    assert load(single, ops=table).ops is table
    assert load(single, device=torch.device("cpu")).device.type == "cpu"


def test_logits_are_those_of_the_saved_model(config, tmp_path):
    model = make_model(config)
    ids = torch.arange(9)[None]
    loaded = load(write_checkpoint(tmp_path / "c", model, shards=2), dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(loaded(ids), model(ids))


def test_weights_are_private_copies(single, model):
    """Overwriting the file in place neither changes nor crashes a loaded model, nor the reverse."""
    loaded = load(single)
    file = single / "model.safetensors"
    before = file.read_bytes()
    file.write_bytes(b"\0" * file.stat().st_size)
    assert_same_weights(loaded, model.state_dict())
    file.write_bytes(before)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    assert file.read_bytes() == before


def test_tied_model_without_and_with_a_copy_of_the_head(tmp_path):
    model = make_model(make_config(tie_word_embeddings=True), dtype=torch.bfloat16)
    folder = write_checkpoint(tmp_path / "c", model)
    assert_same_weights(load(folder), model.state_dict())

    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    copy = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(tensors | copy, folder / "model.safetensors")
    assert_same_weights(load(folder), model.state_dict())


@pytest.mark.parametrize("change", ["value", "dtype", "shape"])
def test_tied_model_with_another_head_is_refused(change, tmp_path):
    model = make_model(make_config(tie_word_embeddings=True), dtype=torch.bfloat16)
    folder = write_checkpoint(tmp_path / "c", model)
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    if change == "value":
        head[-1, -1] += 1
    head = {"value": head, "dtype": head.float(), "shape": head[:-1].clone()}[change]
    save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        load(folder)
    for part in (str(folder / "model.safetensors"), "'lm_head.weight'", "tie_word_embeddings"):
        assert part in str(error.value)


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_progress_counts_every_byte_once(layout, request):
    folder, calls = request.getfixturevalue(layout), []
    load(folder, dtype=torch.float32, progress=lambda *call: calls.append(call))
    sizes = {info.name: info.nbytes for info in inspect(folder)}
    total = sum(sizes.values())
    assert {name for _, _, name in calls} == set(sizes) and len(calls) == len(sizes)
    assert [all_bytes for _, all_bytes, _ in calls] == [total] * len(calls)
    done = 0
    for read, _, name in calls:
        done += sizes[name]
        assert read == done


def test_an_error_in_the_callback_ends_the_loading(single):
    def stop(done, total, name):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(single, progress=stop)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_check_refuses_non_finite_values(value, single, monkeypatch):
    monkeypatch.setattr("falcon_h1r.checkpoint.loader._PIECE", 100)  # not in the first piece
    file = single / "model.safetensors"
    name = "model.layers.1.mamba.out_proj.weight"
    tensors = load_file(file)
    tensors[name][3, 5] = value
    save_file(tensors, file)
    load(single)
    with pytest.raises(CheckpointError) as error:
        load(single, check=True)
    columns = tensors[name].shape[1]
    for part in (str(file), name, str(value), f"element {3 * columns + 5}", "finite"):
        assert part in str(error.value)


def test_check_refuses_overflow_of_the_conversion(config, tmp_path):
    model = make_model(config)
    with torch.no_grad():
        model.lm_head.weight[0, 7] = 1e6
    folder = write_checkpoint(tmp_path / "c", model)
    load(folder, dtype=torch.bfloat16, check=True)
    with pytest.raises(
        CheckpointError, match=r"lm_head.weight.*inf at element 7.*float32.*float16"
    ):
        load(folder, dtype=torch.float16, check=True)


def test_nothing_is_ever_unpickled(single, sharded, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    for module, name in [
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "Unpickler"),
        (torch, "load"),
        (torch.serialization, "load"),
    ]:
        monkeypatch.setattr(module, name, refuse)
    load(single)
    load(sharded)
    for path in single.glob("*.safetensors"):
        path.rename(single / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as error:
        load(single)
    for part in (str(single), "pytorch_model.bin", "pickle", "model.safetensors"):
        assert part in str(error.value)


@needs_proc
@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float32], ids=dtype_id)
def test_peak_memory(wanted, tmp_path):
    """The peak is the weights plus the staging buffers: no second copy, no pages of the file."""
    config = make_config(vocab_size=400_000, tie_word_embeddings=True)
    layers = make_model(make_config(tie_word_embeddings=True), dtype=torch.bfloat16)
    tensors = layers.state_dict()
    tensors["model.embed_tokens.weight"] = torch.ones(400_000, 48, dtype=torch.bfloat16)
    folder = write_checkpoint(tmp_path / "c", layers)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    save_file(tensors, folder / "model.safetensors")
    del tensors, layers
    load(folder, dtype=wanted)

    with peak_growth() as grown:
        loaded = load(folder, dtype=wanted)
    weights = sum(parameter.nbytes for parameter in loaded.parameters())
    staging = 0 if wanted == torch.bfloat16 else 1 << 24
    assert weights > 36 << 20
    assert grown() < 1.10 * weights + staging


def test_inspect_reads_headers_only(sharded, model):
    rows = inspect(sharded)
    expected = model.state_dict()
    assert {name: (shape, dtype, nbytes) for name, shape, dtype, _, nbytes in rows} == {
        name: (tuple(t.shape), t.dtype, t.nbytes) for name, t in expected.items()
    }
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert {row.name: row.file for row in rows} == index["weight_map"]


def test_config_and_generation_config(single, config):
    assert FalconH1Config.from_pretrained(single) == config
    assert read_generation_config(single) == {"eos_token_id": [11, 28]}
    (single / "generation_config.json").write_text('{"eos_token_id": [11, 60]}')
    assert load(single).eos_token_ids == (11, 28, 60)
    (single / "generation_config.json").write_text('{"eos_token_id": 61}')
    assert load(single).eos_token_ids == (11, 28, 61)
    (single / "generation_config.json").write_text('{"eos_token_id": ["60"]}')
    with pytest.raises(CheckpointError, match=r"eos_token_id is .*60.*, expected a token id"):
        load(single)
    (single / "generation_config.json").unlink()
    assert read_generation_config(single) == {} and load(single).eos_token_ids == (11, 28)
    (single / "generation_config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"generation_config.json.*list, expected an object"):
        read_generation_config(single)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, "float", "torch.float32", 16])
def test_other_dtypes_are_refused(dtype, single):
    with pytest.raises(CheckpointError, match=r"dtype is .*, expected one of float32"):
        load(single, dtype=dtype)


@pytest.mark.parametrize("device", ["meta", "warp", "cuda:99", None, 3.5])
def test_unusable_devices_are_refused(device, single):
    with pytest.raises(CheckpointError, match="device"):
        load(single, device=device)
