"""Adapters to other packages: transformers' are run, all are reported when they cannot be."""

from types import SimpleNamespace

import pytest
import torch
from bench.tiny_bench import BUDGET, CPU, FakeClock, tiny_cases, tiny_session

from falcon_h1r.bench import contest, gate, peers
from falcon_h1r.bench.implementations import contestants
from falcon_h1r.bench.operators import OPERATORS

GPU = torch.device("cuda")
TRANSFORMERS = next(peer for peer in peers.PEERS if peer.name == "transformers")


def test_adapters_are_for_operators_of_the_registry():
    for peer in peers.PEERS:
        assert set(peer.adapters) <= set(OPERATORS)
        assert (peer.slack > 1) == bool(peer.slack_reason)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_transformers_computes_the_same(dtype):
    for case in tiny_cases(list(TRANSFORMERS.adapters), [dtype]):
        inputs = case.inputs()
        people = [one for one in contestants(case, tiny_session()) if one.name == "transformers"]
        truth = gate.find_expected(case, inputs)
        parts = contest.run(people, inputs, truth, FakeClock(), BUDGET)
        assert parts["transformers"]["status"] == "timed", (str(case), parts)
        assert parts["transformers"]["gate"]["slack"] == TRANSFORMERS.slack


def test_a_peer_goes_through_the_gate_like_everyone(monkeypatch):
    """An adapter that forgets the key multiplier: reported, not timed."""

    def forgetful(case, inputs):
        return TRANSFORMERS.adapters["rope"](case, inputs | {"multiplier": None})

    wrong = TRANSFORMERS._replace(adapters={"rope_key": forgetful})
    monkeypatch.setattr(peers, "PEERS", (wrong,))
    case = tiny_cases(["rope_key"])[0]
    inputs = case.inputs()
    people = contestants(case, tiny_session())
    parts = contest.run(people, inputs, gate.find_expected(case, inputs), FakeClock(), BUDGET)
    assert parts["transformers"]["status"] == "wrong" and "seconds" not in parts["transformers"]


def test_absent_and_broken_peers_are_reported(monkeypatch):
    away = peers.PeerPackage("away", "no_such_package_at_all.inside", {})
    assert peers.why_away(away, GPU) == "not installed"
    broken = peers.PeerPackage("broken", "broken_package_for_a_test", {})
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: SimpleNamespace())

    def fail(name):
        raise OSError("undefined symbol")

    monkeypatch.setattr(peers.importlib, "import_module", fail)
    reason = peers.why_away(broken, GPU)
    assert reason == "cannot be imported: OSError: undefined symbol"


def test_peers_that_need_a_gpu_say_so_and_refuse_what_they_cannot(monkeypatch):
    monkeypatch.setattr(peers, "import_error", lambda module: "")
    by_name = {peer.name: peer for peer in peers.PEERS}

    def reasons(op, dtype, device=GPU, model="two-groups"):
        case = next(c for c in tiny_cases([op], [dtype]) if (c.op, c.model) == (op, model))
        named = [peer for peer in peers.PEERS if op in peer.adapters]
        return {p.name: peers.why_away(p, device) or p.refuses(case) for p in named}

    scan = reasons("ssd_scan", torch.bfloat16)
    assert set(scan) == {"transformers", "mamba_ssm", "flash-linear-attention"}
    assert not any(scan.values())
    assert reasons("ssd_scan", torch.bfloat16, CPU)["mamba_ssm"] == "needs a GPU"
    wide = reasons("ssd_scan", torch.float32)
    assert "TF32" in wide["mamba_ssm"] and "TF32" in wide["flash-linear-attention"]
    assert reasons("attention", torch.float32)["flash_attn"] == "16-bit only"
    assert reasons("attention", torch.bfloat16)["flash_attn"] == ""
    assert reasons("gated_rms_norm", torch.float32)["mamba_ssm"] == ""
    bare = reasons("gated_rms_norm", torch.float32, model="bare-gate")
    assert "without a norm" in bare["mamba_ssm"]
    assert "float32" in reasons("rms_norm", torch.float64)["transformers"]
    assert by_name["causal_conv1d"].slack == 1
