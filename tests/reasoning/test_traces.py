"""`reasoning.recorder` and `reasoning.traces`: what is written is what was run, and nothing else is
read."""

import io
import json
import os
import resource
import subprocess
import sys

import pytest
import torch
from reasoning.synthetic import edit_manifest, make_pool, record_pool, run_live
from safetensors.torch import load_file, save_file

from falcon_h1r.reasoning import (
    DeepConf,
    Manifest,
    TraceRecorder,
    find_records,
    read_record,
    recorder,
)
from falcon_h1r.reasoning.lock import LOCK, FolderLock
from falcon_h1r.reasoning.traces import check_of

PARAMS = DeepConf(k=4, window=6, warmup=4, budget=10, eta=20.0, tau=0.9)


@pytest.fixture
def folder(tmp_path):
    run_live(make_pool(3, 10), PARAMS, tmp_path / "run", slots=3, chaos=5, reference="5")
    return tmp_path / "run"


def test_a_record_holds_the_run(tmp_path):
    # Long enough for the buffers to grow, more rows at once than they begin with, rows used again.
    pool = make_pool(3, 14, longest=700)
    params = DeepConf(k=4, window=20, warmup=6, budget=14, eta=60.0, tau=None)
    policy = run_live(pool, params, tmp_path / "a", slots=6, chaos=5, reference="5")
    record = read_record(tmp_path / "a")
    result = policy.result()
    assert record.complete and record.end["done"] == "budget" and record.end["traces"] == 14
    assert record.end["steps"] == policy.steps and record.end["answer"] == result.answer
    assert record.manifest.policy == params.to_dict() and record.manifest.reference == "5"
    assert {t.reason for t in record.traces} >= {"stop", "low_confidence"}
    starts = {event.trace: event.step for event in result.log if event.what == "start"}
    ends = {
        event.trace: event.step for event in result.log if event.what in ("end", "low_confidence")
    }
    arrived = {}
    for trace, whole, outcome in zip(record.traces, pool, result.traces):
        n = outcome.tokens
        assert trace.number == outcome.trace and trace.seed == outcome.seed and len(trace) == n
        assert trace.reason == outcome.reason and trace.answer == outcome.answer
        assert torch.equal(trace.tokens, whole.tokens[:n])
        assert torch.equal(trace.confidence, whole.confidence[:n])
        assert torch.equal(trace.top_logprobs, whole.top_logprobs[:n])
        assert torch.equal(trace.top_ids, torch.arange(4).int().expand(n, -1))
        assert trace.start == starts[trace.number] and int(trace.steps[-1]) == ends[trace.number]
        assert trace.text == (whole.text if trace.whole else "")
        for step in trace.steps.tolist():
            arrived[step] = arrived.get(step, 0) + 1
    assert max(arrived.values()) == 6
    assert record.tokens == result.tokens == sum(arrived.values())
    light = read_record(tmp_path / "a", tensors=False)
    assert light.traces[0].top_ids is None
    assert torch.equal(light.traces[0].confidence, record.traces[0].confidence)


def test_fewer_of_the_likeliest_tokens_or_none(tmp_path):
    run_live(make_pool(3, 10), PARAMS, tmp_path / "none", top=0)
    assert read_record(tmp_path / "none").traces[0].top_logprobs is None
    run_live(make_pool(3, 10), PARAMS, tmp_path / "two", top=2)
    trace = read_record(tmp_path / "two").traces[0]
    assert trace.top_logprobs.shape == trace.top_ids.shape == (len(trace), 2)
    with (
        pytest.raises(ValueError, match="5 per token are to be kept"),
        TraceRecorder(tmp_path / "many", Manifest(), 5) as writer,
    ):
        writer.start([0], [1])
        one = torch.tensor([1])
        writer.step(torch.tensor([0]), one, one.float(), one.expand(1, 4), one.expand(1, 4))


def test_a_run_that_dies_leaves_the_traces_that_ended(tmp_path, folder):
    lines = (folder / "traces.jsonl").read_bytes().splitlines(keepends=True)
    for kept in (lines[:-1], [*lines[:4], lines[4][: len(lines[4]) // 2]], [], [lines[0][:-1]]):
        (folder / "traces.jsonl").write_bytes(b"".join(kept))
        record = read_record(folder)
        assert not record.complete and record.end == {}
        assert len(record.traces) == sum(line.endswith(b"\n") for line in kept)
    (folder / "traces.jsonl").unlink()
    assert read_record(folder).traces == []


def test_an_exception_closes_the_record(tmp_path):
    with pytest.raises(KeyboardInterrupt), TraceRecorder(tmp_path, Manifest(), 0) as writer:
        writer.start([0, 1], [5, None])
        writer.step(torch.tensor([1]), torch.tensor([3]), torch.tensor([2.5]))
        raise KeyboardInterrupt
    record = read_record(tmp_path)
    assert record.complete and record.end == {"done": "interrupted", "traces": 2, "steps": 1}
    assert [t.reason for t in record.traces] == ["interrupted"] * 2
    assert [t.seed for t in record.traces] == [5, None]
    assert [t.confidence.tolist() for t in record.traces] == [[], [2.5]]


def test_a_folder_that_holds_a_record_is_not_written_over(folder):
    with pytest.raises(ValueError, match="already holds"):
        TraceRecorder(folder, Manifest())


def test_a_trace_starts_once(tmp_path):
    writer = TraceRecorder(tmp_path, Manifest(), 0)
    writer.start([0], [1])
    with pytest.raises(ValueError, match="trace 0 was started before"):
        writer.start([0], [1])
    with pytest.raises(ValueError, match="top is -1"):
        TraceRecorder(tmp_path / "b", Manifest(), -1)


def test_memory_is_that_of_the_traces_that_run(tmp_path):
    writer = TraceRecorder(tmp_path, Manifest(), 0)
    one = torch.tensor([3])
    for i in range(30):
        writer.start([i], [i])
        writer.step(torch.tensor([i]), one, one.float())
        writer.end(i, "stop")
    assert len(writer._buffers["tokens"]) == 4


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    writer = TraceRecorder(tmp_path, Manifest(), 0)
    writer.start([0], [1])
    writer.step(torch.tensor([0]), torch.tensor([3]), torch.tensor([2.5]))

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(recorder.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        writer.end(0, "stop")
    assert sorted(os.listdir(tmp_path)) == [".lock", "manifest.json"]
    monkeypatch.undo()
    assert read_record(tmp_path).traces == []


def rewrite(folder, number, change):
    """A line with other content, and a check that fits."""
    path = folder / "traces.jsonl"
    lines = path.read_text().splitlines()
    line = json.loads(lines[number])
    del line["check"]
    change(line)
    lines[number] = json.dumps({**line, "check": check_of(line)})
    path.write_text("".join(line + "\n" for line in lines))


def retensor(folder, number, change):
    """A tensor file with other content, named by its line."""
    import hashlib

    trace = json.loads((folder / "traces.jsonl").read_text().splitlines()[number])["trace"]
    path = folder / f"trace-{trace:05}.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    rewrite(folder, number, lambda line: line.update(sha256=digest))


def test_every_damaged_byte_is_noticed(folder):
    trace = read_record(folder).traces[0].number
    for name in ("traces.jsonl", "manifest.json", f"trace-{trace:05}.safetensors"):
        path = folder / name
        content = path.read_bytes()
        # The last line is another matter: it is left out.
        end = content[:-1].rfind(b"\n") if name == "traces.jsonl" else len(content)
        for at in range(0, end, max(1, end // 40)):
            if content[at : at + 1].isspace():
                continue
            path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            with pytest.raises(ValueError, match=name):
                read_record(folder)
        path.write_bytes(content)
    read_record(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "manifest.json").unlink(), "not a trace record: it has no manifest.json"),
        (lambda f: (f / "manifest.json").write_text("[]"), "not a JSON object"),
        (lambda f: (f / "manifest.json").write_text("{}"), "not a trace record of falcon_h1r"),
        (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe"), "not JSON"),
        (lambda f: edit_manifest(f, version=2), "version 2 of the format, this code reads 1"),
        (lambda f: edit_manifest(f, format="other"), "not a trace record of falcon_h1r"),
        (lambda f: edit_manifest(f, colour="red"), "expected the fields"),
        (lambda f: edit_manifest(f, k=0), "of another kind"),
        (lambda f: edit_manifest(f, k="4"), "of another kind"),
        (lambda f: edit_manifest(f, rule=None), "of another kind"),
        (lambda f: edit_manifest(f, reference=5), "of another kind"),
        (lambda f: edit_manifest(f, stop_token_ids=["a"]), "of another kind"),
        (lambda f: edit_manifest(f, policy=[]), "of another kind"),
        (lambda f: edit_manifest(f, stop_token_ids=5), "of another kind"),
        (lambda f: edit_manifest(f, stop_token_ids=[2**63]), "of another kind"),
        (lambda f: edit_manifest(f, stop_token_ids={}), "of another kind"),
        (lambda f: (f / "manifest.json").write_text("[" * 100_000), "more than 100 lists"),
        (lambda f: (f / "manifest.json").write_text('{"a":' * 200 + "1" + "}" * 200), "more than"),
        (lambda f: (f / "trace-00000.safetensors").unlink(), "00000.safetensors: missing"),
        (
            lambda f: (f / "trace-00001.safetensors").write_bytes(
                (f / "trace-00000.safetensors").read_bytes()
            ),
            "00001.safetensors: damaged",
        ),
        (lambda f: rewrite(f, 0, lambda v: v.pop("seed")), "field 'seed' is missing"),
        (lambda f: rewrite(f, 0, lambda v: v.update(trace=True)), "field 'trace'"),
        (lambda f: rewrite(f, 0, lambda v: v.update(trace=-1)), "trace -1"),
        (lambda f: rewrite(f, 0, lambda v: v.update(trace=99)), "00099.safetensors: missing"),
        (lambda f: rewrite(f, 0, lambda v: v.update(trace=2**40)), "trace 1099511627776"),
        (lambda f: rewrite(f, 0, lambda v: v.update(start=-1)), "starts before step -1"),
        (lambda f: rewrite(f, 0, lambda v: v.update(start=2**40)), "starts before step"),
        (lambda f: rewrite(f, 0, lambda v: v.update(reason="eos")), "reason 'eos'"),
        (lambda f: rewrite(f, 0, lambda v: v.update(tokens=1)), "another shape"),
        (lambda f: rewrite(f, 0, lambda v: v.update(start=9999)), "do not ascend from 9999"),
        (lambda f: rewrite(f, -1, lambda v: v["end"].update(traces=1)), "another number of traces"),
        (lambda f: rewrite(f, -1, lambda v: v["end"].update(steps=1)), "closes after 1 steps"),
        (lambda f: retensor(f, 0, lambda t: t.pop("steps")), "'steps' is missing"),
        (lambda f: retensor(f, 0, lambda t: t.pop("top_ids")), "holds"),
        (lambda f: retensor(f, 0, lambda t: t.pop("top_logprobs")), "'top_logprobs' is missing"),
        (lambda f: retensor(f, 0, lambda t: t.update(more=torch.ones(1))), "holds"),
        (lambda f: retensor(f, 0, lambda t: t.update(tokens=t["tokens"].int())), "'tokens' is"),
        (lambda f: retensor(f, 0, lambda t: t.update(steps=torch.tensor(3))), "'steps' is missing"),
        (lambda f: retensor(f, 0, lambda t: t.update(more=torch.tensor(3))), "'more' is missing"),
        (lambda f: retensor(f, 0, lambda t: t.update(tokens=t["tokens"][:, None])), "'tokens' is"),
        (lambda f: retensor(f, 0, lambda t: t.update(tokens=t["tokens"].half())), "'tokens' is"),
        (lambda f: retensor(f, 0, lambda t: t.update(steps=t["steps"].flip(0))), "do not ascend"),
        (lambda f: retensor(f, 0, lambda t: t["steps"].add_(2**40)), "more than 67108864"),
        (lambda f: rewrite(f, -1, lambda v: v["end"].update(steps=2**40)), "closes after"),
        (lambda f: retensor(f, 0, lambda t: t["confidence"].mul_(-1)), "negative"),
        (lambda f: retensor(f, 0, lambda t: t["confidence"].mul_(1.01)), "are not those of its"),
        (lambda f: retensor(f, 0, lambda t: t.update(top_ids=t["top_ids"][:, :2])), "in shape"),
    ],
)
def test_what_is_foreign_or_damaged_is_refused(folder, spoil, message):
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        read_record(folder)


def test_lines_out_of_place_are_refused(folder):
    path = folder / "traces.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for broken, message in [
        ([lines[0], *lines], "another number of traces"),
        ([lines[0], lines[0]], "a trace is there twice"),
        (lines[1:], "another number of traces"),
        ([*lines, lines[0]], "follows the line that closes"),
        ([lines[0], b"{}\n", lines[1]], "line 2: damaged"),
        ([lines[0], b"\n", lines[1]], "line 2: not JSON"),
        ([lines[0], b"[" * 100_000 + b"\n", lines[1]], "line 2: not JSON that is read: more than"),
    ]:
        path.write_bytes(b"".join(broken))
        with pytest.raises(ValueError, match=message):
            read_record(folder)


def test_a_damaged_last_line_costs_that_line(folder):
    path = folder / "traces.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    kept = len(lines) - 1
    spoiled = bytearray(lines[-1])
    spoiled[5] ^= 1
    for last in (bytes(spoiled), b"\n", b"{}\n", b"\0" * 40 + b"\n", lines[-1][:9], b"[" * 99_999):
        path.write_bytes(b"".join([*lines[:-1], last]))
        record = read_record(folder)
        assert not record.complete and len(record.traces) == kept
        (note,) = record.notes
        assert f"traces.jsonl, line {len(lines)}: " in note and "left out" in note
    path.write_bytes(b"".join(lines))
    assert read_record(folder).notes == ()


def test_a_folder_has_one_writer(tmp_path):
    first = TraceRecorder(tmp_path / "a", Manifest(), 0)
    with pytest.raises(ValueError, match="another run writes"):
        TraceRecorder(tmp_path / "a", Manifest(), 0)
    first.close()
    assert sorted(os.listdir(tmp_path / "a")) == ["manifest.json", "traces.jsonl"]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / LOCK).touch()  # of a run that was killed
    TraceRecorder(tmp_path / "b", Manifest(), 0).close()
    with FolderLock(tmp_path / "new" / "c"):
        assert (tmp_path / "new" / "c").is_dir()
    assert not (tmp_path / "new").exists()


def test_a_lock_ends_with_its_process(tmp_path):
    code = "import sys, time; from falcon_h1r.reasoning.lock import FolderLock\n"
    code += "held = FolderLock(sys.argv[1]); print('held', flush=True); time.sleep(600)"
    other = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="another run writes"):
            TraceRecorder(tmp_path, Manifest(), 0)
        assert os.listdir(tmp_path) == [LOCK]
    finally:
        other.kill()
        other.wait()
    TraceRecorder(tmp_path, Manifest(), 0).close()


def test_a_short_write_is_an_error_and_leaves_no_part(tmp_path):
    writer = TraceRecorder(tmp_path, Manifest(), 0)
    path = tmp_path / "traces.jsonl"
    for trace in range(2):
        writer.start([trace], [1])
        writer.step(torch.tensor([trace]), torch.tensor([3]), torch.tensor([2.5]))
    writer.end(0, "stop", "first")
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 600, limits[1]))
    try:
        with pytest.raises(OSError, match=r"traces\.jsonl"):
            writer.end(1, "stop", "x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    writer.close({"done": "all"})
    record = read_record(tmp_path)
    assert record.complete and [trace.text for trace in record.traces] == ["first"]


def test_a_write_in_pieces_is_whole(tmp_path, monkeypatch):
    class Slow(io.FileIO):
        def write(self, content):
            return super().write(content[:7])

    monkeypatch.setattr(recorder, "open", lambda path, *_, **__: Slow(path, "ab"), raising=False)
    with TraceRecorder(tmp_path, Manifest(), 0) as writer:
        writer.start([0], [1])
    assert len(read_record(tmp_path).traces) == 1 and read_record(tmp_path).complete


def test_records_in_a_folder(tmp_path):
    pool = make_pool(1, 4)
    record_pool(pool, tmp_path / "all" / "b")
    record_pool(pool, tmp_path / "all" / "a")
    (tmp_path / "all" / "c").mkdir()
    assert find_records(tmp_path / "all") == [tmp_path / "all" / "a", tmp_path / "all" / "b"]
    assert find_records(tmp_path / "all" / "b") == [tmp_path / "all" / "b"]
    for wrong, message in ((tmp_path, "neither a trace record"), (tmp_path / "x", "no such")):
        with pytest.raises(ValueError, match=message):
            find_records(wrong)
