"""`study.check`: right tables pass, and each planted fault is named with the argument behind it."""

import json
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from models import make_config, make_model
from tiny_cli import run, write_checkpoint

from falcon_h1r.ops import REFERENCE, TORCH, Ops
from falcon_h1r.study import check
from falcon_h1r.study.budget import Budget
from falcon_h1r.study.operator_check import as_table
from falcon_h1r.study.parity import compare, make_inputs

R = REFERENCE
WINDOW = "initial_window_bvc given"


def groups_in_turn(x, dt, A, B, C, D=None, **options):
    copies = (1, 1, x.shape[2] // B.shape[2], 1)
    return R.ssd_scan(x, dt, A, B.repeat(copies), C.repeat(copies), D, **options)


def without(operator, name):
    """The operator, deaf to one of its options."""
    return lambda *args, **options: operator(*args, **options | {name: None})


def chunks_from_zero(x, dt, A, B, C, D=None, *, chunk_size, initial_state_bhpn=None, **options):
    parts = zip(*(t.split(chunk_size, 1) for t in (x, dt, B, C)))
    out = [R.ssd_scan(x, dt, A, B, C, D) for x, dt, B, C in parts]
    first = R.ssd_scan(x, dt, A, B, C, D, initial_state_bhpn=initial_state_bhpn, **options)
    return (torch.cat([y for y, _ in out], 1), out[-1][1]) if len(out) > 1 else first


def padding_acts(x, dt, *rest, **options):
    return R.ssd_scan(x, dt.clamp(min=0.02), *rest, **options)


def reads_as_if_contiguous(x, *rest, **options):
    dense = torch.empty(x.shape).stride()
    if x.stride() != dense:
        x = x.flatten().roll(1).view(x.shape)
    return R.ssd_scan(x, *rest, **options)


def heads_in_turn(q, k, v, **options):
    k, v = (t.repeat(1, q.shape[1] // k.shape[1], 1, 1) for t in (k, v))
    return R.attention(q, k, v, **options)


def level_offsets(q, k, v, *, query_offset_b=None, seq_idx_bl=None):
    if query_offset_b is not None:
        query_offset_b = query_offset_b.max().expand_as(query_offset_b)
    return R.attention(q, k, v, query_offset_b=query_offset_b, seq_idx_bl=seq_idx_bl)


def own_conv_step(x, window, weight, bias=None):
    return R.causal_conv1d_step(x, window.clone(), weight, bias)


def half_steps(state, x, dt, *rest):
    return R.ssd_step(state, x, dt.bfloat16().to(dt.dtype), *rest)


def writes(x, weight, eps):
    out = R.rms_norm(x, weight, eps)
    x.zero_()
    return out


def raising(*args, lengths_b=None, **options):
    if lengths_b is not None:
        raise NotImplementedError("no padding\nhere")
    return R.causal_conv1d(*args, lengths_b=lengths_b, **options)


PLANTED = [
    {
        "ssd_scan": (groups_in_turn, "2 groups in B_blgn and C_blgn"),
        "attention": (without(R.attention, "seq_idx_bl"), "seq_idx_bl given"),
        "rope": (lambda x, cos, sin, multiplier=1.0: R.rope(x, cos, sin), "multiplier=0.4"),
        "causal_conv1d": (without(R.causal_conv1d, "lengths_b"), "lengths_b given"),
        "swiglu": (lambda gate, up, m=1.0: m * R.swiglu(gate, up), "gate_multiplier=0.9"),
    },
    {
        "ssd_scan": (chunks_from_zero, "more tokens than chunk_size 8"),
        "attention": (heads_in_turn, "4 query heads on 2 key/value heads"),
        "gated_rms_norm": (
            lambda y, z, w, eps, n=1, first=False: R.gated_rms_norm(y, z, w, eps, 1, first),
            "n_groups=2",
        ),
        "decode_attention": (
            lambda q, k, v, lengths_b=None: R.decode_attention(q, k, v),
            "lengths_b given",
        ),
        "causal_conv1d_step": (own_conv_step, None),
    },
    {
        "ssd_scan": (padding_acts, "dt_blh of 0, as at padding"),
        "attention": (level_offsets, "query_offset_b different from row to row"),
        "causal_conv1d": (
            without(R.causal_conv1d, "initial_window_bvc"),
            "initial_window_bvc given",
        ),
        "ssd_step": (half_steps, None),
    },
    {
        "ssd_scan": (reads_as_if_contiguous, "x_blhp not contiguous"),
        "rms_norm": (writes, None),
        "causal_conv1d": (raising, "lengths_b given"),
    },
]


@pytest.mark.parametrize("planted", PLANTED)
def test_a_fault_is_named_with_the_argument_that_triggers_it(planted):
    found = check(dtypes=["float32"], **{name: fault for name, (fault, _) in planted.items()})
    assert not found and not found.ok and set(found.wrong_calls) == set(planted)
    for name, (_, trigger) in planted.items():
        wrong = [one for one in found.wrong if one.operator == name]
        causes = {cause for one in wrong for cause in one.triggers}
        assert (trigger in causes) if trigger else not causes, (name, causes)
        assert found.wrong_calls[name] <= found.calls[name]
        for one in wrong:
            assert one.error is None or one.error > one.tolerance >= 2 * 2**-23
            assert str(one) in repr(found) or str(one).removeprefix(f"{name}: ") in repr(found)
    json.dumps(found.to_dict(), allow_nan=False)


def test_what_is_not_a_number_is_said_in_words():
    found = check(rms_norm=writes, causal_conv1d=raising, swiglu=lambda *a: 1, dtypes=["float32"])
    text = {one.operator: one.text for one in found.wrong}
    assert text == {
        "rms_norm": "writes into its argument x",
        "causal_conv1d": "raised NotImplementedError: no padding here",
        "swiglu": "result is int, expected a tensor (3, 1, 80)",
    }
    assert not found.runs


def test_a_wrong_shape_or_dtype_is_a_fault():
    def narrow_state(*args, **options):
        y, state = R.ssd_scan(*args, **options)
        return y, state.to(y.dtype)

    found = check(ssd_scan=narrow_state, dtypes=["bfloat16"])
    assert "state is (3, 4, 16, 24) bfloat16, expected (3, 4, 16, 24) float32" in repr(found)
    assert check(ssd_scan=narrow_state, dtypes=["float32"])


def test_an_infinite_result_is_wrong():
    found = check(swiglu=lambda gate, up, m=1.0: R.swiglu(gate, up, m) / 0, dtypes=["float32"])
    assert found.wrong[0].error == math.inf and found.to_dict()["wrong"][0]["error"] is None


@pytest.mark.slow
def test_our_tables_are_right():
    found = check(TORCH, make_model(make_config(), dtype=torch.bfloat16))
    assert found and found.ok and found.runs, found
    assert set(found.skipped) == {n for n in Ops._fields if getattr(TORCH, n) is getattr(R, n)}
    assert set(found.calls) | set(found.skipped) == set(Ops._fields)
    assert all(count > 0 for count in found.calls.values())
    assert all(share <= 1 for share in found.shares.values())


def test_a_model_is_checked_with_its_own_sizes():
    """A fault that shows at three taps alone, which the small models do not have."""

    def four_taps_only(x, weight, *rest, **options):
        y, window = R.causal_conv1d(x, weight, *rest, **options)
        return (y, window) if weight.shape[1] == 4 else (y * 1.01, window)

    model = make_model(make_config("no_conv_bias_three_taps"), ops=REFERENCE)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    assert check(causal_conv1d=four_taps_only, dtypes=["float32"])
    found = check(model=model, causal_conv1d=four_taps_only, dtypes=["float32"])
    assert found.wrong[0].case.startswith("the model, float32, a prefill of 40 tokens, layer 0")
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert model.ops is REFERENCE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "no operator was given"),
        ({"scan": print}, "there is no operator 'scan'; did you mean 'ssd_scan'?"),
        ({"rope": 3}, "rope is 3, expected a function"),
        ({"rope": print, "dtypes": ["float64"]}, "dtype 'float64', expected one of float32"),
        ({"ops": 3}, "ops is a int, expected an operator table"),
        ({"ops": F.silu}, "expected an operator table, as in TORCH._replace(ssd_scan=silu)"),
        ({"ops": {"rope": print}}, "it lacks rms_norm"),
        ({"ops": TORCH._replace(rope=None)}, "rope is None, expected a function"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError) as error:
        check(**arguments)
    assert message in str(error.value)


def test_a_table_may_be_any_object_with_the_fields():
    assert as_table(TORCH._asdict()) == as_table(TORCH) == TORCH


# --- the command line, and parity without a budget ------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder)
    return folder


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of tables in the current folder; returns its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "tables_of_mine.py").write_text(
        "from falcon_h1r.ops import REFERENCE, TORCH\n"
        "def refuse(*args): raise RuntimeError('not here')\n"
        "RIGHT = REFERENCE._replace(swiglu=lambda *args: REFERENCE.swiglu(*args))\n"
        "WRONG = REFERENCE._replace(swiglu=lambda gate, up, m=1.0: TORCH.swiglu(gate, up))\n"
        "RAISES = REFERENCE._replace(swiglu=refuse)\n"
        "PART = {'rope': REFERENCE.rope}\n"
    )
    yield "tables_of_mine"
    sys.modules.pop("tables_of_mine", None)


QUICK = ["--dtype", "float32", "--paths", "prefill", "--layers", "1"]


@pytest.mark.parametrize(
    ("table", "status", "text"),
    [
        ("RIGHT", 0, "swiglu: right in"),
        ("WRONG", 1, "triggered by gate_multiplier="),
        ("RAISES", 1, "raised RuntimeError: not here; whatever it is given"),
    ],
)
def test_a_table_of_ones_own_on_the_command_line(capsys, checkpoint, module, table, status, text):
    arguments = ("parity", "--model", checkpoint, "--ops", f"{module}:{table}", *QUICK)
    found, out, err = run(capsys, *arguments)
    assert found == status and text in out
    assert ("is not run under this table" in err) == (table == "RAISES")


@pytest.mark.slow
@pytest.mark.parametrize(("table", "right"), [("RIGHT", True), ("WRONG", False), ("RAISES", False)])
def test_the_judgement_in_json(capsys, checkpoint, module, tmp_path, table, right):
    name = f"{module}:{table}"
    arguments = ("parity", "--model", checkpoint, "--ops", name, *QUICK, "--json")
    status, out, _ = run(capsys, *arguments)
    document = json.loads(out)
    assert status == (0 if right else 1) and document["operators"][name]["ok"] == right
    assert [one["operator"] for one in document["operators"][name]["wrong"]] == ["swiglu"] * (
        not right
    )


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("no_such_module:TABLE", "no module 'no_such_module'"),
        ("tables_of_mine:NONE", "tables_of_mine has no 'NONE'"),
        ("tables_of_mine:refuse", "is a function, expected an operator table"),
        ("tables_of_mine:PART", "it lacks rms_norm, gated_rms_norm"),
        (":TABLE", "expected MODULE:NAME"),
        ("torhc", "no operator table 'torhc'"),
    ],
)
def test_a_table_that_is_none_is_refused(capsys, checkpoint, module, place, message):
    status, out, err = run(capsys, "parity", "--model", checkpoint, "--ops", place)
    assert (status, out) == (2, "") and message in err and err.count("\n") == 1


def test_parity_of_any_model_needs_no_budget():
    model = make_model(make_config(num_hidden_layers=1))
    inputs = {"prefill": make_inputs(model.config, "prefill")}
    report = compare(model, inputs, ["float32"], {"torch": TORCH})
    assert report.rows and not report.beyond
    assert all(row.tolerance is not None for row in report.rows)
    with pytest.raises(ValueError, match="budget: it lacks a dtype or path"):
        compare(model, inputs, ["float32"], {"torch": TORCH}, Budget({}, "", "", {}))
