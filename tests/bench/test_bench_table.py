"""The README's table, and the scripts that measure what it says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_cli import run

from falcon_h1r.bench import generation_table, machine

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """A script of benchmarks/ as a module."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr(sys, "path", list(sys.path))

    def load(name):
        monkeypatch.delitem(sys.modules, name, raising=False)
        return __import__(name)

    return load


def result(name, seconds, **changes):
    case = {"model": "m", "dtype": "float32", "phase": "decode", "batch": 8, "length": 1}
    case |= {"past": 2048, "record": "result", "bench": "generate", "implementation": name}
    timed = {"p20": seconds, "p50": seconds, "p80": seconds}
    case |= {"seconds": timed, "tokens_per_second": 8 / seconds, "percent_of_ceiling": 12.6}
    return case | changes


def over(**peers):
    return {name: {"p20": r - 0.1, "p50": r, "p80": r + 0.1} for name, r in peers.items()}


def test_the_best_of_ours_beside_each_peer():
    records = [
        {"record": "machine"},
        result("torch", 0.3, speed_over=over(transformers=1.5)),
        result("torch, onednn", 0.2, speed_over=over(transformers=2.25)),
        result("transformers", 0.45),
        result("llama.cpp", 0.1, record="result") | {"seconds": {"p50": 0.1}},
        result("torch", 0.01, phase="prefill", batch=1, length=2048, past=0, speed_over={}),
        result("torch", 0.01, phase="resume", batch=1, length=5, past=9, dtype="bfloat16"),
        {"record": "result", "bench": "layer"},
    ]
    records[2]["speed_over"] |= over(**{"llama.cpp": 0.5})
    records[-2]["speed_over"] = {}
    records[1]["percent_of_reading"] = over(p=99)["p"]
    records[2]["percent_of_reading"] = over(p=71.4)["p"]
    lines = generation_table.markdown(records).splitlines()
    assert lines[0] == "m, float32:" and "m, bfloat16:" in lines
    cells = [cell.strip() for cell in lines[4].strip("|").split("|")]
    assert cells == [
        "decode 8 x 1 behind 2,048",
        "200 ms (torch, onednn)",
        "40.0",
        "450 ms",
        "**2.25** [2.15, 2.35]",
        "100 ms",
        "**0.50** [0.40, 0.60]",
        "71 %",  # of reading memory
    ]
    assert lines[5].startswith("| prefill 2,048 | 10.0 ms (torch) | 800.0 | not run |  | not run |")
    assert lines[-1].startswith("| prefill 5 behind 9 | 10.0 ms") and lines[-1].endswith("13 % |")
    assert len({line.count("|") for line in lines[2:6]}) == 1
    assert generation_table.markdown([]) == ""


def test_a_case_that_was_skipped_is_said_to_be():
    skipped = result("x", 1.0, record="skipped")
    absent = {k: v for k, v in result("torch", 1.0, past=1).items() if k != "seconds"}
    lines = generation_table.markdown([skipped, absent]).splitlines()
    assert [line.split("|")[2].strip() for line in lines[4:]] == ["not run", "not run"]


def test_bench_cpu_runs_a_part_and_prints_the_table(monkeypatch, capsys, tmp_path, script):
    module, calls = script("bench_cpu"), []

    def main(argv):
        calls.append(argv)
        path = Path(argv[argv.index("--out") + 1])
        shape, dtype = (argv[argv.index(o) + 1] for o in ("--model-shape", "--dtype"))
        with path.open("a") as file:
            record = result("torch", 0.2, model=shape, dtype=dtype, speed_over={})
            file.write(json.dumps(record) + "\n")
        return 0

    monkeypatch.setattr(module, "main", main)
    path = tmp_path / "out.jsonl"
    path.write_text(json.dumps(result("torch", 0.1, model="older", speed_over={})) + "\n")
    argv = ["bench_cpu.py", "--out", str(path)]
    monkeypatch.setattr(sys, "argv", [*argv, "--dtypes", "float32", "--", "--seconds", "5"])
    assert module.run() == 0
    out = capsys.readouterr().out
    assert "older" not in out and out.index("tiny-90m, float32:") < out.index("falcon-h1-0.5b,")
    tiny, half = calls
    assert tiny[tiny.index("--prefill") + 1 :][:4] == list(module.PREFILL)
    assert half[half.index("--prefill") + 1 :][:4] == [*module.PREFILL[:3], "--decode"]
    assert tiny[tiny.index("--decode") + 1 :][:6] == list(module.DECODE)
    assert tiny[-2:] == ["--seconds", "5"] and "reference" in tiny and "--peers" in tiny
    calls.clear()
    options = ["--presets", "falcon-h1-0.5b", "--work", "decode", "1x8192", "--all"]
    monkeypatch.setattr(sys, "argv", [*argv, *options])
    assert module.run() == 0 and len(calls) == 2
    assert calls[0][calls[0].index("--prefill") + 1 :][:2] == ["1x8192", "--decode"]
    assert "reference" not in calls[0] and calls[1][calls[1].index("--dtype") + 1] == "bfloat16"


def test_bench_cpu_names_what_the_command_knows(capsys, tmp_path, monkeypatch, script):
    """Its options go through the command's own parser, shapes and workloads."""
    from falcon_h1r.cli import build_parser
    from falcon_h1r.commands import bench_setup

    module = script("bench_cpu")
    monkeypatch.setattr(machine, "CPU_SIZES", (2**12,))
    argv = ["bench", "generate", "--prefill", *module.PREFILL, "--decode", *module.DECODE]
    args = build_parser().parse_args([*argv, "--model-shape", *module.PRESETS])
    assert len(bench_setup.find_workloads(args, None)) == 10
    assert list(bench_setup.find_shapes(args, machine.torch.device("cpu"))) == list(module.PRESETS)
    argv += ["--model-shape", "tiny-90m", "--skip", "reference", "torhc"]
    assert "torhc" in run(capsys, *argv)[2]


def test_memory_estimates_and_ratios(script):
    module = script("bench_memory")
    rows = [
        {"way": "ours", "tokens": 10, "seconds": 2.0, "peak_bytes": 30},
        {"way": "ours, onednn", "tokens": 10, "seconds": 1.0, "peak_bytes": 25},
        {"way": "transformers", "tokens": 10, "seconds": 3.0, "peak_bytes": 100},
        {"way": "ours", "tokens": 20, "seconds": 7.0, "peak_bytes": 60},
    ]
    assert module.estimate(rows, "ours", 40) == 28.0
    assert module.estimate(rows, "transformers", 20) == 12.0
    assert module.estimate([], "ours", 20) == 0.0
    assert module.ratios(rows) == {10: 0.25}


@pytest.mark.slow  # processes that import torch and transformers
def test_peak_memory_is_what_a_prompt_takes():
    pytest.importorskip("transformers")
    command = [sys.executable, str(SCRIPTS / "bench_memory.py"), "--preset", "h1r-pico"]
    done = subprocess.run(
        [
            *command,
            "--tokens",
            "2048",
            "4096",
            "--limit",
            "0.001",
            "--ways",
            "ours",
            "transformers",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [row["way"] for row in found] == ["ours", "transformers"]
    assert "4,096 | ours | not run" in done.stdout
    # At least the cache; not the torch library, nor hundreds of times as much.
    for row in found:
        assert row["cache_bytes"] <= row["peak_bytes"] < 200 * 2**20 and row["seconds"] > 0


@pytest.mark.slow  # processes that import torch and transformers
def test_the_first_token_of_a_fresh_process():
    pytest.importorskip("transformers")
    command = [sys.executable, str(SCRIPTS / "bench_start.py"), "--repeats", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    (ours,), stages = found["runs"]["ours"], found["medians"]["ours"]
    assert 0.9 * ours["total"] < sum(stages.values()) <= ours["total"]
    assert found["ratio"] == ours["total"] / found["runs"]["transformers"][0]["total"]
