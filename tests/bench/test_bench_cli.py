"""`falcon-h1r bench`: what reaches stdout, stderr and the file; refusals; exit statuses."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny_cli import run

from falcon_h1r.bench import gate, machine
from falcon_h1r.commands import bench
from falcon_h1r.ops import TORCH

SHAPES = ["--model-shape", "h1r-pico", "--prefill", "1x5", "--decode", "2@9", "--seconds", "0.001"]


@pytest.fixture(autouse=True)
def _small_ceilings(monkeypatch):
    monkeypatch.setattr(machine, "CPU_SIZES", (2**12, 2**16))
    monkeypatch.setattr(machine, "CPU_MATRIX", 32)


def bench_run(capsys, tmp_path, kind, *argv):
    out = tmp_path / "new" / "out.jsonl"
    status, stdout, err = run(capsys, "bench", kind, *SHAPES, "--out", out, *argv)
    records = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    return status, stdout, err, records


def test_ops_prints_a_table_and_keeps_the_records(capsys, tmp_path):
    picture = tmp_path / "roofline.png"
    argv = ["--ops", "rms_norm", "ssd_step", "--dtype", "float32", "bfloat16", "--plot", picture]
    status, out, _, records = bench_run(capsys, tmp_path, "ops", *argv)
    assert status == 0 and picture.stat().st_size > 10_000
    assert "measured ceiling" in out and "ssd_step h1r-pico decode 2@9 bfloat16" in out
    assert "command: bench ops --ops rms_norm ssd_step" in out
    assert out.count("not run: triton: needs a GPU") == 1, "not in every case"
    assert f"{len(records)} records appended" in out
    cases = {(r["op"], r["phase"], r["dtype"]) for r in records if r["record"] == "result"}
    assert cases == {
        (*case, dtype)
        for case in (("rms_norm", "prefill"), ("rms_norm", "decode"), ("ssd_step", "decode"))
        for dtype in ("float32", "bfloat16")
    }


def test_json_is_one_document_on_stdout(capsys, tmp_path):
    status, out, err, records = bench_run(capsys, tmp_path, "ops", "--op", "swiglu", "--json")
    document = json.loads(out)
    assert status == 0 and out.count("\n") == 1 and document["records"] == records
    assert document["wrong"] == 0 and Path(document["file"]).exists()
    assert "swiglu h1r-pico prefill" in err
    assert Path(document["file"]).with_suffix(".png").stat().st_size > 10_000, "one per run"


def test_layer(capsys, tmp_path):
    status, out, _, records = bench_run(capsys, tmp_path, "layer", "--resume", "1x3@4")
    assert status == 0 and "layer h1r-pico resume 1x3@4 bfloat16" in out
    timed = [r for r in records if r.get("status") == "timed"]
    assert {r["implementation"] for r in timed} == {"reference", "torch", "transformers"}
    assert {r["phase"] for r in timed} == {"prefill", "resume", "decode"}


@pytest.mark.parametrize("source", ["shape", "model"])
def test_generate(capsys, tmp_path, source):
    argv = SHAPES[2:] if source == "model" else SHAPES
    argv = [*argv, "--model", "h1r-pico"] if source == "model" else argv
    path = tmp_path / "out.jsonl"
    argv = [*argv, "--dtype", "float32", "--skip", "torch, compiled"]
    status, out, _ = run(capsys, "bench", "generate", *argv, "--out", path)
    assert status == 0 and "tokens/s" in out and "generate h1r-pico decode 2@9 float32" in out
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["tokens_per_second"] > 0 for r in rows if r.get("status") == "timed"] == [True] * 6


def test_generate_with_some_only(capsys, tmp_path):
    path = tmp_path / "out.jsonl"
    argv = [*SHAPES, "--out", path, "--limit", "9", "--peers", "--only", "torch", "transformers"]
    status, out, _ = run(capsys, "bench", "generate", *argv)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    names = [r["implementation"] for r in rows if r["record"] == "result"]
    assert status == 0 and names == ["torch", "transformers"] * 2 and "x transformers [" in out
    _, out, _ = run(capsys, "bench", "generate", *argv, "--skip", "torch", "--json")
    document = json.loads(out)
    names = [r["implementation"] for r in document["records"] if r["record"] == "result"]
    assert names == ["transformers"] * 2


def test_a_wrong_implementation_of_ours_is_exit_status_1(capsys, tmp_path, monkeypatch):
    def wrong(case):
        return lambda x, weight_d, eps: TORCH.rms_norm(x, weight_d, eps) * 1.1

    monkeypatch.setattr(gate, "torch_form", wrong)
    status, out, _, records = bench_run(capsys, tmp_path, "ops", "--op", "rms_norm")
    assert status == bench.WRONG == 1
    assert "WRONG, not timed" in out and "2 results did not pass the correctness check" in out
    assert [r["status"] for r in records if r.get("implementation") == "torch"] == ["wrong"] * 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: ops|layer|generate"),
        (["ops", "--ops", "conv"], "no operator 'conv'; there are: rms_norm, "),
        (["ops", "--tune"], "--tune: give the operator with --op NAME"),
        (
            ["ops", "--tune", "--op", "rope", "--device", "cpu"],
            "--tune: kernels are tuned on a GPU",
        ),
        (["ops", "--device", "tpu"], "--device is 'tpu', expected cpu, cuda or cuda:N"),
        (["ops", "--device", "meta"], "--device is 'meta'"),
        (["layer", "--device", "cuda:99"], "--device cuda:99: torch sees "),
        (["layer", "--prefill", "4096"], "--prefill is '4096', expected BxL"),
        (["layer", "--prefill", "1x0"], "--prefill is '1x0', expected BxL"),
        (["layer", "--prefill", "1x4@2"], "--prefill is '1x4@2', expected BxL"),
        (["layer", "--resume", "1x4"], "--resume is '1x4', expected BxL@P"),
        (["layer", "--decode", "1x4"], "--decode is '1x4', expected B@N"),
        (["layer", "--decode", "1@1"], "N is at least 2"),
        (["layer", "--model-shape", "h2"], "'h2' is neither a folder nor one of: falcon-h1r-7b"),
        (["layer", "--seconds", "0"], "--seconds is 0.0, expected a number above 0"),
        (["layer", "--seconds", "nan"], "--seconds is nan"),
        (["layer", "--threads", "0"], "0 is below 1"),
        (["ops", "--plot", "/no/such/folder/x.png"], "--plot: the folder /no/such/folder does not"),
        (["ops", "--plot", "x.doc"], "--plot is 'x.doc', expected a name that ends in"),
        (["generate", "--model", "h1r-pico", "--model-shape", "tiny-90m"], "not with --model"),
        (["generate", "--revision", "main"], "--revision: only with --model"),
        (["generate", "--only", "torhc"], "no way to run a model is called 'torhc'"),
        (["generate", "--only", "llama.cpp"], "nobody is left to measure"),
        (["generate", "--limit", "0"], "--limit is 0.0, expected a number above 0"),
        (["generate", "--model-shape", "falcon-h1-34b", "--decode", "4096@262144"], "weights and"),
        (["ops", "--model-shape", "h1r-pico", "--resume", "1x4@4", "--op", "rope"], "no case"),
        (["layer", "--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_refusals_are_one_line_on_stderr_and_status_2(capsys, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, "bench", *argv)
    assert (status, out) == (2, "")
    assert err.startswith("falcon-h1r: error: ") and message in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_missing_matplotlib_is_said_before_anything_is_measured(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    argv = ["--plot", tmp_path / "x.png", "--op", "rope"]
    status, out, err, records = bench_run(capsys, tmp_path, "ops", *argv)
    assert (status, out, records) == (2, "", []) and "pip install matplotlib" in err
    status, out, _, records = bench_run(capsys, tmp_path, "ops", "--op", "rope")
    assert status == 0 and records and "no roofline drawn: matplotlib is not installed" in out
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.jsonl"]


def test_defaults(monkeypatch):
    from falcon_h1r.bench.registry import CPU_WORKLOADS, FAMILY, GPU_WORKLOADS
    from falcon_h1r.cli import build_parser
    from falcon_h1r.commands.bench_setup import find_budget, find_shapes, find_workloads

    cpu, gpu = torch.device("cpu"), torch.device("cuda")

    def parsed(*argv):
        return build_parser().parse_args(["bench", *argv])

    assert find_workloads(parsed("ops"), cpu) == list(CPU_WORKLOADS)
    assert find_workloads(parsed("ops"), gpu) == list(GPU_WORKLOADS)
    assert len(find_workloads(parsed("ops", "--quick"), gpu)) == 2
    assert list(find_shapes(parsed("layer"), cpu)) == ["falcon-h1r-7b"]
    assert list(find_shapes(parsed("generate"), cpu)) == ["falcon-h1-0.5b"]
    assert list(find_shapes(parsed("generate"), gpu)) == ["falcon-h1r-7b"]
    assert list(find_shapes(parsed("ops", "--model-shape", "family"), cpu)) == list(FAMILY)
    assert find_budget(parsed("ops", "--quick")).seconds < find_budget(parsed("ops")).seconds
    assert find_budget(parsed("ops", "--seconds", "3")).seconds == 3
    assert find_budget(parsed("generate", "--limit", "7")).limit == 7
