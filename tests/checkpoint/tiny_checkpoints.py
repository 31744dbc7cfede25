"""Small checkpoints, written by the safetensors package so that they do not depend on our saver."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from falcon_h1r import FalconH1ForCausalLM


def write_checkpoint(folder: Path, model: FalconH1ForCausalLM, shards: int = 1) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    (folder / "generation_config.json").write_text('{"eos_token_id": [11, 28]}')
    (folder / "tokenizer.json").write_text('{"made": "up"}')
    tensors = model.state_dict()
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = list(tensors)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read_raw(path: Path) -> tuple[dict, bytes]:
    """Header and data of a safetensors file."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_raw(path: Path, header, data: bytes) -> None:
    """Write a safetensors file whose header may be nonsense: an object, or the header's bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def assert_same_weights(model, expected: dict[str, torch.Tensor]) -> None:
    """Names, dtypes and bits."""
    found = model.state_dict()
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        bits = [t.contiguous().view(-1).view(torch.uint8) for t in (found[name], tensor)]
        assert torch.equal(*bits), name


needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self")


@contextlib.contextmanager
def peak_growth():
    """Gives a function: by how many bytes the resident memory rose above that of the start."""

    def status(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to now
    before = status("VmRSS")
    yield lambda: status("VmHWM") - before
