"""Files that somebody else made: read, or refused in one line; soon, and in little memory.

The quick set runs some hundred cases of each kind; `-m slow` runs 10,000 of each.
"""

from __future__ import annotations

import json
import random
import zipfile

import numpy as np
import pytest
import torch
from hostile import change_bytes, change_json, count_outcomes
from models import load, make_config, make_model, random_ids
from safetensors.torch import save, save_file

from falcon_h1r import FalconH1Config, cache_file
from falcon_h1r.cache import TENSORS, Cache
from falcon_h1r.checkpoint import (
    end_token_ids,
    inspect,
    read_generation_config,
    sampling_defaults,
)
from falcon_h1r.checkpoint import save as save_checkpoint
from falcon_h1r.config import ignored_keys
from falcon_h1r.generation import SamplingParams
from falcon_h1r.study.budget import read_budget
from falcon_h1r.study.dump import read_dump
from falcon_h1r.tensor_file import DTYPES, read_header, read_tensors

QUICK, SLOW = 60, 2_000
KINDS = {}


def kind(function):
    """A fuzzer: function(folder, model) gives case(draw), which reads a changed file."""
    KINDS[function.__name__] = function
    return function


@pytest.fixture(scope="module")
def model():
    return make_model(make_config(num_hidden_layers=1))


def check(name, cases, model, folder, capsys):
    outcomes = count_outcomes(name, cases, KINDS[name](folder, model), folder)
    assert outcomes.total() == cases and outcomes["refused"] > cases // 5
    with capsys.disabled():
        print(f"\n{name}: {cases} cases, {outcomes['read']} read, {outcomes['refused']} refused")


def changed_json(draw: random.Random, values) -> bytes:
    if draw.random() < 0.7:
        return change_json(draw, values).encode()
    return change_bytes(draw, json.dumps(values).encode())


@kind
def config(folder, model):
    values, path = model.config.to_dict(), folder / "config.json"

    def case(draw):
        path.write_bytes(changed_json(draw, values))
        found = FalconH1Config.from_pretrained(folder)
        assert FalconH1Config.from_dict(json.loads(json.dumps(found.to_dict()))) == found
        hash(found)

    return case


@kind
def config_values(folder, model):
    """Values that no file can hold reach `from_dict` too."""
    pool = [10**5000, float("nan"), {1: 2}, (1,), b"x", object, [[]] * 3, "x" * 10**5, {1, 2}]
    names = [*model.config.to_dict(), "rope_parameters", "time_step_limit", "other", 5]

    def case(draw):
        values = {**model.config.to_dict(), draw.choice(names): draw.choice(pool)}
        try:
            FalconH1Config.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{folder} {error}") from error
        ignored_keys(values)

    return case


@kind
def generation_config(folder, model):
    values = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.0}
    values |= {"repetition_penalty": 1.0, "max_new_tokens": 9, "eos_token_id": [11, 228]}
    path = folder / "generation_config.json"

    def case(draw):
        path.write_bytes(changed_json(draw, values))
        stored = read_generation_config(folder)
        end_token_ids(model.config, stored, path)
        found = sampling_defaults(stored, path)
        try:
            SamplingParams(**found)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    return case


def header_and_data(raw: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def changed_tensors(draw: random.Random, raw: bytes) -> bytes:
    """A safetensors file with another header or other bytes."""
    header, data = header_and_data(raw)
    if draw.random() < 0.5:
        return change_bytes(draw, raw, first=len(raw) - len(data))
    text = change_json(draw, header).encode()
    return len(text).to_bytes(8, "little") + text + data


@kind
def weights(folder, model):
    model.save_pretrained(folder / "intact")
    raw = (folder / "intact" / "model.safetensors").read_bytes()
    config = (folder / "intact" / "config.json").read_bytes()
    (folder / "c").mkdir()
    (folder / "c" / "config.json").write_bytes(config)

    def case(draw):
        (folder / "c" / "model.safetensors").write_bytes(changed_tensors(draw, raw))
        inspect(folder / "c")
        load(folder / "c")

    return case


@kind
def index(folder, model):
    save_checkpoint(model, folder / "c", max_shard_bytes=40_000)
    path = folder / "c" / "model.safetensors.index.json"
    values = json.loads(path.read_text())

    def case(draw):
        path.write_bytes(changed_json(draw, values))
        inspect(folder / "c")

    return case


@kind
def header(folder, model):
    """Any tensors of any dtype that the format has."""
    tensors = {f"t{n}": torch.zeros(3, n, dtype=dtype) for n, dtype in enumerate(DTYPES.values())}
    raw = save(tensors | {"": torch.tensor(1.0)}, {"a": "b"})

    def case(draw):
        (folder / "f").write_bytes(changed_tensors(draw, raw))
        found = read_header(folder / "f")
        read = read_tensors(found, folder / "f")
        assert [tuple(t.shape) for t in read.values()] == [e.shape for e in found.tensors]

    return case


def changed_tensor(draw: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    """Another shape, dtype or value; of lengths, values at and beyond the bounds."""
    pick = draw.randrange(7)
    if pick == 0:
        return tensor.flatten().clone()
    if pick == 1:
        return tensor.flatten()[:1].reshape(()).clone()
    if pick == 2:
        return tensor[: draw.randrange(len(tensor) + 1)].clone()
    if pick == 3:
        return tensor.to(draw.choice([*DTYPES.values()]))
    if pick == 4:
        return tensor[None].clone()
    if pick == 5 and tensor.dim() > 1:
        return tensor.transpose(0, 1).contiguous()
    out = tensor.clone()
    bounds = [-(2**63), -5, -1, 0, 1, 3, 4, 5, 2**31, 2**63 - 1]
    value = draw.choice(bounds if not out.is_floating_point() else [float("nan"), 1e30, -0.0])
    out.view(-1)[draw.randrange(out.numel())] = value
    return out


@kind
def cache(folder, model):
    made = model.new_cache(2, 4)
    made.lengths += torch.tensor([3, 4])
    made.save(folder / "intact", model)
    raw = (folder / "intact").read_bytes()
    tensors = {name: getattr(made, name) for name in (*TENSORS, "lengths")}
    mark = cache_file.fingerprint(model)

    def case(draw):
        if draw.random() < 0.5:
            (folder / "c").write_bytes(changed_tensors(draw, raw))
        else:  # with a checksum that fits
            name = draw.choice([*tensors, "lengths"])
            other = tensors | {name: changed_tensor(draw, tensors[name])}
            content = cache_file._sha256(other)
            metadata = {"format": cache_file.FORMAT, "fingerprint": mark, "content": content}
            save_file({k: v.contiguous() for k, v in other.items()}, folder / "c", metadata)
        loaded = Cache.load(folder / "c", model)
        loaded.check(model.config, 2, model.dtype, model.device)
        assert 0 <= int(loaded.lengths.min()) <= int(loaded.lengths.max()) <= loaded.max_length

    return case


def dump_tensors(model) -> dict[str, torch.Tensor]:
    return {
        "input_ids": random_ids(model.config, 2, 5),
        "attention_mask": torch.ones(2, 5, dtype=torch.int64),
        "logits": torch.zeros(2, 5, model.config.vocab_size),
        "layers.0.residual.in": torch.zeros(2, 5, model.config.hidden_size),
    }


@kind
def dump_safetensors(folder, model):
    tensors, path = dump_tensors(model), folder / "d.safetensors"
    raw = save(tensors, {"dtype": "bfloat16", "source": "x"})

    def case(draw):
        if draw.random() < 0.5:
            path.write_bytes(changed_tensors(draw, raw))
        else:
            name = draw.choice(list(tensors))
            dtype = draw.choice(["int64", "float32", "", "Tensor", "bool"])
            save_file(tensors | {name: changed_tensor(draw, tensors[name])}, path, {"dtype": dtype})
        read_dump(path, model.config)

    return case


@kind
def dump_npz(folder, model):
    arrays, path = {k: v.numpy() for k, v in dump_tensors(model).items()}, folder / "d.npz"
    raws = []
    for write in (np.savez, np.savez_compressed):
        write(path, **arrays, dtype=np.array("bfloat16"))
        raws.append(path.read_bytes())

    def case(draw):
        raw = draw.choice(raws)
        if draw.random() < 0.6:
            path.write_bytes(change_bytes(draw, raw, first=draw.choice([200, 0])))
        else:  # a whole archive around damaged arrays
            with zipfile.ZipFile(path, "w", draw.choice([0, zipfile.ZIP_DEFLATED])) as file:
                for name, array in arrays.items():
                    np.save(folder / "a.npy", array)
                    content = (folder / "a.npy").read_bytes()
                    if draw.random() < 0.4:
                        content = change_bytes(draw, content, first=128)
                    file.writestr(f"{name}.npy", content)
        read_dump(path, model.config)

    return case


@kind
def budget(folder, model):
    entries = {"float32": {"prefill": {"logits": {"tolerance": 1e-6, "torch": [0.0] * 5}}}}
    values = {"format": "falcon_h1r.budget", "model": "m", "fingerprint": "f", "versions": {}}
    values["entries"] = entries

    def case(draw):
        (folder / "b.json").write_bytes(changed_json(draw, values))
        found = read_budget(folder / "b.json")
        found.tolerance("float32", "prefill", "logits")
        found.parts("float32", "prefill", "logits", "torch")
        found.covers(["float32"], ["decode"])

    return case


@pytest.mark.parametrize("name", KINDS)
def test_some_files(name, model, tmp_path, capsys):
    check(name, QUICK, model, tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_many_files(name, model, tmp_path, capsys):
    check(name, SLOW, model, tmp_path, capsys)
