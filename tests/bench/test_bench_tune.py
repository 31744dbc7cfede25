"""Tuning: every configuration, on scratch copies, and a line that can be pasted."""

import functools
import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
from bench.tiny_bench import FakeClock, tiny_cases, tiny_session

from falcon_h1r.bench import report, tune
from falcon_h1r.bench.tune import Trial
from falcon_h1r.ops import TORCH

CASE = next(c for c in tiny_cases(["ssd_step"]))


def config(name, *dtypes):
    return SimpleNamespace(name=name, dtypes=dtypes or (torch.float32, torch.bfloat16))


def run(function, choices, seconds, case=CASE):
    """Tune with a clock that gives each configuration its time; returns records and text."""
    lines = []

    class Clock(FakeClock):
        def sample(self, call):
            call()
            return seconds[
                call.keywords.get(
                    "config",
                    call.func.keywords.get("config", "")
                    if isinstance(call.func, functools.partial)
                    else "",
                )
            ], None

    with report.Results(None, lines.append) as out:
        wrong = tune.tune(case, function, choices, tiny_session(results=out, clock=Clock()))
    return out.records, lines, wrong


def kernel(*args, config="", form="auto", **inputs):
    if config == "wrong":
        inputs["dt_bh"] = inputs["dt_bh"] * 2
    if config == "broken":
        raise ValueError("no configuration 'broken'")
    return TORCH.ssd_step(**inputs)


def choices(*names):
    return [Trial(name, {"config": name}) for name in names]


def test_the_best_configuration_is_named_with_the_line_that_uses_it():
    records, lines, wrong = run(kernel, choices("a", "b"), {"": 3.0, "a": 2.0, "b": 1.0})
    assert wrong == 0
    assert records[-1]["record"] == "best" and records[-1]["implementation"] == "b"
    assert records[-1]["median"] == 1.0
    assert "TRITON._replace(ssd_step=functools.partial(TRITON.ssd_step, config='b'))" in lines[-1]
    table = SimpleNamespace(_replace=lambda **fields: fields, ssd_step=kernel)
    made = eval(lines[-1].strip(), {"TRITON": table, "functools": functools})
    assert made["ssd_step"].keywords == {"config": "b"}


def test_the_default_may_be_the_best():
    _, lines, _ = run(kernel, choices("a"), {"": 1.0, "a": 2.0})
    assert lines[-1].startswith("best: default")


def test_wrong_and_broken_configurations_are_reported_and_never_best():
    times = {"": 3.0, "a": 2.0, "wrong": 0.1, "broken": 0.1}
    records, _, wrong = run(kernel, choices("a", "wrong", "broken"), times)
    status = {r["implementation"]: r["status"] for r in records if r["record"] == "result"}
    assert status == {"default": "timed", "a": "timed", "wrong": "wrong", "broken": "failed"}
    assert wrong == 2 and records[-1]["implementation"] == "a"


def test_the_fastest_of_each_table_are_tried_together():
    tables = [
        Trial("staged default", {"form": "staged"}, -1),
        Trial("staged a1", {"form": "staged", "config": "a1"}, 0),
        Trial("staged a2", {"form": "staged", "config": "a2"}, 0),
        Trial("staged b1", {"form": "staged", "config": "b1"}, 1),
        Trial("staged b2", {"form": "staged", "config": "b2"}, 1),
    ]
    times = {"": 5.0, "a1": 4.0, "a2": 3.0, "b1": 9.0, "b2": 4.5, "a2,b2": 2.0}
    records, lines, wrong = run(kernel, tables, times)
    assert wrong == 0 and records[-1]["implementation"] == "staged a2,b2"
    assert "form='staged', config='a2,b2'" in lines[-1]
    assert tune.combine([(tables[1], 4.0)], 5.0) is None


def test_trials_are_the_kernels_tables(monkeypatch):
    module = SimpleNamespace(CONFIGS=(config("x"), config("half", torch.float16)))
    monkeypatch.setitem(sys.modules, "some_kernels", module)
    monkeypatch.setattr(tune, "kernel", lambda case: SimpleNamespace(__module__="some_kernels"))
    assert tune.trials(CASE) == [Trial("x", {"config": "x"}, 0)]
    fused = SimpleNamespace(CONFIGS=(config("f"),))
    staged = SimpleNamespace(TABLES=((config("s"), config("h", torch.float16)), (config("t"),)))
    modules = {"falcon_h1r_kernels.ssd_fused": fused, "falcon_h1r_kernels.ssd_staged": staged}
    monkeypatch.setattr(tune.importlib, "import_module", modules.__getitem__)
    scan = next(c for c in tiny_cases(["ssd_scan"]))
    assert tune.trials(scan) == [
        Trial("fused default", {"form": "fused"}, -1),
        Trial("fused f", {"form": "fused", "config": "f"}, 0),
        Trial("staged default", {"form": "staged"}, -1),
        Trial("staged s", {"form": "staged", "config": "s"}, 0),
        Trial("staged t", {"form": "staged", "config": "t"}, 1),
    ]


@pytest.mark.parametrize("op", [c.op for c in {c.op: c for c in tiny_cases()}.values()])
def test_every_kernel_has_a_table(op):
    case = next(c for c in tiny_cases([op]) if c.op == op)
    found = tune.trials(case)
    assert len({c.name for c in found}) == len(found) > 0
    for module in tune.FORMS.get(op, {}).values():
        assert hasattr(importlib.import_module(f"falcon_h1r_kernels.{module[0]}"), module[1])


def test_no_tuning_on_a_cpu():
    with pytest.raises(ValueError, match="tuned on a GPU"):
        tune.run(CASE, tiny_session())
