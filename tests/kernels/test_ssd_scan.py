"""The scan's operator: a drop-in for TORCH's, the rule of its forms, refusals, bytes moved."""

import inspect
import math

import interpret
import pytest
import torch
from checks import assert_no_worse, normal
from falcon_h1r_kernels import ssd_fused, ssd_staged
from falcon_h1r_kernels import ssd_scan as module
from falcon_h1r_kernels.ssd_scan import (
    ASSUMED_MULTIPROCESSORS,
    ScanPlan,
    _multiprocessors,
    _ssd_scan_op,
    plan,
    ssd_scan,
)

from falcon_h1r.ops import REFERENCE, TORCH

BF16, FP32 = torch.bfloat16, torch.float32


def make_inputs(b, l, h, p, g, n, dtype=FP32):
    """By name: x, dt, A, B, C, D, an initial state, and documents of about ten tokens."""
    starts = torch.rand(b, l, generator=torch.Generator().manual_seed(0)) < 0.1
    return {
        "x_blhp": normal(b, l, h, p, dtype=dtype),
        "dt_blh": normal(b, l, h, seed=1).abs(),
        "A_h": -normal(h, seed=2).abs() - 0.1,
        "B_blgn": normal(b, l, g, n, seed=3, dtype=dtype),
        "C_blgn": normal(b, l, g, n, seed=4, dtype=dtype),
        "D_h": normal(h, seed=5),
        "initial_state_bhpn": normal(b, h, p, n, seed=6),
        "seq_idx_bl": 3 + 2 * starts.cumsum(1),
    }


def assert_close(found, expected, tolerance):
    for one, other in zip(found, expected):
        assert one.dtype == other.dtype and torch.isfinite(one).all()
        worst = (one.double() - other.double()).abs().max()
        assert float(worst) <= tolerance * float(other.abs().max())


def test_signature_is_that_of_the_table():
    """Every parameter of TORCH's and REFERENCE's scan, in place and with its default."""
    ours = inspect.signature(ssd_scan).parameters
    for peer in (TORCH.ssd_scan, REFERENCE.ssd_scan):
        for place, (name, parameter) in enumerate(inspect.signature(peer).parameters.items()):
            assert list(ours)[place] == name
            assert ours[name].default == parameter.default and ours[name].kind == parameter.kind


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("form", ["auto", "staged", "fused"])
def test_drop_in(form, dtype):
    """As the mixer calls it, at the sizes of the tests' models."""
    inputs = make_inputs(2, 45, 4, 16, 2, 24, dtype)
    found = ssd_scan(**inputs, chunk_size=16, form=form)
    assert [t.dtype for t in found] == [dtype, FP32]
    assert [t.shape for t in found] == [(2, 45, 4, 16), (2, 4, 16, 24)]
    if dtype is FP32:
        torchs = TORCH.ssd_scan(**inputs, chunk_size=16)
        wide = {k: v if k == "seq_idx_bl" else v.double() for k, v in inputs.items()}
        for one, other, truth in zip(found, torchs, REFERENCE.ssd_scan(**wide)):
            assert_no_worse(one, other, truth)
    else:
        assert_close(found, TORCH.ssd_scan(**inputs, chunk_size=16), 2e-2)


@pytest.mark.parametrize("dtype, tolerance", [(FP32, 2e-6), (BF16, 1e-2)])
def test_forms_agree(dtype, tolerance):
    inputs = make_inputs(1, 150, 2, 32, 1, 32, dtype)
    forms = [ssd_scan(**inputs, chunk_size=64, form=form) for form in ("staged", "fused")]
    assert_close(*forms, tolerance)


@pytest.mark.parametrize("form", ["staged", "fused"])
def test_options_left_out(form):
    inputs = make_inputs(1, 20, 2, 16, 1, 16)
    for name in ("D_h", "initial_state_bhpn", "seq_idx_bl"):
        inputs[name] = None
        assert_close(ssd_scan(**inputs, form=form), TORCH.ssd_scan(**inputs), 2e-6)
    positional = [inputs[name] for name in ("x_blhp", "dt_blh", "A_h", "B_blgn", "C_blgn")]
    assert_close(ssd_scan(*positional, form=form), TORCH.ssd_scan(*positional), 2e-6)


@pytest.mark.parametrize("form", ["staged", "fused"])
def test_step_sizes(form):
    """Bias, softplus and clamp, each alone and all together."""
    inputs = make_inputs(1, 30, 2, 16, 1, 16)
    raw, bias = inputs.pop("dt_blh") - 0.5, normal(2, seed=8)
    for with_bias in (False, True):
        for softplus in (False, True):
            ready = raw + bias if with_bias else raw
            ready = torch.nn.functional.softplus(ready) if softplus else ready
            found = ssd_scan(
                **inputs,
                dt_blh=raw,
                dt_bias_h=bias if with_bias else None,
                dt_softplus=softplus,
                dt_limit=(0.05, 0.9),
                form=form,
            )
            expected = TORCH.ssd_scan(**inputs, dt_blh=ready.clamp(0.05, 0.9))
            assert_close(found, expected, 1e-5)


def watch_forms(monkeypatch):
    """The list that the forms taken, with their segments, are appended to."""
    taken = []

    def watch(owner, name, note):
        launch = getattr(owner, name)

        def watched(*args):
            taken.append(note(args))
            return launch(*args)

        monkeypatch.setattr(owner, name, watched)

    watch(ssd_staged, "launch_ssd_staged", lambda args: ScanPlan("staged", 1))
    watch(ssd_fused, "launch_ssd_fused", lambda args: ScanPlan("fused", args[6]))
    return taken


def test_form_and_segments_are_those_of_the_plan(monkeypatch):
    taken = watch_forms(monkeypatch)
    inputs = make_inputs(1, 100, 2, 16, 1, 16)
    planned = []

    def planner(b, h, l, **sizes):
        planned.append((b, h, l, sizes))
        return ScanPlan("fused", 3) if sizes["form"] == "fused" else ScanPlan("staged", 1)

    monkeypatch.setattr(module, "plan", planner)
    for form in ("auto", "fused", "staged"):
        ssd_scan(**inputs, form=form, chunk_size=32)
    assert taken == [ScanPlan("staged", 1), ScanPlan("fused", 3), ScanPlan("staged", 1)]
    sizes = {"tiles": 1, "block": 16, "chunk_size": 32, "multiprocessors": 132}
    assert planned == [(1, 2, 100, sizes | {"form": form}) for form in ("auto", "fused")]


def test_a_configuration_names_its_form(monkeypatch):
    taken = watch_forms(monkeypatch)
    inputs = make_inputs(1, 20, 2, 16, 1, 16)
    ssd_scan(**inputs, config="p32q16")
    ssd_scan(**inputs, config="walk_p32n32")
    assert [form for form, _ in taken] == ["fused", "staged"]


def test_large_states_are_staged(monkeypatch):
    taken = watch_forms(monkeypatch)
    inputs = make_inputs(1, 5, 1, 16, 1, 257)
    assert_close(ssd_scan(**inputs), TORCH.ssd_scan(**inputs), 2e-6)
    assert taken == [ScanPlan("staged", 1)]


def test_the_rule():
    """What it says for an H100; the reasons are in `plan`."""
    for (batch, heads, length, tiles), expected in {
        (1, 24, 64, 2): ScanPlan("fused", 1),  # one chunk: nothing to cut
        (1, 24, 512, 2): ScanPlan("staged", 1),  # these three were measured
        (1, 24, 4096, 2): ScanPlan("staged", 1),
        (8, 24, 4096, 2): ScanPlan("staged", 1),
        (1, 66, 512, 2): ScanPlan("fused", 1),  # 132 programs on 132 places, and fewer launches
        (64, 24, 4096, 2): ScanPlan("staged", 1),
        (1, 1, 4096, 1): ScanPlan("staged", 1),  # one head: 64 chunks in parallel
    }.items():
        assert plan(batch, heads, length, tiles=tiles) == expected
    assert plan(1, 24, 4096, form="fused") == ScanPlan("fused", 5)  # 48 programs on 132 places
    assert plan(2, 24, 4096, form="fused") == ScanPlan("fused", 1)  # 96 fill most of them
    assert plan(1, 1, 4096, tiles=1, form="fused").segments > 8
    assert plan(64, 24, 4096, form="staged") == ScanPlan("staged", 1)


def test_the_rule_follows_its_arguments():
    cut = [plan(1, 24, length, form="fused").segments for length in (64, 1024, 4096, 262144)]
    assert cut == sorted(cut) and cut[0] == 1 and cut[-1] > 4
    assert plan(1, 24, 4096, multiprocessors=48) == ScanPlan("fused", 1)  # already full
    assert plan(1, 24, 4096, multiprocessors=1000, form="fused").segments > 5
    small_chunks = plan(2, 24, 4096, chunk_size=16)  # eight times the states of 128
    assert (small_chunks.form, plan(2, 24, 4096).form) == ("fused", "staged")
    assert plan(1, 24, 4096, block=4096) == ScanPlan("fused", 1)  # a single chunk
    for length in (1, 63, 64, 65, 1000, 5000):
        for heads in (1, 3, 24, 200):
            form, segments = plan(1, heads, length, form="fused")
            chunks = -(-length // 64)
            assert form == "fused" and 1 <= segments <= min(chunks, module.MAX_SEGMENTS)
            assert ssd_fused.segment_lengths(length, 64, segments)[2] == segments


def test_multiprocessors_without_a_GPU():
    for device in ("cpu", "meta"):
        assert _multiprocessors(torch.device(device)) == ASSUMED_MULTIPROCESSORS


def test_operator_registration():
    inputs = make_inputs(1, 20, 2, 16, 1, 24)
    x, dt, A, B, C, D, initial, ids = inputs.values()
    bias = normal(2, seed=8)
    for form in ("staged", "fused"):
        full = (x, dt, A, B, C, D, 16, initial, ids, bias, True, 0.0, math.inf, form, "")
        bare = (x, dt, A, B, C, None, 16, None, None, None, False, 0.0, math.inf, form, "")
        torch.library.opcheck(_ssd_scan_op, full)
        torch.library.opcheck(_ssd_scan_op, bare)


def test_the_default_configuration_fits_the_device(monkeypatch):
    """bfloat16 on a large GPU; what takes less shared memory elsewhere, and in float16."""
    kib = 1024
    assert ssd_fused.default_config(torch.bfloat16, 163 * kib) == "p64q64"
    assert ssd_fused.default_config(torch.bfloat16, 99 * kib) == "p64q32"
    assert ssd_fused.default_config(torch.float16, 227 * kib) == "p64q32"
    assert ssd_fused.default_config(torch.float32, 99 * kib) == "p32q16"
    taken = []
    launch = ssd_fused.launch_ssd_fused

    def keep(*args):
        taken.append(args[-1])
        return launch(*args)

    monkeypatch.setattr(ssd_fused, "launch_ssd_fused", keep)
    inputs = make_inputs(1, 20, 4, 16, 2, 16, dtype=BF16)
    ssd_scan(**inputs, form="fused")
    monkeypatch.setattr(module, "_shared_memory", lambda device: 99 * kib)
    ssd_scan(**inputs, form="fused")
    assert taken == ["p64q64", "p64q32"]


def test_refusals():
    inputs = make_inputs(2, 20, 4, 16, 2, 16)
    doubles = {k: v.double() for k, v in inputs.items() if k != "seq_idx_bl"}
    for changes, words in (
        ({"form": "fast"}, "no form 'fast'; there are: auto, staged, fused"),
        ({"chunk_size": 0}, "chunk_size 0"),
        ({"x_blhp": normal(2, 20, 64)}, "x_blhp \\(2, 20, 64\\), expected four axes"),
        ({"dt_blh": normal(2, 20, 3)}, "dt_blh \\(2, 20, 3\\), expected \\(2, 20, 4\\)"),
        ({"A_h": normal(3)}, "A_h \\(3,\\), expected \\(4,\\)"),
        ({"B_blgn": normal(2, 20, 3, 16)}, "4 heads a multiple of 3 groups"),
        (
            {"B_blgn": normal(2, 19, 2, 16)},
            "B_blgn \\(2, 19, 2, 16\\), expected \\(2, 20, 2, 16\\)",
        ),
        ({"C_blgn": normal(2, 20, 2, 8)}, "C_blgn \\(2, 20, 2, 8\\)"),
        ({"C_blgn": normal(2, 20, 2, 16, dtype=BF16)}, "C torch.bfloat16, expected torch.float32"),
        ({"D_h": normal(4, 1)}, "D_h \\(4, 1\\)"),
        ({"initial_state_bhpn": normal(2, 4, 16, 8)}, "initial_state_bhpn \\(2, 4, 16, 8\\)"),
        ({"seq_idx_bl": torch.zeros(1, 20, dtype=torch.int64)}, "seq_idx_bl \\(1, 20\\)"),
        ({"seq_idx_bl": torch.zeros(2, 20)}, "seq_idx_bl torch.float32, expected int32 or int64"),
        ({"dt_bias_h": normal(5)}, "dt_bias_h \\(5,\\)"),
        (doubles, "float64"),
        ({"config": "p64q64"}, "there are: p32q16"),
        ({"config": "best"}, "no configuration 'best'"),
        ({"x_blhp": normal(2, 0, 4, 16)}, "length 0 must be positive"),
    ):
        for form in ("staged", "fused"):
            asked = "auto" if "config" in changes else form
            with pytest.raises(ValueError, match=words):
                ssd_scan(**{"form": asked, **inputs, **changes})


FIVE_KERNELS = "p128n128,block1024,q64p128"
"""The staged form of the paper: sums, C B^T, states of chunks, passing, scan."""


def moved_bytes(inputs, **options):
    """Unique bytes of all launches of one call, and the kernels' names."""
    with interpret.counted() as launches:
        ssd_scan(**inputs, **options)
    total = sum(launch.unique_load_bytes + launch.unique_store_bytes for launch in launches)
    return total, [launch.kernel for launch in launches]


def as_in_h1r(l, heads):
    inputs = make_inputs(1, l, heads, 128, 1, 256, BF16)
    return inputs | {"seq_idx_bl": None}


def test_bytes_moved(monkeypatch):
    """At most 0.6 of the staged form's, here with two heads and a cut per 1024 positions.

    The plan for 24 heads and 4096 positions has four cuts: as many states per position.
    """
    assert plan(1, 24, 4096, form="fused").segments == 5
    monkeypatch.setattr(module, "plan", lambda *args, **sizes: ScanPlan("fused", 2))
    inputs = as_in_h1r(1024, 2)
    staged, kernels = moved_bytes(inputs, form="staged", config=FIVE_KERNELS)
    assert len(kernels) == 5
    fused, kernels = moved_bytes(inputs, form="fused")
    assert len(kernels) == 4
    assert fused <= 0.6 * staged


@pytest.mark.slow
@pytest.mark.unsanitized  # minutes of checks that the reduced call above has passed
def test_bytes_moved_at_full_size():
    """One sequence of H1R-7B: 298 MB and 117 MB."""
    inputs = as_in_h1r(4096, 24)
    staged, kernels = moved_bytes(inputs, form="staged", config=FIVE_KERNELS)
    assert len(kernels) == 5
    fused, kernels = moved_bytes(inputs, form="fused")
    assert len(kernels) == 4
    assert fused <= 0.6 * staged
