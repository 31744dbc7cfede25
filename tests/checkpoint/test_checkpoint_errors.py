"""Every damaged or foreign checkpoint is refused with one line that says what is wrong where."""

from __future__ import annotations

import gzip
import json
import os
import pickle

import pytest
import torch
from checkpoint.tiny_checkpoints import read_raw, write_raw
from models import load
from safetensors.torch import load_file, save_file

from falcon_h1r import ConfigError
from falcon_h1r.checkpoint import CheckpointError, inspect

A = "model.layers.0.mamba.A_log"
HEAD = "lm_head.weight"
UP = "model.layers.1.feed_forward.up_proj.weight"


def refusal(folder, error=CheckpointError) -> str:
    with pytest.raises(error) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    # The folder's name is that of the test case: it must not pass for part of the explanation.
    return message.replace(str(folder), "FOLDER")


def tensors_case(change):
    """Damage done to the tensors of an otherwise well-formed file."""

    def damage(folder):
        file = folder / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return damage


def header_case(change):
    """Damage done to the header: `change` may edit the object, or return a replacement for it."""

    def damage(folder):
        file = folder / "model.safetensors"
        header, data = read_raw(file)
        replaced = change(header)
        write_raw(file, header if replaced is None else replaced, data)

    return damage


def bytes_case(change):
    def damage(folder):
        file = folder / "model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return damage


def edit(name, **values):
    return header_case(lambda header: header[name].update(values))


def gap(folder):
    """Eight bytes between the first tensor and the rest that belong to none."""
    header, data = read_raw(folder / "model.safetensors")
    ends = [value["data_offsets"][1] for name, value in header.items() if name != "__metadata__"]
    for name, value in header.items():
        if name != "__metadata__" and value["data_offsets"][0] >= min(ends):
            value["data_offsets"] = [offset + 8 for offset in value["data_offsets"]]
    write_raw(
        folder / "model.safetensors", header, data[: min(ends)] + bytes(8) + data[min(ends) :]
    )


def overlap(header):
    first, second = sorted(
        ("model.layers.0.mamba.D", A), key=lambda name: header[name]["data_offsets"]
    )
    header[second]["data_offsets"] = header[first]["data_offsets"]


def repeat_key(header):
    text = json.dumps(header)
    return (text[:-1] + f', "{HEAD}": {json.dumps(header[HEAD])}}}').encode()


FILE = "model.safetensors"
SINGLE_FILE = {
    "missing": (
        tensors_case(lambda t: t.pop(HEAD)),
        ["1 missing", "lm_head.weight [97, 48]"],
    ),
    "unexpected": (
        tensors_case(lambda t: t.update(extra=torch.zeros(3, 2))),
        ["1 unexpected", "'extra' [3, 2]", FILE],
    ),
    "misshapen": (
        tensors_case(lambda t: t.update({UP: torch.zeros(48, 80, dtype=torch.bfloat16)})),
        ["1 of another shape", UP, FILE, "found [48, 80]", "expected [80, 48]"],
    ),
    "all three at once": (
        tensors_case(
            lambda t: (t.pop(HEAD), t.update({"extra": torch.zeros(1), A: torch.zeros(7)}))
        ),
        ["1 missing", HEAD, "1 unexpected", "'extra'", "1 of another shape", "[7]", "[4]"],
    ),
    "many missing": (
        tensors_case(lambda t: [t.pop(n) for n in list(t) if "layers" in n]),
        ["missing", "and 44 more"],
    ),
    "no file": (lambda f: (f / FILE).unlink(), ["holds no weights", FILE, "index.json"]),
    "empty file": (bytes_case(lambda b: b""), [FILE, "0 bytes", "too short"]),
    "seven bytes": (bytes_case(lambda b: b[:7]), [FILE, "7 bytes", "too short"]),
    "truncated header": (bytes_case(lambda b: b[:500]), [FILE, "header length", "500 bytes"]),
    "truncated data": (bytes_case(lambda b: b[:-1]), [FILE, "tensor", "truncated"]),
    "too long": (bytes_case(lambda b: b + b"\0"), [FILE, "header accounts for"]),
    "header beyond file": (
        bytes_case(lambda b: (1 << 40).to_bytes(8, "little") + b[8:]),
        [FILE, f"header length is {1 << 40}", "at most"],
    ),
    "header length of all ones": (
        bytes_case(lambda b: b"\xff" * 8 + b[8:]),
        [FILE, f"header length is {2**64 - 1}"],
    ),
    "header not JSON": (header_case(lambda h: b"{not json}"), [FILE, "header", "not valid JSON"]),
    "header not UTF-8": (header_case(lambda h: b'{"\xff": 1}'), [FILE, "not valid JSON", "utf-8"]),
    "header not an object": (header_case(lambda h: b"[1, 2]"), [FILE, "JSON list", "object"]),
    "header nested deeply": (header_case(lambda h: b"[" * 200_000), [FILE, "not valid JSON"]),
    "repeated tensor": (header_case(repeat_key), [FILE, HEAD, "occurs twice"]),
    "metadata of numbers": (
        header_case(lambda h: h.update(__metadata__={"format": 1})),
        [FILE, "__metadata__", "strings"],
    ),
    "entry not an object": (
        header_case(lambda h: h.update({HEAD: 3})),
        [FILE, HEAD, "dtype, shape and data_offsets"],
    ),
    "entry without dtype": (header_case(lambda h: h[HEAD].pop("dtype") and None), [FILE, HEAD]),
    "entry with more": (edit(HEAD, scale=1), [FILE, HEAD, "exactly"]),
    "FP8": (edit(HEAD, dtype="F8_E4M3"), [FILE, HEAD, "'F8_E4M3'", "BF16", "quantised"]),
    "int8": (edit(HEAD, dtype="I8"), [FILE, HEAD, "'I8'", "F64, F32, BF16, F16"]),
    "dtype of another type": (edit(HEAD, dtype=["BF16"]), [FILE, HEAD, "['BF16']"]),
    "wider dtype": (edit(HEAD, dtype="F32"), [FILE, HEAD, "takes 18624 bytes", "hold 9312"]),
    "negative size": (edit(HEAD, shape=[-97, -48]), [FILE, HEAD, "[-97, -48]"]),
    "fractional size": (edit(HEAD, shape=[97.0, 48]), [FILE, HEAD, "[97.0, 48]"]),
    "boolean size": (edit(HEAD, shape=[True, 97, 48]), [FILE, HEAD, "True"]),
    "huge size": (edit(HEAD, shape=[2**62, 2**62]), [FILE, HEAD, "hold 9312"]),
    "shape not a list": (edit(HEAD, shape="97x48"), [FILE, HEAD, "'97x48'"]),
    "one offset": (edit(HEAD, data_offsets=[0]), [FILE, HEAD, "[0]", "begin, end"]),
    "reversed offsets": (edit(HEAD, data_offsets=[9312, 0]), [FILE, HEAD, "[9312, 0]"]),
    "offsets beyond file": (
        edit(HEAD, data_offsets=[10**9, 10**9 + 9312]),
        [FILE, HEAD, "ends at byte 1000", "but the file has"],
    ),
    "gap": (gap, [FILE, "leaves a gap", "starts at byte", "expected"]),
    "overlap": (header_case(overlap), [FILE, "overlaps", "starts at byte", "expected"]),
    "both layouts": (
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        ["holds both", FILE, "index.json"],
    ),
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json is missing"]),
    "config not JSON": (
        lambda f: (f / "config.json").write_text("{"),
        ["config.json", "not valid JSON"],
    ),
    "config a folder": (
        lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()),
        ["config.json", "directory"],
    ),
}


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 15171297472\n"


def torch_saved(folder):
    torch.save({"a": torch.zeros(2)}, folder / FILE)


def adapter(folder):
    for name in ("config.json", FILE):
        (folder / name).unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "tiiuae/x"}')
    (folder / "adapter_model.safetensors").touch()


FOREIGN = {
    "LFS pointer": (bytes_case(lambda b: LFS), [FILE, "git-lfs pointer", "git lfs pull"]),
    "GGUF": (bytes_case(lambda b: b"GGUF\3\0\0\0" + b), [FILE, "GGUF", "llama.cpp"]),
    "HTML": (bytes_case(lambda b: b"\n<!DOCTYPE html><html>404"), [FILE, "HTML", "download"]),
    "torch.save": (torch_saved, [FILE, "torch.save", "nothing is ever unpickled"]),
    "pickle": (bytes_case(lambda b: pickle.dumps({"a": 1})), [FILE, "a pickle"]),
    "old pickle": (bytes_case(lambda b: pickle.dumps({"a": 1}, 2)), [FILE, "a pickle"]),
    "gzip": (bytes_case(gzip.compress), [FILE, "a gzip archive"]),
    "zeros": (bytes_case(lambda b: bytes(len(b))), [FILE, "zero bytes", "unfinished download"]),
    "LFS config": (
        lambda f: (f / "config.json").write_bytes(LFS),
        ["config.json is a git-lfs pointer"],
    ),
    "HTML config": (
        lambda f: (f / "config.json").write_text("<html>"),
        ["config.json is an HTML"],
    ),
    "adapter": (adapter, ["config.json is missing", "LoRA adapter of 'tiiuae/x'", "merge"]),
    "adapter with a config": (
        lambda f: (f / FILE).rename(f / "adapter_model.safetensors"),
        ["holds a LoRA adapter: merge", FILE],
    ),
    "adapter's tensors": (
        tensors_case(lambda t: t.update({"layers.0.q_proj.lora_A.weight": torch.zeros(1)})),
        ["1 unexpected", "LoRA adapter", "merge"],
    ),
    "GGUF folder": (
        lambda f: (f / FILE).rename(f / "model-Q4_K_M.gguf"),
        ["holds GGUF files (model-Q4_K_M.gguf), which llama.cpp reads", FILE],
    ),
    "config a pipe": (
        lambda f: ((f / "config.json").unlink(), os.mkfifo(f / "config.json")),
        ["config.json is a pipe, expected a regular file"],
    ),
    "config without an end": (
        lambda f: ((f / "config.json").unlink(), (f / "config.json").symlink_to("/dev/zero")),
        ["config.json is a device, expected a regular file"],
    ),
    "long config": (
        lambda f: os.truncate(f / "config.json", 2**40),
        ["config.json", "more than 16777216 bytes"],
    ),
    "weights a pipe": (
        lambda f: ((f / FILE).unlink(), os.mkfifo(f / FILE)),
        [FILE, "is a pipe, expected a regular file"],
    ),
    "weights a broken link": (
        lambda f: ((f / FILE).unlink(), (f / FILE).symlink_to(f / "gone")),
        [f"{FILE} is missing"],
    ),
    "80,000 sizes": (edit(HEAD, shape=[2**62] * 80_000), [FILE, HEAD, "at most 16 sizes"]),
    "17 sizes": (edit(HEAD, shape=[1] * 17), [FILE, HEAD, "at most 16 sizes"]),
    "sizes beyond 64 bits, and 0": (
        edit(HEAD, shape=[2**62, 2**62, 0], data_offsets=[0, 0]),
        [FILE, HEAD, "beyond what a tensor can have"],
    ),
    "long name": (
        header_case(lambda h: h.update({"x" * 10**6: h.pop(HEAD)})),
        [FILE, "a name of 1000000 characters"],
    ),
    "lone surrogate": (
        header_case(lambda h: json.dumps(h).replace(HEAD, r"lm\ud800").encode()),
        [FILE, r"lone surrogate \ud800"],
    ),
}
SINGLE_FILE |= FOREIGN


@pytest.mark.parametrize("start", [LFS, b"GGUF", b"hello"])
def test_a_file_in_place_of_a_folder(start, tmp_path):
    (tmp_path / "m").write_bytes(start)
    message = refusal(tmp_path / "m")
    assert ("git-lfs" in message, "GGUF" in message) == (start == LFS, start == b"GGUF")
    assert "expected the folder that holds config.json" in message


@pytest.mark.parametrize("case", SINGLE_FILE)
def test_single_file(case, single):
    damage, parts = SINGLE_FILE[case]
    damage(single)
    message = refusal(single)
    for part in parts:
        assert part in message, message


def test_file_that_shrinks_while_it_is_read(single, monkeypatch):
    """The header was fine; the data is gone when its turn comes."""
    from falcon_h1r.checkpoint import loader

    read_layout = loader.read_layout

    def read_then_cut(folder):
        entries = read_layout(folder)
        file = folder / FILE
        file.write_bytes(file.read_bytes()[:-10])
        return entries

    monkeypatch.setattr(loader, "read_layout", read_then_cut)
    message = refusal(single)
    assert FILE in message and "tensor" in message and "10 bytes early" in message


def config_case(change):
    def damage(folder):
        file = folder / "config.json"
        values = json.loads(file.read_text())
        change(values)
        file.write_text(json.dumps(values))

    return damage


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda c: c.pop("key_multiplier"), ["missing", "key_multiplier"]),
        (lambda c: c.update(sliding_window=4), ["unknown", "sliding_window"]),
        (lambda c: c.update(quantization_config={"bits": 4}), ["quantization_config"]),
        (lambda c: c.update(model_type="llama"), ["'llama'", "'falcon_h1'"]),
    ],
    ids=["missing key", "unknown key", "quantised", "other architecture"],
)
def test_config_errors_name_the_file(change, parts, single):
    config_case(change)(single)
    message = refusal(single, ConfigError)
    for part in ["FOLDER/config.json", *parts]:
        assert part in message


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000"),
        ({"vocab_size": 10**18}, "no model of these sizes"),
        ({"vocab_size": 10**30}, "no model of these sizes"),
        ({"vocab_size": 98}, "lm_head.weight in model.safetensors: found [97, 48], expected [98"),
    ],
    ids=str,
)
def test_config_of_other_sizes(change, part, single):
    config_case(lambda config: config.update(change))(single)
    assert part in refusal(single)


def index_case(change):
    def damage(folder):
        file = folder / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        change(index["weight_map"])
        file.write_text(json.dumps(index))

    return damage


def shard_case(number, change):
    def damage(folder):
        file = folder / f"model-{number:05d}-of-00003.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return damage


def write_index(text):
    return lambda folder: (folder / "model.safetensors.index.json").write_text(text)


def map_to(file):
    return index_case(lambda m: m.update({HEAD: file}))


INDEX = "model.safetensors.index.json"
SHARD = "model-{}-of-00003.safetensors".format
SHARDED = {
    "absent shard": (
        lambda f: (f / SHARD("00002")).unlink(),
        [INDEX, "do not exist", SHARD("00002")],
    ),
    "absent file named": (
        map_to("model-00009-of-00009.safetensors"),
        [INDEX, "do not exist", "model-00009-of-00009.safetensors"],
    ),
    "no index": (lambda f: (f / INDEX).unlink(), [INDEX, "missing", SHARD("00001")]),
    "index not JSON": (write_index("weight_map"), [INDEX, "not valid JSON"]),
    "index without map": (write_index('{"metadata": {}}'), [INDEX, "weight_map"]),
    "index with empty map": (write_index('{"weight_map": {}}'), [INDEX, "weight_map"]),
    "index with a list": (write_index('{"weight_map": ["a"]}'), [INDEX, "weight_map"]),
    "index repeats a tensor": (
        write_index('{"weight_map": {"a": "b.safetensors", "a": "b.safetensors"}}'),
        [INDEX, "'a'", "twice"],
    ),
    "tensor that its shard lacks": (
        index_case(lambda m: m.update(ghost=SHARD("00001"))),
        [INDEX, "'ghost'", SHARD("00001"), "lacks"],
    ),
    "tensor that the index lacks": (
        index_case(lambda m: m.pop(UP)),
        [INDEX, UP, ".safetensors holds", "does not list"],
    ),
    "tensor in another shard": (
        index_case(
            lambda m: m.update({UP: SHARD("00001") if m[UP] != SHARD("00001") else SHARD("00002")})
        ),
        [INDEX, UP, "holds tensor", "says model-0000"],
    ),
    "tensor twice": (
        lambda f: [
            shard_case(n, lambda t: t.update(twin=torch.zeros(1)))(f)
            or index_case(lambda m: m.update(twin=SHARD("00002")))(f)
            for n in (2, 3)
        ],
        ["'twin'", "held twice", SHARD("00002"), SHARD("00003")],
    ),
    "truncated shard": (
        lambda f: (f / SHARD("00003")).write_bytes((f / SHARD("00003")).read_bytes()[:-4]),
        [SHARD("00003"), "truncated"],
    ),
    "absolute path": (map_to("/etc/model.safetensors"), [INDEX, HEAD, "plain name"]),
    "path upwards": (map_to("../model.safetensors"), [INDEX, HEAD, "'../model.safetensors'"]),
    "path downwards": (map_to("sub/model.safetensors"), [INDEX, HEAD, "plain name"]),
    "Windows path": (map_to("..\\model.safetensors"), [INDEX, HEAD, "plain name"]),
    "NUL in path": (map_to("a\0.safetensors"), [INDEX, HEAD, "plain name"]),
    "pickle in index": (map_to("pytorch_model.bin"), [INDEX, HEAD, "pytorch_model.bin"]),
    "file not a string": (map_to(3), [INDEX, HEAD, "3"]),
    "overlong file name": (map_to("a" * 5000 + ".safetensors"), [INDEX, "do not exist"]),
}


@pytest.mark.parametrize("case", SHARDED)
def test_sharded(case, sharded):
    damage, parts = SHARDED[case]
    damage(sharded)
    message = refusal(sharded)
    for part in parts:
        assert part in message, message


def test_shards_may_be_links(sharded, tmp_path):
    """The hub's cache is a folder of links to blobs elsewhere: only the name is judged."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(sharded.glob("*.safetensors"))):
        file.rename(blobs / str(number))
        file.symlink_to(blobs / str(number))
    load(sharded)


@pytest.mark.parametrize("case", ["truncated data", "FP8", "overlap", "no file"])
def test_inspect_refuses_what_load_refuses(case, single):
    damage, parts = SINGLE_FILE[case]
    damage(single)
    with pytest.raises(CheckpointError) as error:
        inspect(single)
    for part in parts:
        assert part in str(error.value).replace(str(single), "FOLDER")
