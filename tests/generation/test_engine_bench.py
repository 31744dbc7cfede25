"""benchmarks/bench_engine.py, and by it what a trace takes in memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "bench_engine.py"


def bench(*argv):
    return subprocess.run([sys.executable, str(SCRIPT), *argv], capture_output=True, text=True)


def test_it_says_what_it_does_and_refuses_in_one_line():
    assert "continuous batching" in " ".join(bench("--help").stdout.split())
    for argv, words in ((["--rows", "0"], "positive"), (["--preset", "none"], "unknown preset")):
        done = bench("--parts", "steps", "--out", "/dev/null", *argv)
        assert done.returncode == 2 and words in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_trace_takes_what_its_plan_says(tmp_path):
    """64 traces of a 90M model, full to the last token: the resident set, within 5 %."""
    path = tmp_path / "out.jsonl"
    done = bench("--parts", "memory", "--prompt", "120", "--new", "8", "--out", str(path))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row for row in rows if row["record"] == "result"]
    assert [row["dtype"] for row in rows] == ["float32", "bfloat16"]
    for row in rows:
        assert row["traces"] == 64 and row["row_tokens"] == 129
        assert abs(row["ratio"] - 1) < 0.05


@pytest.mark.slow
def test_steps_and_crowd_are_timed_and_recorded(tmp_path):
    path = tmp_path / "out.jsonl"
    argv = ["--forms", "uncompiled", "--dtypes", "float32", "--rows", "1", "4", "--width", "4"]
    argv += ["--traces", "6", "--mean", "3", "--repeats", "1", "--seconds", "0.1"]
    done = bench(*argv, "--parts", "steps", "crowd", "--prompt", "16", "--out", str(path))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row for row in rows if row["record"] == "result"]
    assert [row["part"] for row in rows] == ["steps", "steps", "crowd"]
    one, four, crowd = rows
    assert one["times_one_trace"] == 1.0
    assert four["tokens_per_second"] == pytest.approx(4 / four["seconds"]["p50"])
    for row in (one, four):
        assert 0.5 < sum(row["share"].values()) < 1.1 and 20 < row["nucleus_of_prompt"] < 80
    assert set(crowd["seconds"]) == {"continuous", "static"} and crowd["traces"] == 6
