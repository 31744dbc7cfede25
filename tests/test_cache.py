"""The cache as a value: forking, picking, going back, files, and what it refuses.

Continuations from an equal cache are compared bit for bit where shapes and strides are the same,
and to 1e-12 in float64 where they differ.
"""

import functools
import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import make_config, make_model, random_ids, relative_error, same_weights
from safetensors import safe_open
from safetensors.torch import save_file

from falcon_h1r.cache import TENSORS, Cache
from falcon_h1r.cache_file import fingerprint
from falcon_h1r.config import FalconH1Config
from falcon_h1r.model import FalconH1ForCausalLM

BOUND = 1e-12
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bf16"])


@functools.cache
def make(dtype=torch.float64, **changes):
    """A model that tests share: they must not change it."""
    return make_model(make_config(**changes), dtype=dtype)


@torch.no_grad()
def ragged_cache(model, max_length=40, lengths=(5, 12, 1)):
    ids = random_ids(model.config, len(lengths), max(lengths))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    cache = model.new_cache(len(lengths), max_length)
    model(ids, attention_mask=mask, cache=cache)
    return cache


@torch.no_grad()
def continuation(model, cache, steps=4, seed=7, rows=None):
    """Logits of a stretch and some steps, other tokens in every row (`rows` of a wider draw)."""
    ids = random_ids(model.config, 9, 3 + steps, seed=seed)
    ids = ids[: cache.batch_size] if rows is None else ids[rows]
    pieces = [ids[:, :3], *ids[:, 3:].split(1, dim=1)]
    return torch.cat([model(piece, cache=cache) for piece in pieces], dim=1)


def copy_of(cache):
    return Cache(*(getattr(cache, name).clone() for name in (*TENSORS, "lengths")))


def same(a, b) -> bool:
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in (*TENSORS, "lengths"))


def test_shapes_dtypes_and_bytes():
    for dtype, wide in ((torch.bfloat16, 4), (torch.float32, 4), (torch.float64, 8)):
        model = make(dtype)
        cache = model.new_cache(3, 20)
        layers, rows, narrow = 3, 3, dtype.itemsize
        assert cache.keys.shape == cache.values.shape == (layers, rows, 2, 20, 16)
        assert cache.windows.shape == (layers, rows, 3, 64 + 2 * 2 * 24)
        assert cache.states.shape == (layers, rows, 4, 16, 24)
        per_row = 2 * 2 * 20 * 16 * narrow + 3 * 160 * narrow + 4 * 16 * 24 * wide
        assert cache.nbytes == layers * rows * per_row
        assert (cache.batch_size, cache.max_length) == (3, 20)
        assert cache.lengths.tolist() == [0, 0, 0] and cache.lengths.dtype == torch.int64


def test_bytes_of_the_released_model():
    """44 KiB of keys and values per token; 3 MiB of state and 21 KiB of window per layer."""
    config = FalconH1Config.preset("falcon-h1r-7b")
    empty, longer = (
        Cache.alloc(config, 1, tokens, torch.bfloat16, "meta").nbytes for tokens in (1, 1025)
    )
    assert longer - empty == 1024 * 44 * 1024
    assert empty == 44 * 1024 + 44 * (3 * 2**20 + 21 * 1024)


@DTYPES
def test_expanded_rows_go_on_like_their_origin_and_apart_from_each_other(dtype):
    model = make(dtype)
    cache = ragged_cache(model)
    before = copy_of(cache)
    forks = cache.expand(2)
    assert forks.lengths.tolist() == [5, 5, 12, 12, 1, 1]
    found = continuation(model, forks)
    assert same(cache, before)
    for row in range(6):
        alone = copy_of(before).select([row // 2])
        expected = continuation(model, alone, rows=[row])[0]
        if dtype == torch.float64:
            assert relative_error(found[row], expected) < BOUND
        else:  # other batch sizes round otherwise; a leak of another row's token is far larger
            assert relative_error(found[row], expected) < 0.05
    assert not torch.equal(found[0], found[1])


@given(
    rows=st.lists(st.integers(0, 2), min_size=1, max_size=6),
    dtype=st.sampled_from([None, torch.int64, torch.int32, torch.uint8]),
)
def test_select_is_indexing(rows, dtype):
    model = make()
    cache = ragged_cache(model)
    picked = cache.select(torch.tensor(rows, dtype=dtype) if dtype else rows)
    for name in TENSORS:
        assert torch.equal(getattr(picked, name), getattr(cache, name)[:, rows])
    assert picked.lengths.tolist() == [(5, 12, 1)[row] for row in rows]
    before = copy_of(cache)
    found = continuation(model, picked)
    assert same(cache, before)
    for i, row in enumerate(rows):
        expected = continuation(model, before.select([row]), rows=[i])[0]
        assert relative_error(found[i], expected) < BOUND


@pytest.mark.parametrize(
    "rows", [[], [3], [-1], [0.5], [True, False, True], torch.tensor([True, False, True])], ids=str
)
def test_select_refuses_what_is_no_row(rows):
    with pytest.raises(ValueError, match="rows"):
        ragged_cache(make()).select(rows)


@pytest.mark.parametrize("n", [0, -1, 1.5, "2"])
def test_expand_refuses_what_is_no_count(n):
    with pytest.raises(ValueError, match=r"n is .*expected an integer >= 1"):
        ragged_cache(make()).expand(n)


@pytest.mark.parametrize("name", ["batch_size", "max_length"])
@pytest.mark.parametrize("value", [0, -3, 2.0, None])
def test_new_cache_refuses_what_is_no_size(name, value):
    with pytest.raises(ValueError, match=name):
        make().new_cache(**({"batch_size": 2, "max_length": 4} | {name: value}))


@DTYPES
def test_snapshot_and_restore_repeat_bit_for_bit(dtype):
    model = make(dtype)
    cache = ragged_cache(model)
    kept = cache.snapshot()
    assert kept.max_length == 12 and kept.nbytes < cache.nbytes
    untouched = copy_of(kept)
    expected = continuation(model, cache)
    assert same(kept, untouched)
    for seed in (7, 8, 7):
        cache.restore(kept)
        assert cache.lengths.tolist() == [5, 12, 1]
        found = continuation(model, cache, seed=seed)
        assert torch.equal(found, expected) == (seed == 7)


def test_snapshot_of_an_empty_cache():
    model = make()
    cache = model.new_cache(2, 20)
    kept = cache.snapshot()
    expected = continuation(model, cache)
    cache.restore(kept)
    assert not cache.lengths.any()
    assert torch.equal(continuation(model, cache), expected)


def test_restore_refuses_another_shape_and_changes_nothing():
    model = make()
    cache = ragged_cache(model)
    before = copy_of(cache)
    others = [
        cache.select([0, 1]).snapshot(),
        ragged_cache(model, lengths=(5, 41, 1), max_length=41).snapshot(),
        ragged_cache(make(torch.bfloat16)).snapshot(),
        ragged_cache(make(num_hidden_layers=2)).snapshot(),
        ragged_cache(make(num_key_value_heads=1)).snapshot(),
        ragged_cache(make(mamba_d_conv=2)).snapshot(),
    ]
    for other in others:
        with pytest.raises(ValueError, match="snapshot"):
            cache.restore(other)
        assert same(cache, before)


@torch.no_grad()
def test_a_full_cache_names_numbers_and_stays_as_it_is():
    model = make()
    cache = ragged_cache(model, max_length=14)
    before = copy_of(cache)
    ids = random_ids(model.config, 3, 3)
    with pytest.raises(ValueError, match=r"row 1 holds 12 of 14 .* 3 more") as caught:
        model(ids, cache=cache)
    assert "\n" not in str(caught.value) and same(cache, before)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1]])
    model(ids, attention_mask=mask, cache=cache)  # row 1 is now exactly full
    assert cache.lengths.tolist() == [8, 14, 4]
    before = copy_of(cache)
    with pytest.raises(ValueError, match=r"row 1 holds 14 of 14 .* 1 more"):
        model(ids[:, :1], cache=cache)
    assert same(cache, before)


@torch.no_grad()
def test_what_stands_behind_a_row_does_not_matter():
    """Slots beyond the longest row are never read: NaN there is harmless. Slots between a shorter
    row's end and the longest row are read with weight 0: any finite value is harmless."""
    model = make()
    clean = ragged_cache(model)
    dirty = copy_of(clean)
    for tensor in (dirty.keys, dirty.values):
        tensor[:, :, :, 12 + 7 :] = torch.nan
        tensor[:, 0, :, 5 : 12 + 7], tensor[:, 2, :, 1 : 12 + 7] = 1e30, -1e30
    assert torch.equal(continuation(model, dirty), continuation(model, clean))


@torch.no_grad()
def test_padding_never_enters():
    """Two prefills that differ in their padding only leave the same memory of every row."""
    model = make()
    ids = random_ids(model.config, 2, 9)
    left, right = torch.cat([ids[:, :4], ids], 1), torch.cat([ids, ids[:, :6]], 1)
    mask = torch.ones_like(ids)
    caches = [model.new_cache(2, 20) for _ in range(3)]
    model(left, attention_mask=torch.nn.functional.pad(mask, (4, 0)), cache=caches[0])
    model(right, attention_mask=torch.nn.functional.pad(mask, (0, 6)), cache=caches[1])
    model(ids, cache=caches[2])
    assert same(caches[0], caches[2]) and same(caches[1], caches[2])


def test_a_cache_never_holds_a_graph():
    """Also without no_grad: the memory of a sequence must not keep every step alive."""
    model = make(torch.float32)
    cache = model.new_cache(1, 12)
    ids = random_ids(model.config, 1, 8)
    for piece in (ids[:, :3], ids[:, 3:4], ids[:, 4:7], ids[:, 7:]):
        assert not model(piece, cache=cache).requires_grad
        for name in TENSORS:
            assert not getattr(cache, name).requires_grad, name


@DTYPES
def test_saved_and_loaded_goes_on_bit_for_bit(dtype, tmp_path):
    model = make(dtype)
    cache = ragged_cache(model)
    path = tmp_path / "session.safetensors"
    cache.save(path, model)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    loaded = Cache.load(path, model, max_length=cache.max_length)
    tight = Cache.load(str(path), model)
    assert tight.max_length == 12 and tight.lengths.tolist() == [5, 12, 1]
    for name in TENSORS:
        assert getattr(loaded, name).dtype == getattr(cache, name).dtype
    expected = continuation(model, cache)
    assert torch.equal(continuation(model, loaded), expected)
    again = same_weights(model)  # another process' model, with the same numbers
    assert torch.equal(continuation(again, Cache.load(path, again, max_length=40)), expected)


def test_load_refuses_other_weights_configs_and_dtypes(tmp_path):
    model = make()
    path = tmp_path / "cache"
    ragged_cache(model).save(path, model)
    touched = same_weights(model)
    with torch.no_grad():
        touched.model["layers"][1].mamba.D[2] += 1e-12
    others = [
        touched,
        same_weights(model, rms_norm_eps=1e-6),
        same_weights(model, key_multiplier=0.5),
        same_weights(model, dtype=torch.float32),
        make(num_hidden_layers=2),
    ]
    for other in others:
        with pytest.raises(ValueError, match=r"another model: fingerprint [0-9a-f]{64}") as caught:
            Cache.load(path, other)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    with pytest.raises(ValueError, match=r"max_length is 11, expected .* 12"):
        Cache.load(path, model, max_length=11)
    with pytest.raises(FileNotFoundError):
        Cache.load(tmp_path / "absent", model)


def test_a_cache_without_windows_is_saved_too(tmp_path):
    """One tap needs no history: a tensor of no bytes."""
    model = make(mamba_d_conv=1)
    cache = ragged_cache(model)
    assert cache.windows.numel() == 0
    cache.save(tmp_path / "cache", model)
    loaded = Cache.load(tmp_path / "cache", model, max_length=cache.max_length)
    assert torch.equal(continuation(model, loaded), continuation(model, cache))


def test_fingerprint_is_of_names_values_and_config():
    model = make()
    assert fingerprint(model) == fingerprint(same_weights(model))
    swapped = same_weights(model)
    norms = [
        swapped.model["layers"][0].input_layernorm,
        swapped.model["layers"][0].pre_ff_layernorm,
    ]
    norms[0].weight.data, norms[1].weight.data = norms[1].weight.data, norms[0].weight.data
    assert fingerprint(swapped) != fingerprint(model)


def test_damaged_files_are_refused(tmp_path):
    """Cut anywhere, or with a bit changed anywhere: ValueError, never a wrong cache."""
    model = make(num_hidden_layers=1)
    path = tmp_path / "cache"
    ragged_cache(model).save(path, model)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    cuts = [0, 1, 7, 8, 9, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1]
    damaged = [whole[:cut] for cut in cuts] + [whole + b"\0", b"not a cache at all" * 9]
    for position in [*range(0, header, 5), *range(header, len(whole), 997), len(whole) - 1]:
        damaged.append(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
            Cache.load(path, model)
        assert "\n" not in str(caught.value)


def test_files_with_impossible_content_are_refused(tmp_path):
    """A valid safetensors file with the right names and fingerprint, but not what `save` writes."""
    model = make()
    path = tmp_path / "cache"
    ragged_cache(model).save(path, model)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        good = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    changes = [
        {"keys": good["keys"][:, :, :1].contiguous()},  # would broadcast over the key heads
        {"values": good["values"][:, :, :, :1].contiguous()},  # would broadcast over positions
        {"windows": good["windows"][:, :, :1].contiguous()},
        {"windows": good["windows"].float()},
        {"states": good["states"][:, :1].contiguous()},
        {"states": good["states"].float()},
        {"keys": good["keys"][0]},
        {"keys": good["keys"][0, 0, 0, 0, 0]},
        {"lengths": good["lengths"][:1]},
        {"lengths": good["lengths"].double()},
        {"lengths": torch.tensor([5, 13, 1])},  # beyond what is stored
        {"lengths": torch.tensor([5, 12, -1])},
    ]
    for change in changes:
        save_file(good | change, path, metadata=metadata)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            Cache.load(path, model)
    save_file(good, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="not a cache file"):
        Cache.load(path, model)
    save_file({"keys": good["keys"]}, path, metadata=metadata)
    with pytest.raises(ValueError, match="not a cache file"):
        Cache.load(path, model)


def test_a_failed_save_leaves_nothing_and_keeps_the_old_file(tmp_path, monkeypatch):
    model = make()
    cache = ragged_cache(model)
    path = tmp_path / "cache"
    cache.save(path, model)
    old = path.read_bytes()

    def full_disk(partial, *arguments):
        partial.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("falcon_h1r.tensor_file.write_safetensors", full_disk)
    with pytest.raises(OSError, match="no space"):
        cache.save(path, model)
    assert [p.name for p in tmp_path.iterdir()] == ["cache"] and path.read_bytes() == old


def test_the_files_header_is_readable(tmp_path):
    model = make()
    path = tmp_path / "cache"
    ragged_cache(model).save(path, model)
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header["__metadata__"]["format"] == "falcon_h1r.cache"
    assert set(header) == {"__metadata__", "lengths", *TENSORS}
    assert header["keys"]["shape"] == [3, 3, 2, 12, 16]


def test_meta_models_have_no_cache_memory():
    model = FalconH1ForCausalLM(make_config(), device="meta")
    assert model.new_cache(2, 1 << 20).keys.device.type == "meta"


@pytest.mark.parametrize("at", [0, 1])
def test_a_forward_that_was_interrupted_leaves_no_cache_that_looks_whole(at):
    """Layers before the one that raised have moved on; a state cannot be taken back."""
    model = make_model(make_config("two_groups"))
    ids, cache = random_ids(model.config, 1, 6), model.new_cache(1, 16)
    with torch.no_grad():
        model(ids[:, :4], cache=cache)
        before = cache.snapshot()

        def fail(*_):
            raise KeyboardInterrupt

        hook = model.model["layers"][at].register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, 4:], cache=cache)
        hook.remove()
        for torn in (cache, cache.select([0]), cache.expand(2), cache.snapshot()):
            with pytest.raises(ValueError, match="a forward was interrupted in it"):
                model(ids[:, 4:].expand(torn.batch_size, -1), cache=torn)
        cache.restore(before)
        found = model(ids[:, 4:], cache=cache)
        torch.testing.assert_close(found, model(ids)[:, 4:], rtol=1e-4, atol=1e-4)
    assert cache.lengths.tolist() == [6]
