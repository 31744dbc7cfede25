"""`falcon-h1r parity`: its table, its judgement, its outputs."""

import json
import math
import re

import pytest
import torch
from models import make_config, make_model, random_ids
from tiny_cli import run, write_checkpoint

from falcon_h1r import ops
from falcon_h1r.ops import REFERENCE, TORCH
from falcon_h1r.study import parity_known as known
from falcon_h1r.study.budget import Budget, make_budget
from falcon_h1r.study.dump import take_dump
from falcon_h1r.study.faults import Patient
from falcon_h1r.study.faults_list import FAULTS, find
from falcon_h1r.study.parity import (
    compare,
    compared_names,
    make_inputs,
    transformers_peer,
)
from falcon_h1r.study.parity_files import write_report


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("parity") / "tiny")


# --- the table and its judgement ------------------------------------------------------------------


def report_of(variant="two_groups", paths=("prefill",), dtypes=("float32",), faults=(), **changes):
    model = make_model(make_config(variant, **changes), ops=TORCH)
    inputs = {path: make_inputs(model.config, path) for path in paths}
    names = compared_names(model.config)
    budget = make_budget(model, inputs, dtypes, {}, "tiny", names)
    tables = {"torch": TORCH}
    return compare(model, inputs, dtypes, tables, budget, transformers_peer(), faults=faults)


def test_ours_is_within_its_budget():
    report = report_of(paths=("chunked", "padded"), dtypes=("float32", "bfloat16"))
    assert not report.beyond
    rows = {(r.dtype, r.path, r.tensor): r for r in report.rows}
    assert len(rows) == len(report.rows) == 4 * len(compared_names(make_config()))
    row = rows["bfloat16", "chunked", "layers.1.mamba.scan.dt"]
    assert row.ratio == row.rms / row.peer_rms and row.peer_rms > 0 and row.max >= row.rms * 0.5
    assert rows["float32", "padded", "layers.0.contribution.ssm"].peer_rms is None


def test_errors_are_what_they_are_called():
    """Against a direct computation."""
    report = report_of()
    model = make_model(make_config(), ops=TORCH)
    ids = make_inputs(model.config, "prefill").ids
    exact = make_model(make_config(), ops=REFERENCE, dtype=torch.float64)(ids).detach()
    found = model(ids).detach().double() - exact
    row = next(row for row in report.rows if row.tensor == "logits")
    assert row.rms == pytest.approx(float(found.norm() / exact.norm()), rel=1e-6)
    assert row.max == pytest.approx(float(found.abs().max() / exact.abs().max()), rel=1e-6)


def test_a_planted_fault_is_beyond_and_named():
    report = report_of(faults=[find("mlp_multipliers[gate] dropped")])
    assert report.beyond[0].tensor == "layers.0.feed_forward.swiglu.out"
    where = report.divergences["ours torch", "float32", "prefill"]
    assert where.startswith("layers.0.feed_forward.swiglu: out (")


@pytest.mark.parametrize("fault", [f for f in FAULTS if f.needs == "prefill"][::6])
def test_any_fault_is_beyond_the_budget(fault):
    report = report_of("two_groups", faults=[fault], rope_theta=1e5, time_step_limit=(0.02, 0.05))
    assert report.beyond, fault.name


@pytest.mark.slow  # token by token in float64, five times
def test_ours_is_within_its_budget_in_decode():
    for variant in ("two_groups", "finite_dt_limit", "no_gated_norm"):
        assert not report_of(variant, ("prefill", "decode"), ("float32", "bfloat16")).beyond


# --- known differences ----------------------------------------------------------------------------


def keys(variant, path, dtype="float32", version="5.24.0", rows=3, **changes):
    config = make_config(variant, **changes)
    ids = random_ids(config, rows, 24)
    where = known.Where("transformers", version, config, dtype, make_inputs(config, path, ids))
    return {k.key for k in known.applying(where)}


def test_known_differences_appear_where_they_hold_and_nowhere_else():
    assert "clamp in decode" in keys("finite_dt_limit", "decode")
    for variant, path, version in (
        ("two_groups", "decode", "5.24.0"),
        ("finite_dt_limit", "prefill", "5.24.0"),
        ("finite_dt_limit", "chunked", "5.24.0"),
        ("finite_dt_limit", "padded", "5.24.0"),
        ("finite_dt_limit", "decode", "5.14.1"),
    ):
        assert "clamp in decode" not in keys(variant, path, version=version)
    padded = keys("all_biases", "padded")
    assert {"left padding with mamba_proj_bias", "state behind right padding"} <= padded
    assert "left padding with mamba_proj_bias" not in keys("two_groups", "padded")
    assert "left padding with mamba_proj_bias" not in keys("all_biases", "prefill")
    assert "state behind right padding" not in keys("all_biases", "decode")
    assert "softplus in the model's dtype" in keys("two_groups", "prefill", "bfloat16")
    assert "softplus in the model's dtype" not in keys("two_groups", "prefill")
    assert "gate alone in the model's dtype" in keys("no_gated_norm", "prefill", "bfloat16")
    assert "gate alone in the model's dtype" not in keys("two_groups", "prefill", "bfloat16")
    old = keys("two_groups", "chunked", "bfloat16", version="5.12.1")
    assert "pieces from a zero state" in old and "conv1d and act are not called" not in old
    assert "pieces from a zero state" not in keys("two_groups", "chunked", version="5.14.1")
    assert "steps with the gated norm" in keys("two_groups", "decode", version="5.22.2")
    assert "steps with the gated norm" not in keys("two_groups", "decode")
    assert "steps with the gated norm" not in keys("no_gated_norm", "decode", version="5.22.2")
    assert "padding unmasked at batch 1" in keys("two_groups", "padded", version="5.14.1", rows=1)
    assert "padding unmasked at batch 1" not in keys("two_groups", "padded", version="5.14.1")


def test_known_differences_are_of_the_peer_that_has_them():
    config, inputs = make_config(), make_inputs(make_config(), "prefill")
    where = known.Where("llama.cpp", "0.3", config, "bfloat16", inputs)
    found = {entry.key for entry in known.applying(where)}
    assert found == {"activations in float32", "multipliers folded"}
    narrow = known.applying(where._replace(dtype="float32"))
    assert {entry.key for entry in narrow} == {"multipliers folded"}
    assert known.applying(where._replace(peer="a file")) == []


def test_an_error_is_explained_at_its_cells_and_behind_them():
    report = report_of("finite_dt_limit", paths=("decode",))
    rows = {row.tensor: row for row in report.rows}
    dt = rows["layers.0.mamba.scan.dt"]
    assert "clamp in decode" in dt.notes and dt.peer_rms > 0.01 > dt.rms and not dt.peer_within
    assert not any("clamp" in note for note in rows["layers.0.mamba.conv.out"].notes)
    behind = {note for row in report.rows for note in row.notes if note.startswith("behind")}
    assert behind == {"behind: clamp in decode"} and behind <= set(rows["logits"].notes)
    assert not report.beyond
    where = report.divergences["transformers", "float32", "decode"]
    assert where.startswith("layers.0.mamba: dt_bias, softplus and clamp")


@pytest.mark.parametrize(
    ("variant", "path"),
    [("finite_dt_limit", "decode"), ("all_biases", "padded"), ("two_groups", "padded")],
)
def test_every_large_error_of_transformers_is_a_known_one(variant, path):
    """And, in float32, no cell that an error does not explain is far off."""
    report = report_of(variant, paths=(path,))
    errors = {k.key for k in known.KNOWN if k.error} | {"state behind right padding"}
    large = [row for row in report.rows if row.peer_rms is not None and row.peer_rms > 1e-5]
    assert large
    for row in large:
        assert {note.removeprefix("behind: ") for note in row.notes} & errors, row.tensor


def test_every_text_is_found_by_its_key():
    for entry in known.KNOWN:
        assert known.text_of(entry.key) == known.text_of(f"behind: {entry.key}") == entry.text
    assert len({entry.key for entry in known.KNOWN}) == len(known.KNOWN)


# --- the command ----------------------------------------------------------------------------------

QUICK = ("--paths", "prefill", "--dtype", "float32")


def test_status_0_and_the_numbers_in_json(capsys, checkpoint):
    status, out, err = run(capsys, "parity", "--model", checkpoint, *QUICK, "--json")
    document = json.loads(out)
    assert status == 0 and err == "" and document["within_budget"]
    import transformers

    assert document["against"] == f"transformers {transformers.__version__}"
    rows = {row["tensor"]: row for row in document["rows"]}
    assert 0 < rows["logits"]["rms"] <= rows["logits"]["tolerance"] < 1e-5
    assert rows["logits"]["parts"]["total"] == pytest.approx(rows["logits"]["rms"], rel=0.01)
    assert "float32 rotary angles" in rows["layers.0.self_attn.rope.q"]["notes"]
    assert set(document["known"]) >= {"float32 rotary angles"}


def test_status_1_when_an_operator_is_broken(capsys, checkpoint, monkeypatch):
    scan = TORCH.ssd_scan

    def broken(x, dt, A, B, C, D, **options):
        return scan(x, dt, A, B, C, D * 1.01, **options)

    table = TORCH._replace(ssd_scan=broken)
    monkeypatch.setattr(ops, "TORCH", table)
    status, out, _ = run(capsys, "parity", "--model", checkpoint, *QUICK, "--ops", "torch")
    assert status == 1
    last = out.strip().splitlines()[-1]
    assert "first at layers.0.mamba.scan.y" in last
    assert "first divergence layers.0.mamba.ssd_scan: y" in last


def test_dumps_go_out_and_come_in(capsys, checkpoint, tmp_path):
    path = tmp_path / "d.safetensors"
    options = ("--paths", "decode", "--dtype", "bfloat16", "--write-dump", path)
    assert run(capsys, "parity", "--model", checkpoint, *options)[0] == 0
    arguments = ("parity", "--model", checkpoint, "--against", path, "--json")
    status, out, _ = run(capsys, *arguments)
    rows = json.loads(out)["rows"]
    assert status == 0 and {row["path"] for row in rows} == {"decode"}
    assert all(row["rms"] == row["peer_rms"] for row in rows)
    assert {row["dtype"] for row in rows} == {"bfloat16"}


def test_a_faulty_dump_is_named_at_its_first_tensor(capsys, checkpoint, tmp_path):
    from tiny_cli import tiny_model

    from falcon_h1r.study.dump import write_dump

    model = tiny_model()
    patient = Patient(model, [find("gated norm not grouped")])
    dump = take_dump(patient, model, make_inputs(model.config, "prefill"))
    write_dump(tmp_path / "d.npz", dump)
    arguments = ("parity", "--model", checkpoint, "--against", tmp_path / "d.npz", "--json")
    status, out, _ = run(capsys, *arguments)
    document = json.loads(out)
    assert status == 0  # ours is judged, not the dump
    (where,) = document["first_divergence"]
    assert where["operator"].startswith("layers.0.mamba.gated_rms_norm: out (")


def test_every_form_of_the_report(capsys, checkpoint, tmp_path):
    report = report_of()
    facts = {"model": "tiny"}
    for suffix in (".md", ".json", ".html", ".svg"):
        write_report(report, facts, tmp_path / f"r{suffix}")
    path = tmp_path / "r.png"
    assert run(capsys, "parity", "--model", checkpoint, *QUICK, "--out", path)[0] == 0
    assert all(path.stat().st_size > 5000 for path in tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == 5
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    page = (tmp_path / "r.html").read_text()
    assert not re.search(r"src=|https?://|url\(|@import", page)
    table = (tmp_path / "r.md").read_text()
    (heads,) = {x for x in table.splitlines() if x.startswith("| tensor |")}
    for row in rows:
        line = next(x for x in table.splitlines() if x.startswith(f"| `{row['tensor']}` |"))
        cells = dict(zip(heads.split(" | "), line.split(" | "), strict=True))
        text = f"{row['rms']:.1e}" if row["rms"] else "0"
        assert cells["ours rms"] == text and f"{row['tensor']}: ours rms {text}" in page
        if row["parts"] is not None and row["parts"]["kernel"]:
            assert cells["kernel"] == f"{row['parts']['kernel']:.1e}"
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"


def test_a_budget_is_written_and_used(capsys, checkpoint, tmp_path):
    path = tmp_path / "b.json"
    arguments = ("parity", "--model", checkpoint, *QUICK)
    assert run(capsys, *arguments, "--write-budget", path)[0] == 0
    assert run(capsys, *arguments, "--budget", path)[0] == 0
    document = json.loads(path.read_text())
    cell = document["entries"]["float32"]["prefill"]["layers.1.mamba.scan.y"]
    cell["tolerance"] /= 4  # ours takes half of it
    path.write_text(json.dumps(document))
    status, out, _ = run(capsys, *arguments, "--budget", path)
    assert status == 1 and "first at layers.1.mamba.scan.y" in out
    status, _, err = run(capsys, "parity", "--model", checkpoint, "--budget", path)
    assert status == 2 and "lacks a dtype or path" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--against", "mlx"], "expected transformers, llama.cpp or a file"),
        (["--against", "missing.npz"], "no such file"),
        (["--out", "r.txt"], "must end in one of"),
        (["--paths", "up"], "invalid choice: 'up'"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--layers", "9"], "layer 9"),
        (["--budget", "missing.json"], "not a budget file"),
        (["--model-shape", "falcon-h9"], "unknown preset 'falcon-h9'"),
        (["--prompt", "hi"], "at least 8 tokens"),
        (["--write-dump", "d.pt", "--layers", "0"], "ends in .safetensors or .npz"),
    ],
)
def test_refusals(capsys, checkpoint, argv, message):
    model = [] if "--model-shape" in argv else ["--model", checkpoint]
    status, out, err = run(capsys, "parity", *model, *argv)
    assert (status, out) == (2, "") and message in err and err.count("\n") == 1


def test_an_infinite_error_is_beyond_and_null_in_json():
    from falcon_h1r.study.parity import Report, Row
    from falcon_h1r.study.parity_page import as_html
    from falcon_h1r.study.parity_render import as_json, as_markdown, as_text

    row = Row("logits", "float32", "prefill", "torch", math.inf, math.inf, None, None, 0.0, ())
    report = Report([row], "", {})
    assert report.beyond == [row]
    assert json.loads(as_json(report, {}))["rows"][0]["rms"] is None
    for make in (as_html, as_markdown, as_text):
        assert "inf" in make(report, {})
    assert isinstance(Budget({}, "", "", {}).tolerance("a", "b", "c"), type(None))


def test_the_picture_says_what_its_frame_and_axes_mean(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from falcon_h1r.study.heat import draw
    from falcon_h1r.study.parity import Report, Row

    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: kept.append(self))
    names = ("embed_tokens", "layers.0.mamba.scan.y", "layers.1.mamba.scan.y")
    rows = [
        Row(name, dtype, "prefill", "torch", 2e-6, 2e-6, 3e-6, 3e-6, 2.5e-6, ())
        for dtype in ("float32", "bfloat16")
        for name in names
    ]
    draw(Report(rows, "peer 1", {}), {"model": "tiny"}, tmp_path / "r.png")
    (figure,) = kept
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["framed: beyond the budget", "grey: not shown, or no such tensor"]
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_xlabel() for axes in panels] == ["", "", "layer", "layer"]
    framed = [[line.get_xydata().tolist() for line in axes.get_lines()] for axes in panels]
    cells = [[2, 0], [0, 1], [1, 1]]  # theirs alone
    assert framed == [[], [cells], [], [cells]]
