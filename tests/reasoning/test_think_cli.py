"""`falcon-h1r think`, mostly over the deterministic engine, and h1r-pico on the real one."""

import dataclasses
import io
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from reasoning.fake_engine import FakeEngine
from reasoning.synthetic import make_pool, pool_of
from tiny_cli import Terminal, interrupting, run

from falcon_h1r.commands import common, think_view
from falcon_h1r.commands.policy import MARGIN
from falcon_h1r.ops import TORCH
from falcon_h1r.reasoning import (
    DeepConf,
    Equality,
    LiveRun,
    Offline,
    OnlinePolicy,
    Question,
    TraceRecorder,
    find_records,
    read_record,
    recorded_policy,
    replay,
    wilson_interval,
)
from falcon_h1r.reasoning.lock import LOCK, FolderLock

QUESTION = "What is 47+25-8?"


@pytest.fixture
def faked(monkeypatch):
    """The command over `FakeEngine`; `pools`: question number (by seed) -> traces."""
    state = SimpleNamespace(pools=[make_pool(3, 40)], options={}, budget=14, interrupt_at=())

    def make(prompt, seed):
        return state.pools[seed // state.budget][seed % state.budget]

    def engine(model, tokenizer=None, **options):
        state.options = {"model": model, "tokenizer": tokenizer, **options}
        rows = options["max_rows"]
        state.engine = FakeEngine(make, max_rows=rows, interrupt_at=state.interrupt_at)
        return state.engine

    monkeypatch.setattr("falcon_h1r.generation.Engine", engine)

    def load_model(args):
        common.settle_device(args)
        return SimpleNamespace(dtype=torch.float32, ops=TORCH)

    monkeypatch.setattr(common, "load_model", load_model)
    return state


NUMBERS = ["--k", 4, "--window", 5, "--warmup", 4, "--budget", 14, "--eta", 40, "--tau", 0.9]
NUMBERS += ["--rule", "exact"]
PARAMS = DeepConf(margin=MARGIN, k=4, window=5, warmup=4, budget=14, eta=40.0, tau=0.9)
ASK = ["think", QUESTION, *NUMBERS, "--seed", 0]


def expected(pool, params=PARAMS, rows=14, seed=0):
    exact = Equality("exact")
    policy = OnlinePolicy(
        params, seed=seed, equality=exact, extractor="boxed", stop_token_ids=(11, 228)
    )
    question = Question([1], policy)
    LiveRun(FakeEngine(lambda prompt, s: pool[s - seed], max_rows=rows), [question]).run()
    return policy.result()


def test_one_question(capsys, faked):
    status, out, err = run(capsys, *ASK, "--reference", "5.0")
    result = expected(faked.pools[0])
    lines = out.splitlines()
    assert status == 0 and result.answer == "5" and lines[0] == "answer: 5 (right)"
    assert lines[2].split() == ["answer", "traces", "weight", "share"]
    for line, candidate in zip(lines[3:], result.vote.candidates):
        total = sum(c.weight for c in result.vote.candidates)
        share = f"{100 * candidate.weight / total:.1f}"
        weight = f"{candidate.weight:.2f}"
        assert line.split() == [candidate.answer, str(len(candidate.traces)), weight, share, "%"]
    assert f"{len(result.traces)} of at most 14 traces: " in out
    for reason, name in (("stop", "end token"), ("low_confidence", "low confidence")):
        assert f"{result.count(reason)} {name}" in out
    whole = [t.tokens for t in result.traces if t.reason in ("stop", "stop_string", "length")]
    estimate = 14 * sum(whole) / len(whole)
    saved = 100 * (1 - result.tokens / estimate)
    assert (
        f"{result.tokens:,} tokens, {saved:.1f} % fewer than the {estimate:,.0f} estimated" in out
    )
    assert f"threshold {result.threshold:.3f}; window 5; seed 0" in out
    assert f"[threshold {result.threshold:.3f} after " in err and f"[{result.done}" not in out
    assert "rows" not in out  # no memory budget that would have limited them
    options = faked.options
    assert (options["max_rows"], options["graph"]) == (14, None)
    free = int(re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())[1]) * 1024
    assert 0.5 * free < options["memory_budget"] < 0.9 * free
    assert (options["tokenizer"], options["prefill_chunk"]) == (None, 512)


def test_engine_options(capsys, faked):
    argv = ["--rows", 3, "--memory", "1.5 GiB", "--prefill-chunk", 7, "--stop", "x", "--quiet"]
    status, out, err = run(capsys, *ASK, *argv)
    assert (status, out, err) == (0, expected(faked.pools[0], rows=3).answer + "\n", "")
    options = faked.options
    assert options["max_rows"] == 3 and options["memory_budget"] == 3 * 2**29
    assert options["prefill_chunk"] == 7 and options["tokenizer"] is not None


def test_a_long_compile_is_announced(capsys, faked):
    assert "compiling" not in run(capsys, *ASK)[2]
    status, _, err = run(capsys, *ASK, "--compile")
    assert status == 0 and f"[{common.COMPILING}]" in err and faked.options["graph"] is True
    assert run(capsys, *ASK, "--compile", "--quiet")[2] == ""


def test_json(capsys, faked, tmp_path):
    argv = ["--json", "--reference", "6", "--record", tmp_path / "r", "--temperature", 0.7]
    status, out, _ = run(capsys, *ASK, *argv)
    document = json.loads(out)
    result = expected(faked.pools[0])
    assert status == 0 and set(document) == set(
        "model question prompt prompt_tokens answer reference right extractor rule sampling seeds "
        "votes tokens estimated_tokens_of_all estimated_saved seconds tokens_per_second plan "
        "record result".split()
    )
    assert document["model"] == "h1r-pico" and document["question"] == QUESTION
    assert QUESTION in document["prompt"] and document["prompt"].endswith("assistant\n")
    assert document["answer"] == result.answer and document["right"] is False
    assert document["result"] == json.loads(json.dumps(result.to_dict()))
    votes = document["votes"]
    assert votes["voted"] == sum(len(c.traces) for c in result.vote.candidates) > 0
    assert (
        votes["traces"]
        == len(result.traces)
        == sum(votes[name] for name in ("ended", "stopped", "cut"))
    )
    assert votes["stopped"] == result.count("low_confidence") > 0
    assert document["tokens"] == result.tokens and document["seeds"] == list(
        range(len(result.traces))
    )
    saved = document["estimated_tokens_of_all"] - result.tokens
    assert document["estimated_saved"] == pytest.approx(saved) and saved > 0
    assert document["seconds"] > 0 and document["tokens_per_second"] > 0
    assert document["plan"]["limit"] == "max_rows" and "text" in document["plan"]
    sampling = document["sampling"]
    assert (sampling["temperature"], sampling["top_p"]) == (0.7, 0.95)
    record = read_record(document["record"])
    manifest = record.manifest
    assert manifest.policy == PARAMS.to_dict() and manifest.seed == 0 and manifest.k == 4
    assert (manifest.question, manifest.reference, manifest.rule) == (QUESTION, "6", "exact")
    assert manifest.prompt_tokens == document["prompt_tokens"] and manifest.stop_token_ids
    again = replay(record, PARAMS)
    assert again.online.to_dict() == result.to_dict() and again.right is False


@pytest.mark.parametrize(
    ("argv", "changes"),
    [
        (["--preset", "high"], {"eta": 90.0}),
        (["--policy", "deepconf-high"], {"eta": 90.0}),
        (["--policy", "deepconf", "--eta", 33], {"eta": 33.0}),
        (["--tail", 3, "--weight", "tail"], {"tail": 3, "weight": "tail"}),
        (["--percentile", 20], {"percentile": 20.0}),
        (["--percentile-method", "lower"], {"percentile_method": "lower"}),
        (["--tau", 0.6, "--min-voters", 5], {"tau": 0.6, "min_voters": 5}),
        (["--margin", 0.3], {"margin": 0.3}),
        (["--no-consensus"], {"tau": None}),
        (["--no-filter"], {"filter": False}),
        (["--no-filter-warmup"], {"filter_warmup": False}),
    ],
)
def test_every_number_of_deepconf(capsys, faked, argv, changes):
    base = ["--k", 4, "--window", 5, "--warmup", 4, "--budget", 14, "--seed", 0]
    status, out, _ = run(capsys, "think", QUESTION, *base, *argv, "--json", "--rule", "exact")
    values = {**DeepConf(margin=MARGIN, k=4, window=5, warmup=4, budget=14).to_dict(), **changes}
    result = json.loads(out)["result"]
    assert status == 0 and result["params"] == values
    assert result == json.loads(json.dumps(expected(faked.pools[0], DeepConf(**values)).to_dict()))


@pytest.mark.parametrize("name", ["majority", "mean", "lowest-group", "bottom-10", "tail"])
@pytest.mark.parametrize("eta", [None, 30])
def test_plain_sampling(capsys, faked, tmp_path, name, eta):
    argv = ["think", QUESTION, "--policy", name, "--budget", 14, "--k", 4, "--seed", 0, "--json"]
    argv += ["--window", 5, "--record", tmp_path / "r", "--rule", "exact"]
    status, out, err = run(capsys, *argv, *([] if eta is None else ["--eta", eta]))
    result = json.loads(out)["result"]
    keep_by = "lowest-group" if name == "majority" and eta else None
    policy = Offline(weight=name, keep=eta, keep_by=keep_by, window=5, budget=14)
    replayed = replay(read_record(tmp_path / "r"), policy)
    assert status == 0 and result["params"] == policy.to_dict() and result["done"] == "all"
    assert (result["answer"], result["tokens"]) == (replayed.answer, replayed.tokens)
    candidates = [dict(c._asdict(), traces=list(c.traces)) for c in replayed.vote.candidates]
    assert result["vote"]["candidates"] == candidates
    votes = json.loads(out)["votes"]
    assert votes["voted"] == sum(len(c["traces"]) for c in candidates)
    assert (votes["left_out"] > 0) == (eta is not None) and votes["stopped"] == votes["cut"] == 0
    record = read_record(tmp_path / "r")
    assert record.manifest.policy == policy.to_dict() and recorded_policy(record) == policy
    status, out, _ = run(capsys, "replay", tmp_path / "r", "--json")
    (row,) = json.loads(out)["policies"]
    assert row["policy"] == "recorded" and row["results"][0]["answer"] == replayed.answer
    assert row["results"][0]["voters"] == votes["voted"]


def test_defaults(capsys, faked, monkeypatch):
    faked.budget, faked.pools = 512, [make_pool(3, 512, k=20)]
    _, out, err = run(capsys, "think", QUESTION, "--json", "--seed", 0)
    params = json.loads(out)["result"]["params"]
    assert params == DeepConf(margin=MARGIN, window=8).to_dict()
    assert "[window 8: a group of 2048 is for traces of up to 64 Ki tokens; these have" in err
    faked.budget = 64
    argv = ["think", QUESTION, "--policy", "mean", "--json", "--seed", 0, "--max-new-tokens", 640]
    _, out, _ = run(capsys, *argv)
    params = json.loads(out)["result"]["params"]
    assert params == Offline(weight="mean", window=20, budget=64).to_dict()
    # A checkpoint that is greedy, and one that says nothing, are sampled as in the paper.
    for stored in ({"do_sample": False}, {}):
        monkeypatch.setattr(
            "falcon_h1r.checkpoint.read_generation_config", lambda folder, stored=stored: stored
        )
        _, out, _ = run(capsys, *argv)
        sampling = json.loads(out)["sampling"]
        assert (sampling["temperature"], sampling["top_p"]) == (0.6, 0.95)


def test_windows_that_never_fill(capsys, faked):
    argv = ["think", QUESTION, *NUMBERS, "--window", 2048, "--seed", 0]
    status, out, err = run(capsys, *argv)
    assert status == 0 and "none is ever stopped" in err
    assert "no trace was as long as the window: none could be stopped" in out


def test_ctrl_c_votes_over_what_there_is(capsys, faked, tmp_path):
    faked.interrupt_at = [30]
    status, out, _ = run(capsys, *ASK, "--record", tmp_path / "r", "--rows", 3)
    record = read_record(tmp_path / "r")
    assert status == 130 and "; interrupted\n" in out
    assert "fewer than" not in out
    assert record.complete and record.end["done"] == "interrupted"
    assert {t.reason for t in record.traces} == {"interrupted", "stop_string"}
    result = replay(record, PARAMS).online
    assert out.startswith(f"answer: {result.answer}\n") and result.done == "interrupted"
    faked.interrupt_at = [0]
    plot = tmp_path / "x.png"
    status, out, err = run(capsys, *ASK, "--json", "--plot", plot)
    assert status == 130 and json.loads(out)["answer"] is None and not plot.exists()
    assert "no picture" in err


def test_no_answer(capsys, faked):
    faked.pools = [pool_of([[5.0, 5.0]] * 14, [None] * 14)]
    argv = ["think", QUESTION, *NUMBERS, "--k", 1, "--window", 1, "--seed", 0]
    status, out, _ = run(capsys, *argv, "--reference", "5")
    assert status == 0 and out.startswith("no answer: no trace that came to its end gave one (wron")
    status, out, _ = run(capsys, *argv, "--json", "--reference", "5")
    assert status == 0 and (json.loads(out)["answer"], json.loads(out)["right"]) == (None, False)
    assert run(capsys, *argv, "--quiet")[:2] == (0, "no answer\n")
    # The surest gave none, all others lie below the threshold.
    confidences = [[3.0, 3.0], [3.0, 3.0], [3.0, 3.0], [5.0, 5.0], *[[1.0, 9.0]] * 10]
    faked.pools = [pool_of(confidences, ["1", "1", "2", None, *["1"] * 10])]
    status, out, _ = run(capsys, *argv, "--eta", 1)
    assert status == 0 and "no trace with a vote gave one; below the threshold 1 was the" in out
    assert "10 low confidence" in out and "the budget is used up" in out
    assert "0 of 14 traces voted: 4 came to their end, 3 of them with an answer, 3 of those" in out
    votes = json.loads(run(capsys, *argv, "--eta", 1, "--json")[1])["votes"]
    assert votes == {
        "traces": 14,
        "voted": 0,
        "ended": 4,
        "answered": 3,
        "left_out": 3,
        "stopped": 10,
        "cut": 0,
    }


def questions_file(path, count=5, **more):
    lines = [{"question": f"What is {i}+{i}?", "reference": 5.0} for i in range(count)]
    path.write_text("\n\n".join(json.dumps(line) for line in lines) + "\n")
    return path


def test_many_questions(capsys, faked, tmp_path):
    faked.pools = [make_pool(20 + i, 14) for i in range(5)]
    file = questions_file(tmp_path / "q.jsonl")
    argv = ["think", "--questions", file, *NUMBERS, "--record", tmp_path / "all"]
    status, out, err = run(capsys, *argv, "--json")
    document = json.loads(out)
    assert status == 0 and document["asked"] == document["done"] == 5
    assert faked.options["max_rows"] == 64 and faked.engine.most_rows > 14
    names = [f"q{2 * i + 1:05}" for i in range(5)]  # by line
    assert [row["name"] for row in document["questions"]] == names
    assert [path.name for path in find_records(tmp_path / "all")] == names
    right = tokens = 0
    for i, row in enumerate(document["questions"]):
        result = expected(faked.pools[i], rows=64, seed=14 * i)
        assert (row["answer"], row["tokens"]) == (result.answer, result.tokens)
        assert row["right"] is (result.answer == "5") and row["done"] == result.done
        record = read_record(row["record"])
        assert record.manifest.seed == 14 * i and record.manifest.question == f"What is {i}+{i}?"
        assert replay(record, PARAMS).online.to_dict() == result.to_dict()
        right, tokens = right + row["right"], tokens + row["tokens"]
        assert row["voted"] == sum(len(c.traces) for c in result.vote.candidates)
        assert f"[{row['name']}: {row['answer']}, " in err
        assert f"; {row['voted']} of {row['traces']} traces voted, {row['tokens']:,} tok" in err
    assert (document["right"], document["judged"], document["tokens"]) == (right, 5, tokens)
    assert document["accuracy"] == right / 5 and document["tokens_made"] == tokens
    assert document["interval_95"] == list(wilson_interval(right, 5))
    # Complete records are not asked again, and what is said of them is the same.
    faked.engine = None
    status, out, err = run(capsys, *argv, "--json")
    again = json.loads(out)
    assert status == 0 and faked.engine is None and "5 of 5 questions have a complete" in err
    assert again["questions"] == document["questions"] and again["tokens_made"] == 0
    status, out, _ = run(capsys, *argv)
    table = {line[:9].strip(): line[11:] for line in out.splitlines()}
    assert table["questions"] == "5 of 5" and table["right"] == f"{right} of 5"
    low, high = (100 * bound for bound in wilson_interval(right, 5))
    assert table["accuracy"] == f"{20 * right:.1f} % (95 % Wilson: {low:.1f} to {high:.1f} %)"
    # Other numbers, another file: not the same records.
    status, out, err = run(capsys, *argv, "--min-voters", 3)
    assert (status, out) == (2, "") and "q00001: holds a record with another policy" in err
    file.write_text(file.read_text().replace("0+0", "1+0"))
    status, _, err = run(capsys, *argv)
    assert status == 2 and "another question, prompt;" in err


def test_many_questions_are_taken_up_again(capsys, faked, tmp_path):
    faked.pools = [make_pool(20 + i, 14) for i in range(5)]
    file = questions_file(tmp_path / "q.jsonl")
    argv = ["think", "--questions", file, *NUMBERS, "--rows", 2, "--json"]
    _, out, _ = run(capsys, *argv, "--record", tmp_path / "whole")
    faked.interrupt_at = [150]
    status, out, _ = run(capsys, *argv, "--record", tmp_path / "parts")
    cut = json.loads(out)
    assert status == 130 and 0 < cut["done"] < 5
    assert cut["questions"][-1]["done"] == "interrupted"
    faked.interrupt_at = ()
    half = find_records(tmp_path / "parts")[cut["done"]]
    assert read_record(half).end["done"] == "interrupted"
    # One that was killed has no last line.
    lines = (half / "traces.jsonl").read_bytes().splitlines(keepends=True)
    (half / "traces.jsonl").write_bytes(b"".join(lines[:-1]))
    status, out, err = run(capsys, *argv, "--record", tmp_path / "parts")
    document = json.loads(out)
    assert status == 0 and document["done"] == 5
    assert f"{half.name}: its record was cut short, it is asked anew" in err
    for mine, other in zip(
        find_records(tmp_path / "parts"), find_records(tmp_path / "whole"), strict=True
    ):
        mine, other = read_record(mine), read_record(other)
        assert mine.complete and mine.end["done"] != "interrupted"
        assert replay(mine, PARAMS).answer == mine.end["answer"]
        # The same, but for what depends on who else was running: when a consensus came.
        assert mine.manifest == other.manifest
        short = min(len(mine.traces), len(other.traces))
        for one, two in zip(mine.traces[:short], other.traces):
            both = min(len(one), len(two))
            assert torch.equal(one.tokens[:both], two.tokens[:both])
    assert document["tokens_made"] < document["tokens"]


def test_many_questions_without_references(capsys, faked, tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_text('{"question": "2+3?", "id": 1}\n')
    status, out, err = run(capsys, "think", "--questions", file, *NUMBERS)
    assert status == 0 and "right" not in out + err and "accuracy" not in out
    assert run(capsys, "think", "--questions", file, *NUMBERS, "--quiet")[2] == ""


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([QUESTION, "--budget", 8], "budget is 8, expected at least warmup, 16"),
        ([], "no question"),
        (["  "], "the question is empty"),
        ([QUESTION, "--max-new-tokens", 1010], "more than max_position_embeddings 1024"),
        (["x" * 3000], "more than max_position_embeddings 1024"),
        ([QUESTION, "--k", 305], "k is 305, the vocabulary has 304 tokens"),
        ([QUESTION, "--policy", "mean", "--k", 305], "k is 305"),
        ([QUESTION, "--preset", "medium"], "invalid choice: 'medium'"),
        ([QUESTION, "--policy", "median"], "invalid choice: 'median'"),
        ([QUESTION, "--policy", "mean", "--tau", 0.5], "--tau: the policy mean has none"),
        ([QUESTION, "--policy", "mean", "--no-filter"], "--filter: the policy mean has none"),
        ([QUESTION, "--policy", "mean", "--preset", "low"], "--preset: of DeepConf"),
        ([QUESTION, "--policy", "deepconf", "--preset", "low"], "give one of the two"),
        ([QUESTION, "--tau", 0.5, "--no-consensus"], "--no-consensus: not with --tau"),
        ([QUESTION, "--tau", 2], "tau is 2.0"),
        ([QUESTION, "--weight", "median"], "weight is 'median'"),
        ([QUESTION, "--percentile-method", "odd"], "percentile_method is 'odd'"),
        ([QUESTION, "--margin", -1], "margin is -1.0"),
        ([QUESTION, "--temperature", 0], "all traces would be the same"),
        ([QUESTION, "--extractor", "box"], "extractor 'box'"),
        ([QUESTION, "--memory", "8 gigs"], "expected a number and one of"),
        ([QUESTION, "--rows", 0], "0 is below 1"),
        ([QUESTION, "--raw", "--system", "x"], "--system: not with --raw"),
        ([QUESTION, "--record-top", 3], "--record-top: only with --record"),
        ([QUESTION, "--record", "REC", "--record-top", 21], "--record-top is 21, expected 0 .. 20"),
        ([QUESTION, "--record", "HELD"], "already holds a trace record"),
        ([QUESTION, "--record", "FILE"], "is no folder"),
        ([QUESTION, "--plot", "x.txt"], "must end with one of"),
        ([QUESTION, "--plot", "/nowhere/x.png"], "/nowhere is no folder"),
        ([QUESTION, "--questions", "FILE"], "a question: not with --questions"),
        (["--questions", "FILE", "--reference", "5"], "--reference: not with --questions"),
        (["--questions", "FILE", "--plot", "x.png"], "--plot: not with --questions"),
        (["--questions", "EMPTY"], "holds no questions"),
        (["--questions", "/nowhere.jsonl"], "nowhere.jsonl"),
        (["--questions", "FILE"], "line 1: not JSON"),
        (["--questions", "WRONG"], "line 2: expected {"),
        (["--questions", "WRONG2"], "neither a text nor a number"),
        (["--questions", "LONG"], "q00001: 3"),
        ([QUESTION, "--model", "/nowhere"], "nowhere"),
    ],
)
def test_refusals_before_the_weights_are_read(capsys, tmp_path, monkeypatch, argv, message):
    held = tmp_path / "held"
    held.mkdir()
    (held / "manifest.json").write_text("{}")
    contents = {
        "FILE": "x",
        "EMPTY": "\n",
        "WRONG": '{"question": "x"}\n{"question": ""}\n',
        "WRONG2": '{"question": "x", "reference": [1]}\n',
        "LONG": json.dumps({"question": "x" * 3000}) + "\n",
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    places = {"HELD": held, "REC": tmp_path / "rec", **{n: tmp_path / n for n in contents}}
    monkeypatch.setattr(common, "load_model", lambda args: pytest.fail("the weights were read"))
    monkeypatch.setattr(sys, "stdin", Terminal())
    status, out, err = run(capsys, "think", *(places.get(a, a) for a in argv))
    assert (status, out) == (2, "")
    assert err.startswith("falcon-h1r: error: ") and message in err and err.count("\n") == 1
    assert not (tmp_path / "rec").exists()


def test_a_missing_package_is_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "math_verify", None)
    for argv, message in (
        (["--plot", tmp_path / "x.png"], "--plot needs matplotlib"),
        (["--rule", "math-verify"], "not installed"),
    ):
        status, out, err = run(capsys, "think", QUESTION, *argv)
        assert (status, out) == (2, "") and message in err and err.count("\n") == 1


def test_a_memory_budget_that_holds_nothing(capsys, tmp_path):
    argv = ["think", QUESTION, "--memory", "100kB", "--record", tmp_path / "r"]
    status, out, err = run(capsys, *argv)
    assert (status, out) == (2, "") and "memory_budget is" in err
    assert err.splitlines()[-1].startswith("falcon-h1r: error: ")
    assert not (tmp_path / "r").exists()


def test_memory_sizes():
    from falcon_h1r.commands.think_setup import memory_size

    sizes = {"8GiB": 2**33, "0.5 MB": 500_000, "1000": 1000, "2TB": 2 * 10**12, "3kB": 3000}
    assert {text: memory_size(text) for text in sizes} == sizes
    assert memory_size("1KiB") == 1024 and memory_size("7B") == 7


def rendered(table, width):
    from rich.console import Console

    console = Console(width=width, file=io.StringIO())
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def paused(steps, seed=0):
    """A view and a run after so many steps."""
    pool = pool_of(
        [[3.0] * 4, [5.0] * 4, [2.0] * 4, [4.25] * 6, [6.0] * 3], ["5", "5", "5", "1,000", "5"]
    )
    params = DeepConf(margin=MARGIN, k=1, window=2, warmup=2, budget=5, eta=90.0, tau=None)
    policy = OnlinePolicy(params, seed=0)
    run = LiveRun(FakeEngine(lambda prompt, s: pool[s], max_rows=4), [Question([1], policy)])
    for _ in range(steps):
        run.step()
    tokenizer = SimpleNamespace(decode=lambda ids: "so \\boxed{5" + "}" * (len(ids) > 2))
    view = think_view.View(SimpleNamespace(quiet=False), tokenizer, "boxed", Terminal())
    return view, run


def test_the_table_of_running_traces(monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setattr(think_view.View, "_rate", lambda self, question: 1234.4)
    view, run = paused(7)
    table = rendered(view.table(run), 60)
    body = [line for line in table.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in line.strip("│").split("│")] for line in body] == [
        ["3", "3", "4.250", "4.250", "5", "running"],
        ["4", "3", "6.000", "6.000", "5", "end token"],
        ["2", "2", "2.000", "2.000", "-", "low confidence"],
        ["1", "4", "5.000", "5.000", "5", "end token"],
        ["0", "4", "3.000", "3.000", "5", "end token, low"],
    ]
    assert max(map(len, table.splitlines())) <= 60
    rows = think_view.trace_rows(run.open[0], lambda number: None, 9)
    assert [row.trace for row in rows if row.low] == ["2", "0"]
    assert [row.trace for row in think_view.trace_rows(run.open[0], str, 2)] == ["3", "4"]
    assert "1 running, 5 of 5 begun; 16 tokens, 1,234/s" in table
    assert "threshold 3.200; 5 has 100.0 % of 2 voters" in " ".join(table.split())
    view, run = paused(1)
    assert "│ warm-up │" in rendered(view.table(run), 60)


def test_the_table_of_many_questions():
    pytest.importorskip("rich")
    view, run = paused(3)
    run.open[0].name = "q00001"
    assert "2 running, 2 of 5 begun; 6 tokens" in rendered(view.table(run), 60)
    text = rendered(view.table(run), 40)  # the name stays whole
    assert "q00001" in text and "2 running, 2 of 5" in text
    assert max(map(len, text.splitlines())) == 40


def test_a_live_view_on_a_terminal(capsys, faked, monkeypatch):
    monkeypatch.setattr(think_view, "REFRESH", 0.0)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    status, out, _ = run(capsys, *ASK)
    assert status == 0 and "warm-up" in terminal.getvalue() and "tokens" in terminal.getvalue()
    # Without rich a line that is written over, and wiped at the end.
    monkeypatch.setitem(sys.modules, "rich.live", None)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    status, plain, _ = run(capsys, *ASK)
    assert status == 0 and plain.splitlines()[:5] == out.splitlines()[:5]
    assert "\r4 running, 4 of 14 begun; 4 tokens" in terminal.getvalue()
    *_, wiped, last = terminal.getvalue().split("\r")
    assert wiped.isspace() and last == ""


def test_status_lines_elsewhere(capsys, faked, monkeypatch):
    monkeypatch.setattr(think_view, "REPORT", 0.0)
    _, _, err = run(capsys, *ASK)
    header, *lines = err.splitlines()
    assert header == "[h1r-pico on cpu: float32, torch operators]"
    assert lines[0].startswith("[4 running, 4 of 14 begun; 4 tokens")
    assert sum(line.startswith("[threshold ") for line in lines) == 1
    assert all("\r" not in line and line.startswith("[") for line in lines)


def test_pictures(capsys, faked, tmp_path, monkeypatch):
    kept, read = [], TraceRecorder.close

    def close(self, result):
        kept.append(self)
        read(self, result)

    monkeypatch.setattr(TraceRecorder, "close", close)
    status, _, err = run(capsys, *ASK, "--plot", tmp_path / "x.png", "--reference", "5")
    assert status == 0 and f"[picture: {tmp_path / 'x.png'}]" in err
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]
    # What it was drawn from is gone, and held no alternatives that nobody would have read.
    assert not kept[0].folder.exists() and "top_ids" not in kept[0]._buffers


# h1r-pico on the real engine.


def test_pico_out_of_the_box(capsys, tmp_path):
    argv = ["think", QUESTION, "--reference", "64", "--json", "--seed", 5]
    status, out, err = run(capsys, *argv, "--record", tmp_path / "r")
    document = json.loads(out)
    assert status == 0 and document["answer"] == "64" and document["right"] is True
    result = document["result"]
    assert result["done"] == "consensus" and len(result["traces"]) == 16
    record = read_record(tmp_path / "r")
    again = replay(record, DeepConf(margin=MARGIN, window=8))
    assert again.order == "recorded"
    assert json.loads(json.dumps(again.online.to_dict())) == result


HARD = "What is 362-14-7+91*32+71*90?"


def test_a_live_run_of_pico_is_its_replay(capsys, tmp_path):
    argv = ["think", HARD, "--json", "--seed", 5, "--budget", 40, "--no-consensus", "--rows", 12]
    argv += ["--k", 4, "--record", tmp_path / "r", "--rule", "exact"]
    status, out, _ = run(capsys, *argv)
    result = json.loads(out)["result"]
    assert status == 0 and len(result["traces"]) == 40
    record = read_record(tmp_path / "r")
    params = DeepConf(margin=MARGIN, k=4, window=8, budget=40, tau=None)
    assert json.loads(json.dumps(replay(record, params).online.to_dict())) == result
    assert {trace["reason"] for trace in result["traces"]} == {"stop", "low_confidence"}
    # Confidences from full logits of the plain model, in float64.
    from models import load

    from falcon_h1r.text import load_tokenizer

    folder = common.locate("h1r-pico")
    model, tokenizer = load(folder, dtype=torch.float64), load_tokenizer(folder)
    ids = tokenizer.encode(record.manifest.prompt, add_special_tokens=False)
    assert len(ids) == record.manifest.prompt_tokens
    for trace in record.traces[::9]:
        whole = torch.tensor([[*ids, *trace.tokens.tolist()]])
        with torch.no_grad():
            logits = model(whole)[0, len(ids) - 1 : -1]
        exact = -logits.log_softmax(-1).topk(4).values.mean(-1)
        assert math.isclose((exact - trace.confidence.double()).abs().max(), 0, abs_tol=1e-4)
        assert trace.text == "" or trace.text == tokenizer.decode(trace.tokens[:-1])


def test_ctrl_c_in_a_step_of_pico(capsys, tmp_path, monkeypatch):
    interrupting(monkeypatch, 30)
    status, out, _ = run(capsys, "think", HARD, "--seed", 5, "--record", tmp_path / "r")
    monkeypatch.undo()
    record = read_record(tmp_path / "r")
    assert status == 130 and out.startswith("no answer: ") and record.complete
    assert [t.reason for t in record.traces] == ["interrupted"] * 16
    params = DeepConf(margin=MARGIN, window=8)
    result = replay(record, params).online
    assert result.done == "interrupted" and result.tokens == record.tokens > 0


def test_pico_in_little_memory(capsys):
    argv = ["think", QUESTION, "--seed", 5, "--memory", "3MiB"]
    status, out, _ = run(capsys, *argv)
    assert status == 0 and out.startswith("answer: 64\n")
    last = out.splitlines()[-1]
    assert last.startswith("memory budget 3 MiB: ") and last.endswith("limited by memory_budget")


@pytest.mark.parametrize("many", [False, True])
def test_a_second_run_on_a_record_is_refused(capsys, faked, tmp_path, many):
    folder = tmp_path / "r"
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": QUESTION}) + "\n")
    ask = ["think", "--questions", tmp_path / "q.jsonl", *NUMBERS] if many else ASK
    with FolderLock(folder):
        status, out, err = run(capsys, *ask, "--record", folder, "--quiet")
        assert (status, out) == (2, "") and err.count("\n") == 1
        assert f"{folder}: another run writes its records there" in err
        assert [path.name for path in folder.iterdir()] == [LOCK]
    assert run(capsys, *ask, "--record", folder, "--quiet")[0] == 0
    assert not (folder / LOCK).exists()
    assert all(read_record(path).complete for path in find_records(folder))


def test_a_damaged_last_line_is_noted(capsys, faked, tmp_path):
    folder = tmp_path / "r"
    run(capsys, *ASK, "--record", folder, "--quiet")
    with open(folder / "traces.jsonl", "r+b") as file:
        file.truncate(file.seek(0, io.SEEK_END) - 5)
    status, out, err = run(capsys, "replay", folder)
    assert status == 0 and "recorded" in out and "cut short, left out" in err


def test_think_and_replay_have_the_same_options_of_a_policy():
    """Whatever `think` may be told of its policy, `replay` may too."""
    from falcon_h1r.cli import build_parser

    parsers = next(iter(build_parser()._subparsers._group_actions)).choices
    of = {
        name: {o for a in parsers[name]._actions for o in a.option_strings}
        for name in ("think", "replay")
    }
    fields = {f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(DeepConf)}
    flags = {"--no-consensus", "--no-filter", "--no-filter-warmup"}
    assert fields - {"--filter", "--filter-warmup"} | flags <= of["think"] & of["replay"]


@pytest.mark.parametrize(
    "argv",
    [
        ["--tail", 3, "--weight", "tail"],
        ["--percentile", 20, "--percentile-method", "lower"],
        ["--margin", 0.3, "--min-voters", 5],
        ["--no-consensus", "--no-filter", "--no-filter-warmup"],
        ["--preset", "low-authors"],
    ],
)
def test_a_replay_with_the_options_of_a_run_is_the_run(capsys, faked, tmp_path, argv):
    base = ["--k", 4, "--window", 5, "--warmup", 4, "--budget", 14, "--rule", "exact"]
    whole = ["--policy", "majority", "--k", 4, "--window", 5, "--budget", 14, "--rule", "exact"]
    status, _, err = run(capsys, "think", QUESTION, *whole, "--seed", 0, "--record", tmp_path / "a")
    assert status == 0, err
    _, out, _ = run(capsys, "think", QUESTION, *base, "--seed", 0, *argv, "--json")
    live = json.loads(out)["result"]
    name = "deepconf-low-authors" if "--preset" in argv else "deepconf-low"
    options = [] if "--preset" in argv else argv
    argv = ["replay", tmp_path / "a", *base, "--policy", name, *options, "--parallel", 14, "--json"]
    status, out, err = run(capsys, *argv)
    assert status == 0, err
    (result,) = json.loads(out)["policies"][0]["results"]
    assert result["online"]["params"] == live["params"]
    assert (result["answer"], result["stopped"]) == (
        live["answer"],
        sum(trace["reason"] == "low_confidence" for trace in live["traces"]),
    )


def test_few_voters_of_a_consensus_are_told(capsys, faked):
    status, out, _ = run(capsys, *ASK, "--tau", 0.01)
    assert status == 0 and "the consensus is of" in out and "--min-voters asks for more" in out
    assert think_view.few_voters(4) == "" and "2 votes" in think_view.few_voters(2)


def test_a_margin_of_0_is_remarked(capsys, faked):
    _, _, err = run(capsys, *ASK, "--margin", 0)
    assert "[margin 0: the rounding of a confidence may decide which traces stop" in err
