"""The card, the ceilings, the records' schema, the table's lines, the picture."""

import json
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from bench.tiny_bench import (
    BUDGET,
    CEILINGS,
    CPU,
    TWO_GROUPS,
    FakeClock,
    temporary,
    tiny_cases,
    tiny_session,
)

from falcon_h1r.bench import contest, machine, operator_bench, plot, report
from falcon_h1r.bench.operators import Cost
from falcon_h1r.bench.registry import Workload

CARD = {"date": "2026-01-02 03:04 UTC", "device": "cpu", "cpu": "Some CPU (R) 3", "cores": 8}
CARD |= {"threads": 4, "packages": {"torch": "2.0"}}

NUMBER = (int, float)
SHARED = {
    "record": str,
    "bench": str,
    "op": str,
    "model": str,
    "phase": str,
    "batch": int,
    "length": int,
    "past": int,
    "dtype": str,
    "bytes_read": int,
    "bytes_written": int,
    "bytes": int,
    "flops": int,
    "bound": str,
    "implementation": str,
    "status": str,
    "reason": str,
}
TIMED = {
    "gate": dict,
    "seconds": dict,
    "rounds": int,
    "bytes_per_second": NUMBER,
    "flops_per_second": NUMBER,
    "percent_of_ceiling": NUMBER,
}


def run_ops(path, lines=None, **options):
    cases = tiny_cases(workloads=[Workload("prefill", 1, 5)], configs={"t": TWO_GROUPS}, **options)
    say = [].append if lines is None else lines.append
    with report.Results(path, say) as out:
        out.head(CARD, CEILINGS, {"clock": "fake"})
        wrong = operator_bench.run(cases, tiny_session(results=out))
    return out.records, wrong


def test_records_follow_the_schema_and_the_file_holds_them_all(tmp_path):
    path, lines = temporary(tmp_path, "results.jsonl"), []
    records, wrong = run_ops(path, lines)
    assert wrong == 0
    assert [json.loads(line) for line in path.read_text().splitlines()] == records
    assert [r["record"] for r in records[:2]] == ["machine", "ceilings"]
    assert records[0]["format"] == report.FORMAT and records[0]["cpu"] == CARD["cpu"]
    assert records[1]["matmul"]["bfloat16"] == 2e11
    assert records[1]["bandwidths"][0] == {"size": 2**20, "read": 4e9, "copy": 5e9}
    away = [r for r in records if r["record"] == "absent"]
    first = {"record": "absent", "implementation": "triton", "reason": "needs a GPU"}
    assert away[0] == first
    assert {"mamba_ssm", "flash_attn"} < {r["implementation"] for r in away}
    assert len(away) == len({r["implementation"] for r in away}), "once in a run"
    assert "\n".join(lines).count("needs a GPU") == 1
    results = records[2 + len(away) :]
    assert {r["record"] for r in results} == {"result"}
    for r in results:
        for name, kind in SHARED.items():
            assert isinstance(r[name], kind), (name, r)
        assert r["status"] in ("timed", "absent") and (r["status"] == "timed") == (not r["reason"])
        for name, kind in TIMED.items():
            assert isinstance(r[name], kind) if r["status"] == "timed" else name not in r
        assert set(r) <= set(SHARED) | set(TIMED) | {"times_torch"}
    timed = [r for r in results if r["status"] == "timed"]
    assert {"reference", "torch"} <= {r["implementation"] for r in timed}
    run_ops(path)
    assert len(path.read_text().splitlines()) == 2 * len(records), "a second run is appended"


def test_rates_are_the_costs_over_the_median():
    part = {"seconds": {"p20": 1e-3, "p50": 4e-3, "p80": 5e-3}}
    cost = Cost(read=3_000_000, written=1_000_000, flops=8_000_000)
    contest.rates(part, cost, torch.float32, CEILINGS)
    assert part["bytes_per_second"] == 1e9 and part["flops_per_second"] == 2e9
    # 4 MB at 2 GB/s (too large for the first array) take 2 ms; the FLOPs take 0.08 ms.
    assert part["percent_of_ceiling"] == pytest.approx(50)
    assert contest.bound_by(cost, torch.float32, CEILINGS) == "memory"
    assert contest.bound_by(cost._replace(flops=10**9), torch.float32, CEILINGS) == "compute"


def test_ceilings_depend_on_what_fits_where():
    assert CEILINGS.bandwidth(2**20) == 5e9 and CEILINGS.bandwidth(2**20 + 1) == 2e9
    assert CEILINGS.bandwidth(2**40) == 2e9
    assert CEILINGS.seconds(2**20, 10**11, torch.float32) == 1.0
    assert CEILINGS.seconds(2**20, 10**11, torch.bfloat16) == 0.5


def test_ceilings_are_measured(monkeypatch):
    """Bytes and FLOPs over the time: here every call takes half a second."""
    monkeypatch.setattr(machine, "CPU_SIZES", (2**10, 2**12))
    monkeypatch.setattr(machine, "CPU_MATRIX", 16)
    dtypes = [torch.float32, torch.bfloat16]
    found = machine.measure_ceilings(CPU, dtypes, FakeClock(), BUDGET)
    assert [(b.size, b.read, b.copy) for b in found.bandwidths] == [
        (2**10, 2**11, 2**12),
        (2**12, 2**13, 2**14),
    ]
    assert found.matmul == dict.fromkeys(dtypes, 2 * 16**3 / 0.5)
    assert json.dumps(found.to_json())


def test_the_card_names_the_machine():
    card = json.loads(json.dumps(machine.card(CPU)))
    assert card["packages"]["torch"] == torch.__version__ and card["device"] == "cpu"
    assert card["threads"] == torch.get_num_threads() and card["cores"] >= 1
    if machine.checkout() is not None:
        assert len(card["commit"].split()[0]) == 40


def test_the_card_of_a_gpu(monkeypatch):
    properties = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3",
        major=9,
        minor=0,
        multi_processor_count=132,
        total_memory=80 * 2**30,
        L2_cache_size=50 * 2**20,
        uuid="12ab",
    )
    known = {"driver_version": "570.1", "clocks.sm": "1980 MHz", "power.draw": "90.00 W"}
    asked = []

    def output(command):
        if command[0] != "nvidia-smi":
            return None
        asked.append(command)
        fields = next(part for part in command if part.startswith("--query-gpu=")).split("=")[1]
        return ", ".join(known.get(field, "1") for field in fields.split(","))

    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(machine, "_output", output)
    card = machine.card(gpu)
    assert card["gpu"]["capability"] == "9.0" and card["gpu"]["l2_mib"] == 50
    assert card["gpu"]["driver_version"] == "570.1"
    assert card["gpu_state"]["clocks.sm"] == "1980 MHz"
    assert all("--id=GPU-12ab" in command for command in asked)
    assert machine.short_name(card) == "nvidia-h100-80gb-hbm3"
    assert machine.state(gpu)["gpu_state"]["power.draw"] == "90.00 W"
    monkeypatch.setattr(machine, "_output", lambda command: None)
    silent = machine.card(gpu)
    assert "driver_version" not in silent["gpu"] and silent["gpu_state"] == {}


def test_a_busy_machine_is_named():
    assert machine.busy({"cores": 8, "load_average": 1.9}) == ""
    assert machine.busy({"cores": 2}) == ""
    assert "load average 3.0 on 8 cores" in machine.busy({"cores": 8, "load_average": 3.0})


def test_the_default_file(monkeypatch, tmp_path):
    name = "2026-01-02-some-cpu-r-3-8-cores.jsonl"
    monkeypatch.setattr(report, "checkout", lambda: tmp_path / "here")
    assert report.default_path(CARD) == tmp_path / "here" / "benchmarks" / "results" / name
    monkeypatch.setattr(report, "checkout", lambda: None)
    monkeypatch.chdir(tmp_path)
    assert report.default_path(CARD) == tmp_path / name


def test_lines_of_the_table():
    timed = {"status": "timed", "seconds": {"p20": 1e-4, "p50": 2e-4, "p80": 3e-2}}
    assert "200 us" in report.line("torch", timed) and "[100 us, 30.0 ms]" in report.line("", timed)
    rated = timed | {"percent_of_ceiling": 12.34, "bytes_per_second": 1.5e9}
    rated |= {"flops_per_second": 2.5e12, "times_torch": 1.25, "host_seconds": 2e-5}
    text = report.line("triton", rated | {"tokens_per_second": 1234.5})
    for piece in ("1.50", "2,500", "12.3 %", "1.25x torch", "1,234.5 tokens/s", "launch 20.0 us"):
        assert piece in text
    absent = report.line("fla", {"status": "absent", "reason": "not installed"})
    assert absent.split() == ["fla", "not", "run:", "not", "installed"]
    assert "WRONG, not timed: far off" in report.line("x", {"status": "wrong", "reason": "far off"})
    assert "FAILED: Oops" in report.line("x", {"status": "failed", "reason": "Oops"})
    assert [report.shown(s) for s in (1.5e-7, 5e-4, 0.5, 12.0)] == [
        "0.150 us",
        "500 us",
        "500 ms",
        "12.0 s",
    ]


def test_speed_is_compared_with_torchs():
    parts = {
        name: {"status": "timed", "reason": "", "seconds": {"p20": t, "p50": t, "p80": t}}
        for name, t in (("reference", 4.0), ("torch", 2.0), ("triton", 0.5))
    }
    with report.Results(None, lambda text: None) as out:
        out.table("title", {}, parts)
    assert [r["times_torch"] for r in out.records] == [0.5, 1.0, 4.0]


def test_who_is_away_is_said_once_in_a_run():
    lines = []
    results = report.Results(None, lines.append)
    results.absent({"a": "needs a GPU", "b": "not installed", "c": "needs a GPU"})
    results.absent({"a": "needs a GPU", "b": "serves no float64"})
    assert lines == [
        "not run: a, c: needs a GPU",
        "not run: b: not installed",
        "not run: b: serves no float64",
    ]
    assert [r["implementation"] for r in results.records] == ["a", "b", "c", "b"]


def test_a_case_without_memory_is_skipped_and_the_next_one_runs(tmp_path, monkeypatch):
    find = operator_bench.gate.find_expected

    def hungry(case, inputs):
        if case.op == "rope":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return find(case, inputs)

    monkeypatch.setattr(operator_bench.gate, "find_expected", hungry)
    records, wrong = run_ops(None, ops=["rope", "swiglu"])
    assert wrong == 0
    skipped = [r for r in records if r["record"] == "skipped"]
    assert [(r["op"], r["reason"]) for r in skipped] == [("rope", "out of memory")]
    assert any(r.get("op") == "swiglu" and r["status"] == "timed" for r in records)


def test_the_picture(tmp_path):
    records, _ = run_ops(None, ops=["rms_norm", "attention"])
    path = tmp_path / "roofline.png"
    plot.roofline(records, CEILINGS, CARD, path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000
    with pytest.raises(ValueError, match="nothing was timed"):
        plot.roofline(records[:2], CEILINGS, CARD, path)


def test_markers_tell_the_phases_and_a_legend_tells_the_markers(monkeypatch, tmp_path):
    from matplotlib.figure import Figure

    seen = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: seen.append(figure))
    timed = {"status": "timed", "bench": "ops", "op": "x", "implementation": "torch", "bytes": 10}
    phases = {"prefill": "full", "resume": "left", "decode": "none"}
    records = [
        timed | {"phase": phase, "flops": 10 * n, "flops_per_second": 1e9 * n}
        for n, phase in enumerate(phases, 1)
    ]
    plot.roofline(records, CEILINGS, CARD, tmp_path / "x.png")
    (axes,) = seen[0].axes
    dots = [line for line in axes.lines if len(line.get_xdata()) == 1]
    points = {line.get_ydata()[0]: line.get_fillstyle() for line in dots}
    assert points == {1e9 * n: fill for n, fill in enumerate(phases.values(), 1)}
    (legend,) = seen[0].legends
    words = [text.get_text() for text in legend.get_texts()]
    assert words == [
        *("operator", "x", "implementation", "torch"),
        *("phase", "prefill", "prefill behind a past", "decode"),
    ]
    fills = [handle.get_fillstyle() for handle in legend.legend_handles[-3:]]
    assert fills == list(phases.values())
    whole = [r | {"bench": "generate", "model": "m"} for r in records[:1]]
    plot.roofline(whole, CEILINGS, CARD, tmp_path / "x.png")
    assert [text.get_text() for text in seen[1].legends[0].get_texts()][:2] == ["model", "m"]


def test_a_long_name_does_not_break_the_table():
    lines, seconds = [], {"p20": 1.0, "p50": 1.0, "p80": 1.0}
    rates = {"percent_of_ceiling": 1.0, "bytes_per_second": 1.0, "flops_per_second": 1.0}
    part = {"status": "timed", "reason": "", "seconds": seconds, **rates}
    names = ("torch", "a_package_with_a_long_name.kernels:my_scan")
    report.Results(None, lines.append).table("title", {}, {name: dict(part) for name in names})
    heading, *rows = lines[1:]
    ends = [row.index("1.00 s") + len("1.00 s") for row in rows]
    assert ends == [heading.index("median") + len("median")] * 2


def test_without_matplotlib_the_command_that_helps_is_named(monkeypatch):
    assert find_spec("matplotlib")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        plot.require_matplotlib()
