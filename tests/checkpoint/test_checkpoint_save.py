"""Saving: the released layout, bit-exact, all or nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from checkpoint.tiny_checkpoints import (
    assert_same_weights,
    needs_proc,
    peak_growth,
    read_raw,
    write_checkpoint,
)
from models import load, make_config, make_model
from safetensors import safe_open
from safetensors.torch import load_file

from falcon_h1r import FalconH1ForCausalLM
from falcon_h1r.checkpoint import CheckpointError, read_generation_config, save, saver


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("max_shard_bytes", [5 * 2**30, 20_000, 1])
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_is_bit_exact(dtype, max_shard_bytes, tied, tmp_path):
    config = make_config("all_biases", num_hidden_layers=2, tie_word_embeddings=tied)
    model = make_model(config, dtype=dtype)
    save(model, tmp_path / "c", max_shard_bytes=max_shard_bytes)
    loaded = load(tmp_path / "c", dtype=dtype)
    assert loaded.config == config
    assert_same_weights(loaded, model.state_dict())


def test_single_file_as_the_safetensors_package_sees_it(model, tmp_path):
    save(model, tmp_path / "c")
    assert names(tmp_path / "c") == {"config.json", "generation_config.json", "model.safetensors"}
    file = tmp_path / "c" / "model.safetensors"
    assert_same_weights(model, load_file(file))
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_every_tensor_is_aligned(tmp_path):
    """Readers that map the file cannot view float32 at an odd multiple of two bytes."""
    tensors = {"odd": torch.ones(3, dtype=torch.bfloat16), "wide": torch.ones(2)}
    specs = [saver.Spec(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]
    saver.write_weights(tmp_path, specs, tensors.__getitem__, 1000)
    assert load_file(tmp_path / "model.safetensors")["wide"].tolist() == [1, 1]
    header, _ = read_raw(tmp_path / "model.safetensors")
    assert header["wide"]["data_offsets"][0] % 4 == 0


def test_shards_and_index(model, tmp_path):
    limit = 20_000
    save(model, tmp_path / "c", max_shard_bytes=limit)
    index = json.loads((tmp_path / "c" / "model.safetensors.index.json").read_text())
    tensors = model.state_dict()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert set(index["weight_map"]) == set(tensors)
    files = sorted(path.name for path in (tmp_path / "c").glob("*.safetensors"))
    assert set(files) == set(index["weight_map"].values())
    count = len(files)
    assert count > 2
    assert files == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for file in files:
        held = load_file(tmp_path / "c" / file)
        assert set(held) == {name for name, where in index["weight_map"].items() if where == file}
        assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= limit


def test_config_keeps_multipliers_apart_and_states_the_dtype(model, config, tmp_path):
    save(model, tmp_path / "c")
    stored = json.loads((tmp_path / "c" / "config.json").read_text())
    assert stored["key_multiplier"] == config.key_multiplier
    assert stored["ssm_multipliers"] == list(config.ssm_multipliers)
    assert stored["dtype"] == "bfloat16"
    assert stored["architectures"] == ["FalconH1ForCausalLM"]


def test_tokenizer_and_generation_config_follow_the_model(single, tmp_path):
    (single / "chat_template.jinja").write_text("{{ x }}")
    (single / "README.md").write_text("no part of a checkpoint")
    save(load(single), tmp_path / "c")
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        expected = (single / name).read_bytes()
        found = (tmp_path / "c" / name).read_bytes()
        assert json.loads(found) == json.loads(expected) if name[0] == "g" else found == expected
    assert "README.md" not in names(tmp_path / "c")


def test_named_templates_follow_the_model_and_are_replaced_with_it(single, tmp_path):
    named = Path("additional_chat_templates", "tool_use.jinja")
    (single / named.parent).mkdir()
    (single / named).write_text("{{ tools }}")
    (single / named.parent / "notes.txt").write_text("no template")
    save(load(single), tmp_path / "c")
    assert (tmp_path / "c" / named).read_text() == "{{ tools }}"
    assert names(tmp_path / "c" / named.parent) == {"tool_use.jinja"}
    save(load(tmp_path / "c"), tmp_path / "c")
    assert (tmp_path / "c" / named).read_text() == "{{ tools }}"
    (tmp_path / "c" / named.parent / "mine.txt").write_text("not ours")
    with pytest.raises(CheckpointError, match="additional_chat_templates, no part of a checkpoint"):
        save(load(single), tmp_path / "c")


def test_tokenizer_from_another_folder_comes_first(single, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").write_text('{"another": 1}')
    save(load(single), tmp_path / "c", tokenizer_from=other)
    assert (tmp_path / "c" / "tokenizer.json").read_text() == '{"another": 1}'
    # Which has no generation_config.json: the next origin's is taken.
    assert read_generation_config(tmp_path / "c") == read_generation_config(single)


def test_without_an_origin(config, model, tmp_path):
    assert model.source is None
    save(model, tmp_path / "c")
    generation = read_generation_config(tmp_path / "c")
    assert generation["eos_token_id"] == list(config.eos_token_ids)
    assert (generation["bos_token_id"], generation["pad_token_id"]) == (1, 0)


def test_tokenizer_from_without_tokenizer_is_refused(model, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"tokenizer_from: .*empty holds no tokenizer"):
        save(model, tmp_path / "c", tokenizer_from=tmp_path / "empty")
    assert names(tmp_path) == {"empty"}


def test_parents_are_created_and_a_checkpoint_is_replaced_whole(model, tmp_path):
    target = tmp_path / "a" / "b"
    save(model, target, max_shard_bytes=1)
    other = make_model(model.config, dtype=torch.bfloat16, seed=1)
    save(other, target)
    assert names(target) == {"config.json", "generation_config.json", "model.safetensors"}
    assert_same_weights(load(target), other.state_dict())
    assert names(tmp_path / "a") == {"b"}


def test_onto_its_own_source(single):
    model = load(single)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    save(model, single)
    assert_same_weights(load(single), model.state_dict())
    assert (single / "tokenizer.json").read_text() == '{"made": "up"}'


def test_empty_folder_and_link_to_a_folder(model, tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "c")
    save(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert_same_weights(load(tmp_path / "c"), model.state_dict())


def occupied_by_file(path):
    path.write_text("precious")


def occupied_by_notes(path):
    path.mkdir()
    (path / "notes.txt").write_text("precious")


def occupied_by_checkpoint_and_notes(path):
    save(make_model(make_config()), path)
    (path / "optimizer.safetensors").write_text("precious")


def occupied_by_another_model(path):
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    (path / "model.safetensors").write_text("precious")


def occupied_by_part_of_a_checkpoint(path):
    path.mkdir()
    (path / "tokenizer.json").write_text("precious")


@pytest.mark.parametrize(
    ("occupy", "part"),
    [
        (occupied_by_file, "no folder"),
        (occupied_by_notes, "notes.txt"),
        (occupied_by_checkpoint_and_notes, "optimizer.safetensors"),
        (occupied_by_another_model, "'llama'"),
        (occupied_by_part_of_a_checkpoint, "neither empty nor a checkpoint"),
    ],
)
def test_anything_else_is_never_replaced(occupy, part, model, tmp_path):
    target = tmp_path / "c"
    occupy(target)
    before = content(target) if target.is_dir() else target.read_bytes()
    with pytest.raises(CheckpointError) as error:
        save(model, target)
    assert str(target) in str(error.value) and part in str(error.value)
    assert before == (content(target) if target.is_dir() else target.read_bytes())
    assert names(tmp_path) == {"c"}


class Crash(BaseException):
    """Not an Exception, like KeyboardInterrupt."""


def fail_after(calls, function, error):
    left = [calls]

    def failing(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise error
        return function(*args, **kwargs)

    return failing


ERRORS = [OSError(28, "No space left on device"), Crash()]


def assert_save_fails_without_trace(model, target, error, existing):
    before = content(target) if existing else None
    with pytest.raises(CheckpointError if isinstance(error, OSError) else Crash) as caught:
        save(model, target, max_shard_bytes=20_000)
    if isinstance(error, OSError):
        assert str(target) in str(caught.value) and "No space left" in str(caught.value)
    if existing:
        assert content(target) == before
        assert names(target.parent) == {target.name}
    else:
        assert names(target.parent.parent) == set()


@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
@pytest.mark.parametrize("error", ERRORS, ids=type)
@pytest.mark.parametrize(
    ("owner", "name", "calls"),
    [
        (saver, "_write_safetensors", 0),
        (saver, "_write_safetensors", 2),
        (saver, "bytes_of", 30),
        (saver, "_write_json", 1),
        (saver, "_copy_tokenizer", 0),
        (os, "fsync", 3),
        (os, "rename", 0),
    ],
)
def test_a_failure_leaves_everything_as_it_was(
    owner, name, calls, error, existing, model, tmp_path, monkeypatch
):
    target = tmp_path / "new" / "c"
    if existing:
        save(make_model(model.config, seed=5), target)
    monkeypatch.setattr(owner, name, fail_after(calls, getattr(owner, name), error))
    assert_save_fails_without_trace(model, target, error, existing)


@pytest.mark.parametrize("error", ERRORS, ids=type)
def test_a_failure_between_the_renames_brings_the_old_folder_back(
    error, model, tmp_path, monkeypatch
):
    target = tmp_path / "c"
    save(make_model(model.config, seed=5), target)
    renames = []

    def second_fails(source, to):
        renames.append(source)
        if len(renames) == 2:
            raise error
        os.replace(source, to)

    monkeypatch.setattr(os, "rename", second_fails)
    assert_save_fails_without_trace(model, target, error, existing=True)
    assert len(renames) == 3


@needs_proc
def test_saving_takes_no_memory_of_its_own(tmp_path):
    model = make_model(make_config(vocab_size=400_000), dtype=torch.bfloat16)
    save(model, tmp_path / "warm-up")
    with peak_growth() as grown:
        save(model, tmp_path / "c")
    assert sum(parameter.nbytes for parameter in model.parameters()) > 70 << 20
    assert grown() < 8 << 20


def test_tensors_without_data_are_refused(config, tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot save tensor model\..*: .*meta"):
        save(FalconH1ForCausalLM(config, device="meta"), tmp_path / "c")
    assert names(tmp_path) == set()


@pytest.mark.parametrize("value", [0, -1, 1.5, None, True])
def test_max_shard_bytes_must_be_positive(value, model, tmp_path):
    with pytest.raises(CheckpointError, match="max_shard_bytes is"):
        save(model, tmp_path / "c", max_shard_bytes=value)


def test_strided_weights_are_saved_by_value(config, tmp_path):
    model = make_model(config)
    weight = model.lm_head.weight
    model.lm_head.weight = torch.nn.Parameter(weight.detach().t().contiguous().t())
    save(model, tmp_path / "c")
    assert_same_weights(load(tmp_path / "c", dtype=torch.float32), model.state_dict())


def test_methods_of_the_model(config, tmp_path):
    model = make_model(config)
    model.save_pretrained(tmp_path / "c")
    loaded = FalconH1ForCausalLM.from_pretrained(tmp_path / "c", dtype=torch.float32)
    assert_same_weights(loaded, model.state_dict())


def test_reader_and_writer_agree_with_an_independent_writer(model, tmp_path):
    """Re-saving what another program wrote gives the same tensors."""
    save(load(write_checkpoint(tmp_path / "theirs", model, shards=2)), tmp_path / "ours")
    assert_same_weights(model, load_file(tmp_path / "ours" / "model.safetensors"))


def test_a_save_killed_between_its_renames_is_finished_by_the_next_load(model, tmp_path):
    """The old checkpoint is aside, the new one is not yet in its place: nothing is at the path."""
    save(make_model(model.config, seed=5), tmp_path / ".c.replaced-0123abcd")
    save(model, tmp_path / ".c.writing-0123abcd")
    assert_same_weights(load(tmp_path / "c"), model.state_dict())
    assert names(tmp_path) == {"c"}
