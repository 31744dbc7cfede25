"""The gate lets correct implementations through and nothing else."""

import sys
from functools import partial

import pytest
import torch
from bench.tiny_bench import BUDGET, CPU, TWO_GROUPS, FakeClock, tiny_cases, tiny_session

from falcon_h1r import ops
from falcon_h1r.bench import contest, gate, implementations, layer
from falcon_h1r.bench.contest import Bound, Implementation
from falcon_h1r.bench.implementations import away, contestants, ours
from falcon_h1r.bench.operators import OPERATORS
from falcon_h1r.bench.registry import Case, Workload
from falcon_h1r.bench.timing import TimeBudget
from falcon_h1r.generation.logprob import logprob
from falcon_h1r.ops import REFERENCE, TORCH

GPU = torch.device("cuda")
ONCE = TimeBudget(seconds=0, least=1, most=1, warmup_calls=1)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FIELDS = ("rms", "worst", "rms_allowed", "worst_allowed", "slack")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_our_forms_pass(dtype):
    for case in tiny_cases(dtypes=[dtype]):
        inputs = case.inputs()
        truth = gate.find_expected(case, inputs)
        for form in (gate.reference, gate.torch_form):
            verdict = gate.judge(case.call(form(case), inputs), truth)
            assert verdict.passed, (str(case), verdict)


def only(op, phase="prefill", dtype=torch.float32, length=37) -> Case:
    workload = {
        "prefill": Workload("prefill", 2, length),
        "resume": Workload("resume", 2, 5, 9),
        "decode": Workload("decode", 3, 1, 20),
    }[phase]
    found = tiny_cases([op], [dtype], [workload], {"two-groups": TWO_GROUPS})
    return next(case for case in found if case.op == op)


def without(function, **replaced):
    return lambda **inputs: function(**(inputs | replaced))


def shifted_taps(weight_cw, **rest):
    return TORCH.causal_conv1d(weight_cw=weight_cw.roll(1, 1), **rest)


def groups_swapped(B_blgn, **rest):
    return TORCH.ssd_scan(B_blgn=B_blgn.flip(2), **rest)


def a_decay_missing(dt_blh, **rest):
    dt_blh = dt_blh.clone()
    dt_blh[:, 20] = 0
    return TORCH.ssd_scan(dt_blh=dt_blh, **rest)


def a_key_too_few(k_bjse, v_bjse, **rest):
    return TORCH.decode_attention(k_bjse=k_bjse[:, :, :-1], v_bjse=v_bjse[:, :, :-1], **rest)


def keys_of_the_wrong_head(k_bjse, **rest):
    return TORCH.attention(k_bjse=k_bjse.flip(1), **rest)


def a_state_that_stays(state_bhpn, **rest):
    return TORCH.ssd_step(state_bhpn=state_bhpn.clone(), **rest)


def a_window_that_stays(window_bvc, **rest):
    return TORCH.causal_conv1d_step(window_bvc=window_bvc.clone(), **rest)


def turned_the_other_way(sin_bli, **rest):
    return TORCH.rope(sin_bli=-sin_bli, **rest)


def half_the_sum(x, residual, **rest):
    y, total = gate.torch_form(only("rms_norm_residual"))(x=x, residual=residual, **rest)
    return y, total - residual / 64


def tf32(tensor):
    """As a tensor core reads float32: ten bits of mantissa."""
    return (tensor.view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32)


def in_tf32(q_bhle, k_bjse, **rest):
    return TORCH.attention(q_bhle=tf32(q_bhle), k_bjse=tf32(k_bjse.contiguous()), **rest)


def one_element_off(x, **rest):
    y = TORCH.rms_norm(x=x, **rest)
    y[0, 1, 2] += 0.01 * y.abs().max()
    return y


def not_a_number(x, **rest):
    y = TORCH.rms_norm(x=x, **rest)
    y[0, 1, 2] = torch.nan
    return y


def narrow_logits(logits_mv, multiplier, **rest):
    narrow = (logits_mv.float() * multiplier).bfloat16()
    return logprob(logits_mv=narrow.float(), **rest)


FAULTS = {
    "weight left out": (
        "rms_norm",
        lambda **i: TORCH.rms_norm(**i | {"weight_d": i["weight_d"] * 0 + 1}),
    ),
    "one element": ("rms_norm", one_element_off),
    "NaN": ("rms_norm", not_a_number),
    "a second output wrong": ("rms_norm_residual", half_the_sum),
    "one group of two": ("gated_rms_norm", without(TORCH.gated_rms_norm, n_groups=1)),
    "norm before gate": ("gated_rms_norm", without(TORCH.gated_rms_norm, norm_before_gate=True)),
    "sine's sign": ("rope", turned_the_other_way),
    "key multiplier": ("rope_key", without(TORCH.rope, multiplier=1.0)),
    "taps": ("causal_conv1d", shifted_taps),
    "conv bias": ("causal_conv1d", without(TORCH.causal_conv1d, bias_c=None)),
    "window": ("causal_conv1d", without(TORCH.causal_conv1d, initial_window_bvc=None)),
    "conv window in place": ("causal_conv1d_step", a_window_that_stays),
    "D": ("ssd_scan", without(TORCH.ssd_scan, D_h=None)),
    "initial state": ("ssd_scan", without(TORCH.ssd_scan, initial_state_bhpn=None)),
    "groups": ("ssd_scan", groups_swapped),
    "one decay": ("ssd_scan", a_decay_missing),
    "state in place": ("ssd_step", a_state_that_stays),
    "key head": ("attention", keys_of_the_wrong_head),
    "TF32": ("attention", in_tf32),
    "last key": ("decode_attention", a_key_too_few),
    "lengths": ("decode_attention_ragged", without(TORCH.decode_attention, lengths_b=None)),
    "top-k": ("logprob", without(logprob, k=19)),
    "head multiplier": ("logprob", without(logprob, multiplier=1.0)),
    "logits in bfloat16": ("logprob", narrow_logits),
    "gate multiplier": ("swiglu", without(TORCH.swiglu, gate_multiplier=1.0)),
}


NARROW = [fault for fault in FAULTS if fault != "TF32"]  # which is narrower than float32 only


@pytest.mark.parametrize(
    ("fault", "dtype"),
    [(fault, torch.float32) for fault in FAULTS] + [(fault, torch.bfloat16) for fault in NARROW],
    ids=str,
)
def test_planted_faults_are_refused(fault, dtype):
    op, function = FAULTS[fault]
    case = only(op, OPERATORS[op].phases[0], dtype)
    inputs = case.inputs()
    verdict = gate.judge(case.call(function, inputs), gate.find_expected(case, inputs))
    assert not verdict.passed and verdict.reason


def test_a_past_that_is_not_masked_is_refused():
    case = only("attention", "resume")
    inputs = case.inputs()
    truth = gate.find_expected(case, inputs)
    assert gate.judge(case.call(TORCH.attention, inputs), truth).passed
    everything = inputs | {"query_offset_b": inputs["query_offset_b"] + 1}
    assert not gate.judge(case.call(TORCH.attention, everything), truth).passed


def test_wrong_numbers_and_shapes_of_outputs_are_refused():
    case = only("ssd_scan")
    inputs = case.inputs()
    truth = gate.find_expected(case, inputs)
    y, state = case.call(TORCH.ssd_scan, inputs)
    assert gate.judge((y, state), truth).passed
    assert "1 outputs, expected 2" in gate.judge((y,), truth).reason
    assert "output 1 has shape" in gate.judge((y, state[:1]), truth).reason
    assert "output 0 is torch.float64, expected" in gate.judge((y.double(), state), truth).reason
    assert "output 1 is of type list, expected" in gate.judge((y, [state]), truth).reason


def test_slack_widens_what_is_allowed():
    case = only("rms_norm")
    inputs = case.inputs()
    truth = gate.find_expected(case, inputs)
    off = (case.call(TORCH.rms_norm, inputs)[0] * (1 + 3e-6),)
    assert not gate.judge(off, truth).passed and gate.judge(off, truth, slack=8).passed


def test_the_scans_truth_is_the_recurrence():
    """Above LOOP_TOKENS the truth is TORCH in float64, held here against the loop it stands for."""
    case = only("ssd_scan", length=gate.LOOP_TOKENS + 6)
    assert gate.is_slow_loop(case) and not gate.is_slow_loop(only("ssd_scan"))
    inputs = case.inputs()
    doubled = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    exact = REFERENCE.ssd_scan(**doubled)
    for found, expected in zip(gate.find_expected(case, inputs).outputs, exact):
        assert torch.allclose(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("op", ["attention", "decode_attention", "decode_attention_ragged"])
def test_truth_in_blocks_is_the_truth(op, monkeypatch):
    monkeypatch.setattr(gate, "BLOCK_BYTES", 4000)
    for case in tiny_cases([op], [torch.float64]):
        inputs = case.inputs()
        whole = gate.reference(case)(**inputs)
        assert torch.allclose(gate.oracle(case, inputs)[0], whole, rtol=1e-13, atol=1e-13)


def test_a_wrong_implementation_is_reported_and_not_timed():
    case = only("rms_norm")
    inputs = case.inputs()
    clock, calls = FakeClock(), []

    def spy(name, function):
        return ours(name, case, lambda **i: calls.append(name) or function(**i))

    def broken(**inputs):
        raise RuntimeError("no such\nkernel")

    def hungry(**inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    people = [
        spy("right", TORCH.rms_norm),
        spy("wrong", one_element_off),
        spy("broken", broken),
        spy("hungry", hungry),
        Implementation("away", None, "not installed"),
    ]
    parts = contest.run(people, inputs, gate.find_expected(case, inputs), clock, BUDGET)
    assert {name: part["status"] for name, part in parts.items()} == {
        "right": "timed",
        "wrong": "wrong",
        "broken": "failed",
        "hungry": "absent",
        "away": "absent",
    }
    assert calls.count("wrong") == 1 and calls.count("right") > 1
    assert parts["broken"]["reason"] == "RuntimeError: no such kernel"
    assert parts["hungry"]["reason"] == "out of memory"
    assert "times as far off as allowed" in parts["wrong"]["reason"]
    assert [name for name, part in parts.items() if "seconds" in part] == ["right"]
    assert set(parts["right"]["gate"]) == set(FIELDS)


def test_timed_calls_overwrite_private_copies_only():
    case = only("ssd_step", "decode")
    inputs = case.inputs()
    before = inputs["state_bhpn"].clone()
    people = [ours(name, case, TORCH.ssd_step) for name in ("one", "two")]
    parts = contest.run(people, inputs, gate.find_expected(case, inputs), FakeClock(), BUDGET)
    assert all(part["status"] == "timed" for part in parts.values())
    assert torch.equal(inputs["state_bhpn"], before)


def test_nobody_is_left_out_silently():
    people = contestants(only("ssd_scan", length=70), tiny_session(compiled=True))
    names = {one.name: one for one in people}
    assert list(names) == ["reference", "torch", "torch.compile", "transformers"]
    assert names["reference"].reason == "a Python loop over tokens"
    reasons = away(CPU, ["ssd_scan"])
    assert list(reasons) == ["triton", "mamba_ssm", "flash-linear-attention"]
    assert reasons["triton"] == "needs a GPU" and all(reasons.values())
    assert list(away(CPU, ["swiglu"])) == ["triton"]


def test_the_compiled_table_is_what_is_compiled(monkeypatch):
    """Of an operator, and of a layer; of an operator of no table, its torch form."""
    compiled = []
    table = TORCH._replace(rms_norm=lambda *args, **named: TORCH.rms_norm(*args, **named))
    monkeypatch.setattr(implementations, "COMPILED", table)
    monkeypatch.setattr(layer, "COMPILED", table)
    monkeypatch.setattr(torch, "compile", lambda form, **options: compiled.append(form) or form)
    session = tiny_session(compiled=True)
    for case in (only("rms_norm"), only("rms_norm_residual")):
        inputs = case.inputs()
        (one,) = (p for p in contestants(case, session) if p.name == "torch.compile")
        bound = one.bind(inputs)
        assert gate.judge(bound.outputs(bound.call()), gate.find_expected(case, inputs)).passed
    assert compiled == [table.rms_norm, gate.torch_form(only("rms_norm_residual"))]
    layer.run("t", TWO_GROUPS, [Workload("decode", 1, 1, 4)], torch.float32, session)
    assert compiled[-1].feed_forward.ops is table


def test_plain_attention_is_not_timed_where_it_would_fill_memory():
    (small,), (large,) = (
        tiny_cases(["attention"], workloads=[Workload("prefill", 1, l)], configs={"t": TWO_GROUPS})
        for l in (64, 8192)
    )
    assert contestants(small, tiny_session())[0].bind is not None
    assert "memory" in contestants(large, tiny_session())[0].reason


@pytest.mark.parametrize("op", list(OPERATORS))
def test_on_a_gpu_the_kernels_take_part(op):
    """With the registry's arguments by name; run through Triton's interpreter, in float32."""
    case = only(op, OPERATORS[op].phases[0], length=5)
    inputs = case.inputs()
    people = [p for p in contestants(case, tiny_session(GPU)) if p.name == "triton"]
    parts = contest.run(people, inputs, gate.find_expected(case, inputs), FakeClock(), ONCE)
    assert parts["triton"]["status"] == "timed", parts
    wide = only(op, OPERATORS[op].phases[0], torch.float64, length=5)
    (triton,) = (p for p in contestants(wide, tiny_session(GPU)) if p.name == "triton")
    assert triton.bind is None and "float64" in triton.reason


def test_kernels_that_cannot_be_imported_are_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "falcon_h1r_kernels", None)
    ops._triton.cache_clear()
    reason = away(GPU, ["swiglu"])["triton"]
    assert reason.startswith("the table TRITON cannot be made (import of falcon_h1r_kernels halted")
    people = contestants(only("rms_norm"), tiny_session(GPU))
    assert "triton" not in {one.name for one in people}


def test_bound_results_come_back_in_the_registrys_layout():
    case = only("rms_norm")
    inputs = case.inputs()

    def bind(inputs):
        flat = inputs["x"].flatten(0, 1)
        call = partial(TORCH.rms_norm, flat, inputs["weight_d"], inputs["eps"])
        return Bound(call, lambda out: (out.view(inputs["x"].shape),))

    people = [Implementation("flat", bind)]
    parts = contest.run(people, inputs, gate.find_expected(case, inputs), FakeClock(), BUDGET)
    assert parts["flat"]["status"] == "timed"
