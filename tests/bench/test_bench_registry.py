"""Every case: the model's own shapes and strides, costs counted from tensors, seeds."""

import inspect

import pytest
import torch
from bench.tiny_bench import CONFIGS, CPU, TWO_GROUPS, elements, tiny_cases
from models import make_model, random_ids

from falcon_h1r import FalconH1Config
from falcon_h1r.bench import gate
from falcon_h1r.bench.operators import OPERATORS, ragged_lengths
from falcon_h1r.bench.registry import FAMILY, GPU_WORKLOADS, Workload, cases, select
from falcon_h1r.ops import REFERENCE, Ops

SMALL = (Workload("prefill", 1, 3), Workload("resume", 1, 2, 3), Workload("decode", 2, 1, 6))


def test_every_operator_of_the_table_is_there():
    assert {operator.field for operator in OPERATORS.values()} - {""} == set(Ops._fields)
    for operator in OPERATORS.values():
        assert (operator.field == "") == (operator.alone is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", ["falcon-h1r-7b", "falcon-h1-34b", "tiny-90m", *CONFIGS])
def test_bytes_equal_those_of_the_tensors(model, dtype):
    """Read: every element of every argument. Written: what is returned and what is overwritten."""
    configs = {model: CONFIGS.get(model) or FalconH1Config.preset(model)}
    for case in tiny_cases(dtypes=(dtype,), workloads=SMALL, configs=configs):
        inputs = case.inputs()
        tensors = {name: t for name, t in inputs.items() if isinstance(t, torch.Tensor)}
        tensors.pop("new_window_bvc", None)  # only written
        read = elements(tensors.values())
        if case.op == "decode_attention_ragged":
            b, j, s, e = inputs["k_bjse"].shape
            missing = b * s - int(inputs["lengths_b"].sum())
            assert missing > 0
            read -= 2 * j * e * missing * dtype.itemsize
        written = elements(case.call(gate.reference(case), inputs))
        assert (case.cost.read, case.cost.written) == (read, written), str(case)
        assert case.cost.bytes == read + written


def test_flops_of_products_are_those_of_the_pairs_that_are_seen():
    """Counted one pair and one position at a time."""
    c = TWO_GROUPS
    heads, e = c.num_attention_heads, c.head_dim
    h, p, g, n = c.mamba_n_heads, c.mamba_head_dim, c.mamba_n_groups, c.mamba_d_state
    for case in tiny_cases(["attention", "decode_attention", "ssd_scan", "ssd_step"]):
        if case.config is not TWO_GROUPS:
            continue
        w, inputs = case.workload, case.inputs()
        rows = range(w.batch)
        if case.op == "ssd_scan":
            flops = 0
            for t in range(w.length):
                for _ in range(t % c.mamba_chunk_size + 1):
                    flops += 2 * g * n + 2 * h * p
                flops += 2 * h * p * n + 2 * h * p * n + 2 * h * p
            flops *= w.batch
        elif case.op == "ssd_step":
            flops = w.batch * (3 * 2 * h * p * n + 2 * h * p)
        else:
            lengths = inputs.get("lengths_b", [w.past + w.length] * w.batch)
            keys = sum(int(lengths[r]) - l for r in rows for l in range(w.length))
            flops = keys * heads * (2 * e + 2 * e)
        assert case.cost.flops == flops, str(case)


def test_flops_of_elementwise_operators_scale_with_their_elements():
    for op in ("rms_norm", "gated_rms_norm", "rope", "rope_key", "causal_conv1d", "swiglu"):
        one, two = (
            next(iter(tiny_cases([op], workloads=[Workload("prefill", b, 8)]))).cost.flops
            for b in (1, 2)
        )
        assert two == 2 * one > 0
    by_op = {c.op: c for c in tiny_cases(workloads=[Workload("prefill", 1, 8)], configs=CONFIGS)}
    gated, bare = (
        next(c for c in tiny_cases(["gated_rms_norm"]) if c.model == model).cost.flops
        for model in CONFIGS
    )
    assert gated == 2 * bare
    c, conv = by_op["causal_conv1d"].config, by_op["causal_conv1d"].cost.flops
    assert conv == 8 * c.conv_dim * (2 * c.mamba_d_conv + 3)


@pytest.mark.parametrize("variant", list(CONFIGS))
def test_arguments_are_those_the_model_passes(variant):
    """Names, shapes, dtypes, scalars, and strides along every axis longer than one."""
    config, b, l = CONFIGS[variant], 2, 6
    seen: dict[str, list] = {}

    def recording(name, function):
        names = list(inspect.signature(function).parameters)

        def call(*args, **kwargs):
            seen.setdefault(name, []).append(dict(zip(names, args)) | kwargs)
            return function(*args, **kwargs)

        return call

    table = Ops(*(recording(n, f) for n, f in REFERENCE._asdict().items()))
    model = make_model(config, ops=table, dtype=torch.bfloat16)
    # Room behind the longest row, as in the registry's caches: strides of slices must agree.
    ids = random_ids(config, b, 3 * l)
    with torch.no_grad():
        for workload, start in (
            (Workload("prefill", b, l), 0),
            (Workload("resume", b, l, l), l),
            (Workload("decode", b, 1, 2 * l), 2 * l),
        ):
            total = workload.past + workload.length
            cache = model.new_cache(b, total + 128)
            if start:
                model(ids[:, :start], cache=cache)
            seen.clear()
            model(ids[:, start:total], cache=cache)
            for case in tiny_cases(workloads=[workload], dtypes=[torch.bfloat16]):
                if case.model != variant or not case.operator.field:
                    continue
                if case.op.endswith("_ragged"):
                    continue
                inputs = case.inputs()
                calls = seen[case.operator.field]
                position = 1 if case.op == "rope_key" else 0
                _assert_same_arguments(inputs, calls[position], str(case))


def _assert_same_arguments(inputs, passed, label):
    for name, value in passed.items():
        if value is None:
            assert inputs.get(name) is None, (label, name)
        elif isinstance(value, torch.Tensor):
            ours = inputs[name]
            assert (ours.shape, ours.dtype) == (value.shape, value.dtype), (label, name)
            strides = [
                (axis, a, b)
                for axis, (size, a, b) in enumerate(zip(ours.shape, ours.stride(), value.stride()))
                if size > 1 and a != b
            ]
            assert not strides, (label, name, strides)
        else:
            assert inputs[name] == pytest.approx(value), (label, name)
    assert set(inputs) <= set(passed) | {"lengths_b"}, label


def test_inputs_follow_from_the_seed():
    for case in tiny_cases():
        one, same, other = (case.inputs(CPU, seed) for seed in (1, 1, 2))
        tensors = [n for n, t in one.items() if isinstance(t, torch.Tensor)]
        assert all(torch.equal(one[n], same[n]) for n in tensors)
        assert any(not torch.equal(one[n], other[n]) for n in tensors)


def test_a_call_leaves_its_inputs_alone_and_returns_what_it_wrote():
    for case in tiny_cases():
        inputs = case.inputs()
        before = {n: t.clone() for n, t in inputs.items() if isinstance(t, torch.Tensor)}
        outputs = case.call(gate.torch_form(case), inputs)
        assert all(torch.equal(inputs[n], t) for n, t in before.items())
        for name, written in zip(reversed(case.operator.mutates), reversed(outputs)):
            assert written.shape == inputs[name].shape and not torch.equal(written, inputs[name])


def test_the_family_has_its_cases_and_no_case_twice():
    found = list(cases())
    assert len(found) == len(set(map(str, found)))
    assert {case.model for case in found} == set(FAMILY)
    ops = {case.op for case in found}
    assert ops == set(OPERATORS)
    for case in found:
        assert case.workload.phase in case.operator.phases
        assert case.workload in GPU_WORKLOADS
    steps = [c for c in found if c.op == "ssd_step" and c.model == "falcon-h1r-7b"]
    assert len(steps) == len({c.workload.batch for c in steps}), "the past costs a step nothing"
    groups = {c.config.mamba_n_groups for c in found if c.op == "ssd_scan"}
    assert groups == {1, 2}


def test_selection():
    assert [o.name for o in select(["rope"])] == ["rope", "rope_key"]
    assert [o.name for o in select(["rope_key"])] == ["rope_key"]
    assert len(select([])) == len(OPERATORS)
    with pytest.raises(ValueError, match="no operator 'ropes'; there are: rms_norm, "):
        select(["rope", "ropes"])


@pytest.mark.parametrize(
    "values",
    [
        ("prefill", 0, 4),
        ("prefill", 1, 4, 2),
        ("resume", 1, 4),
        ("decode", 1, 2, 5),
        ("warm", 1, 1),
    ],
)
def test_impossible_workloads_are_refused(values):
    with pytest.raises(ValueError, match="is no workload"):
        Workload(*values)


def test_workloads_as_text():
    assert str(Workload("prefill", 2, 7)) == "prefill 2x7"
    assert str(Workload("resume", 2, 7, 3)) == "resume 2x7@3"
    assert str(Workload("decode", 2, 1, 3)) == "decode 2@4"


def test_ragged_lengths():
    assert ragged_lengths(1, 9) == [9]
    assert ragged_lengths(3, 9) == [5, 7, 9]
    assert ragged_lengths(2, 2) == [1, 2]
