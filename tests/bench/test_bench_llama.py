"""llama.cpp as a contestant: the same cache, set back after each sample, the faster attention."""

import pytest
import torch
from bench.tiny_bench import CPU, FakeClock, tiny_session
from gguf_cases import CASES, case_model
from models import random_ids, rms_error

from falcon_h1r.bench import (
    contestants,
    generation_bench,
    llama_library,
    llama_model,
    llama_peer,
    timing,
)
from falcon_h1r.bench.llama_model import Setting
from falcon_h1r.bench.llama_state import row_state
from falcon_h1r.bench.registry import Workload

FLOAT32_BOUND = 1e-5  # as in test_llama_cpp.py
FLOAT16_CACHE_BOUND = 1e-3
PLAIN, FLASH = Setting(False, torch.float32), Setting(True, torch.float16)
BEHIND = Workload("decode", 3, 1, 50)

installed = pytest.mark.skipif(
    bool(llama_library.why_not()), reason=f"llama.cpp: {llama_library.why_not()}"
)


def test_where_it_does_not_take_part(monkeypatch):
    model = case_model("tied")
    monkeypatch.setattr(llama_model, "why_not", lambda: "not installed")
    assert llama_model.llama_model(model) == "not installed"
    monkeypatch.setattr(llama_model, "why_not", lambda: "")
    assert "float64" in llama_model.llama_model(case_model("tied").double())
    for workload, served in (
        (Workload("prefill", 1, 9), True),
        (Workload("prefill", 2, 9), False),
        (Workload("resume", 1, 9, 9), False),
        (Workload("decode", 8, 1, 9), True),
        (Workload("decode", 1, 1, 0), False),
    ):
        assert bool(llama_model.refuses(workload)) != served


@pytest.mark.parametrize(
    ("errors", "release", "reason"),
    [
        ({"llama_cpp": "not installed", "xllamacpp": "not installed"}, "", "not installed"),
        ({"llama_cpp": "not installed"}, llama_library.RELEASE, ""),
        ({"llama_cpp": "not installed"}, "2026.1.1", "known is " + llama_library.RELEASE),
        ({}, "0.3.36", ""),
        ({"llama_cpp": "cannot be imported"}, llama_library.RELEASE, "cannot be imported"),
        ({"gguf": "not installed"}, "0.3.36", "not installed"),
    ],
)
def test_which_package_serves(monkeypatch, errors, release, reason):
    monkeypatch.setattr(llama_library, "import_error", lambda module: errors.get(module, ""))
    monkeypatch.setattr(llama_library.importlib.metadata, "version", lambda package: release)
    found = llama_library.why_not()
    assert found.endswith(reason) and bool(found) == bool(reason)


@installed
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_it_stands_behind_our_cache(name):
    """Random keys, values, windows and states, put there as they are: the next logits are ours."""
    model = case_model(name)
    tokens = torch.tensor([[1], [2], [3]])
    for setting in (PLAIN, Setting(False, torch.float16), FLASH):
        cache = generation_bench.filled_cache(model, BEHIND, 0)
        peer = llama_peer.LlamaPeer(
            model, threads=1, max_length=64, max_sequences=3, **setting._asdict()
        )
        try:
            peer.stand(cache, 50)
            found = torch.from_numpy(peer.step([1, 2, 3], 50))
        finally:
            peer.close()
        expected = model(tokens, cache=cache)[:, -1]
        bound = FLOAT32_BOUND if setting == PLAIN else FLOAT16_CACHE_BOUND
        assert max(rms_error(a, b) for a, b in zip(found, expected)) < bound


@installed
def test_it_returns_to_where_it_stood():
    model = case_model("h1r_like")
    cache = generation_bench.filled_cache(model, BEHIND, 0)
    peer = llama_peer.LlamaPeer(model, threads=1, max_length=64, max_sequences=3)
    try:
        peer.stand(cache, 50)
        first = [peer.step([1, 2, 3], 50), peer.step([4, 5, 6], 51)]
        peer.set_back(50)
        again = [peer.step([1, 2, 3], 50), peer.step([4, 5, 6], 51)]
        assert all((a == b).all() for a, b in zip(first, again))
        assert (peer.step([1, 2, 3], 52) != first[0]).any()
    finally:
        peer.close()


@installed
def test_a_state_of_another_layout_is_refused(monkeypatch):
    model = case_model("tied")
    cache = generation_bench.filled_cache(model, BEHIND, 0)
    peer = llama_peer.LlamaPeer(model, threads=1, max_length=64, max_sequences=3)
    try:
        monkeypatch.setattr(llama_peer, "row_state", lambda *a, **k: row_state(*a, **k) + bytes(4))
        with pytest.raises(RuntimeError, match="keep its state in a layout"):
            peer.stand(cache, 50)
        monkeypatch.undo()
        with pytest.raises(RuntimeError, match="take a state of 50 tokens"):
            monkeypatch.setattr(
                llama_peer,
                "row_state",
                lambda c, r, d, *a, **k: row_state(c, r, d, *a, **k)[: -d + 1 or None],
            )
            peer.stand(cache, 50)
    finally:
        peer.close()


def verdicts(model, ids):
    exact = generation_bench.layer.under(model, generation_bench.ops.TORCH)(ids)[:, -1]
    peer = llama_model.llama_model(model)
    return peer, peer.judge(
        ids,
        lambda found, extra: contestants.verdict(model, found, exact, slack=2, extra=extra),
    )


@installed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_the_gate_admits_both_settings(dtype):
    model = generation_bench.random_model(case_model("two_groups").config, dtype, CPU, 0)
    peer, verdict = verdicts(model, random_ids(model.config, 2, 20))
    assert verdict.passed and verdict.rms > 0
    kind = torch.float32 if dtype == torch.float32 else torch.float16
    assert peer._settings == [Setting(False, kind), FLASH]


@installed
@torch.no_grad()
def test_float16_keys_have_an_allowance_of_their_own(monkeypatch):
    """Without it the second setting is refused, and left out of the trials."""
    model = generation_bench.random_model(case_model("two_groups").config, torch.float32, CPU, 0)
    monkeypatch.setattr(llama_model, "FLOAT16_ROUNDINGS", 0)
    peer, verdict = verdicts(model, random_ids(model.config, 2, 20))
    assert verdict.passed and peer._settings == [PLAIN]


@installed
@torch.no_grad()
def test_other_weights_are_refused():
    model = generation_bench.random_model(case_model("two_groups").config, torch.bfloat16, CPU, 0)
    ids = random_ids(model.config, 2, 20)
    exact = model(ids)[:, -1]
    for name in ("self_attn.v_proj", "mamba.out_proj", "feed_forward.up_proj"):
        other = generation_bench.layer.under(model, generation_bench.ops.TORCH)
        weight = other.get_parameter(f"model.layers.1.{name}.weight")
        weight.data = -weight.data
        peer = llama_model.llama_model(other)
        verdict = peer.judge(
            ids, lambda found, extra: contestants.verdict(model, found, exact, 2, extra)
        )
        assert not verdict.passed and peer._settings == [], name


@installed
@torch.no_grad()
def test_the_faster_attention_takes_part(monkeypatch):
    model = generation_bench.random_model(case_model("two_groups").config, torch.float32, CPU, 0)
    w = Workload("decode", 2, 1, 9)
    cache, ids = generation_bench.filled_cache(model, w, 0), torch.tensor([[1], [2]])
    peer = llama_model.llama_model(model)
    for fast in (PLAIN, FLASH):
        monkeypatch.setattr(
            llama_model._Steps,
            "trial",
            lambda self, fast=fast: 1.0 + (self.peer._flash != fast.flash_attention),
        )
        call = peer.bind(w, ids, cache)
        assert call.settings == f"{llama_library.library().source}, {fast}"
        assert call.peer._flash == fast.flash_attention
        call.close()
    assert str(PLAIN) == "flash attention off, float32 keys and values"


@installed
@torch.no_grad()
def test_its_steps_start_at_the_same_depth(monkeypatch):
    model = generation_bench.random_model(case_model("two_groups").config, torch.float32, CPU, 0)
    w = Workload("decode", 2, 1, 9)
    cache, ids = generation_bench.filled_cache(model, w, 0), torch.tensor([[1], [2]])
    call = llama_model.llama_model(model).bind(w, ids, cache)
    seen, step = [], call.peer.step

    def watching(tokens, position):
        seen.append((position, len(tokens)))
        return step(tokens, position)

    call.peer.step = watching
    try:
        for _ in range(2):
            call.prepare()
            for _ in range(timing.MOST_CALLS):
                call()
    finally:
        call.close()
    assert seen == [(9 + i, 2) for i in range(timing.MOST_CALLS)] * 2


@installed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_measured_beside_the_others(monkeypatch, dtype):
    model = generation_bench.random_model(case_model("two_groups").config, dtype, CPU, 0)
    monkeypatch.setattr(timing, "WallClock", lambda device: FakeClock())
    monkeypatch.setattr(llama_model, "WallClock", lambda device: FakeClock())
    workloads = [Workload("prefill", 1, 37), Workload("prefill", 2, 5), BEHIND]
    session = tiny_session()
    names = contestants.select(["torch", "llama.cpp"], (), True)
    generation_bench.run("t", model, workloads, session, names)
    records = session.results.records
    rows = [r for r in records if r["implementation"] == "llama.cpp" and r["record"] != "absent"]
    assert [r["status"] for r in rows] == ["timed", "absent", "timed"]
    assert all("flash attention" in r["settings"] for r in rows if r["status"] == "timed")
    assert "speed_over" not in rows[0] and "llama.cpp" in records[0]["speed_over"]


@installed
def test_one_file_serves_all_and_goes_with_its_model(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    peer = llama_model.llama_model(case_model("tied"))
    (folder,) = tmp_path.iterdir()
    (file,) = folder.iterdir()
    one = peer._open(PLAIN, 32, 1)
    assert list(tmp_path.iterdir()) == [folder]
    w = Workload("decode", 2, 1, 9)
    kept = peer.extra_bytes(w) - file.stat().st_size
    cache = case_model("tied").new_cache(4, w.past + w.length + llama_model.ROOM)
    assert kept == cache.nbytes
    one.close()
    del peer
    assert not list(tmp_path.iterdir())
