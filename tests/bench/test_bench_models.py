"""`bench layer` and `bench generate`: costs from tensors, the gate, what is written."""

import pytest
import torch
from bench.tiny_bench import BARE_GATE, BUDGET, CPU, TWO_GROUPS, FakeClock, tiny_session
from models import make_config, rms_error
from torch.utils.flop_counter import FlopCounterMode

from falcon_h1r import FalconH1ForCausalLM, cost
from falcon_h1r.bench import (
    contest,
    contestants,
    generation_bench,
    layer,
    peer_layer,
    peer_model,
    report,
    timing,
)
from falcon_h1r.bench.registry import Workload
from falcon_h1r.ops import REFERENCE, TORCH

WORKLOADS = [
    Workload("prefill", 2, 37),
    Workload("resume", 2, 5, 9),
    Workload("decode", 3, 1, 20),
]
BIASED = make_config("all_biases")


def run_layer(config=TWO_GROUPS, dtype=torch.float32, workloads=WORKLOADS, compiled=False):
    session = tiny_session(compiled=compiled)
    wrong = layer.run("t", config, workloads, dtype, session)
    return session.results.records, wrong


@pytest.mark.parametrize("config", [TWO_GROUPS, BARE_GATE, BIASED], ids=["groups", "bare", "bias"])
def test_a_layers_bytes_are_those_of_its_tensors(config):
    for dtype in (torch.float32, torch.bfloat16):
        model = FalconH1ForCausalLM(layer.block_config(config), dtype=dtype)
        block = model.model["layers"][0]
        for w in WORKLOADS:
            cache = model.new_cache(w.batch, w.past + w.length)
            item, stream = dtype.itemsize, w.batch * w.length * config.hidden_size
            per_key = (cache.keys.nbytes + cache.values.nbytes) // (w.past + w.length)
            states = cache.windows.nbytes + cache.states.nbytes
            read = sum(p.nbytes for p in block.parameters()) + stream * item
            found = layer.layer_cost(config, w, dtype)
            assert found.read == read + per_key * w.past + states
            assert found.written == stream * item + per_key * w.length + states


def test_a_layers_flops_hold_its_counted_products():
    """Torch counts the linears (biases aside); attention and scan come from the registry."""
    w = WORKLOADS[0]
    model = FalconH1ForCausalLM(layer.block_config(TWO_GROUPS))
    inputs = layer.make_inputs(model, w, CPU, 0)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer.bind(model, inputs).call()
    linears = sum(
        count
        for name, count in counter.get_flop_counts()["Global"].items()
        if str(name) in ("aten.mm", "aten.addmm")
    )
    c, tokens = TWO_GROUPS, w.batch * w.length
    conv = 2 * tokens * c.conv_dim * (c.mamba_d_conv + c.mamba_conv_bias)
    products = sum(
        layer.OPERATORS[name].cost(layer.Size(c, torch.float32, w.batch, w.length, 0)).flops
        for name in ("attention", "ssd_scan")
    )
    assert layer.layer_cost(c, w, torch.float32).flops == linears + conv + products


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_table_and_transformers_pass(dtype):
    records, wrong = run_layer(dtype=dtype)
    assert wrong == 0 and len(records) == 1 + 3 * len(WORKLOADS)
    assert records[0]["record"] == "absent" and records.pop(0)["implementation"] == "triton"
    status = {(r["phase"], r["implementation"]): r["status"] for r in records}
    for phase in ("prefill", "resume", "decode"):
        for name in ("reference", "torch", "transformers"):
            assert status[phase, name] == "timed"
    bare, wrong = run_layer(BARE_GATE, dtype)
    assert wrong == 0 and all(r["status"] == "timed" for r in bare[1:])


def test_on_a_gpu_the_kernels_take_part():
    """Through Triton's interpreter: one block and one model under the TRITON table, float32."""
    gpu = torch.device("cuda")
    model = FalconH1ForCausalLM(layer.block_config(TWO_GROUPS))
    with torch.no_grad():
        for w in (Workload("prefill", 1, 5), Workload("decode", 1, 1, 6)):
            inputs = layer.make_inputs(model, w, CPU, 0)
            layer.excite(model, 0, layer.bind(model, inputs).call)
            people = [
                p for p in layer.contestants(model, w, tiny_session(gpu)) if p.name == "triton"
            ]
            truth = layer.find_expected(model, inputs)
            parts = contest.run(people, inputs, truth, FakeClock(), BUDGET._replace(most=1))
            assert parts["triton"]["status"] == "timed", parts
        whole = generation_bench.random_model(TWO_GROUPS, torch.float32, CPU, 0)
        ids = torch.arange(10)[None]
        exact = whole(ids)[:, -1]
        found = contestants.tables(gpu, torch.float32)
        assert list(found) == ["reference", "torch", "triton"]
        for table in found.values():
            assert contestants.check(layer.under(whole, table), exact, ids).passed
    assert "float64" in contestants.tables(gpu, torch.float64)["triton"]


def test_the_loop_is_not_timed_over_many_tokens():
    records, _ = run_layer(workloads=[Workload("prefill", 1, 65)])
    assert records[1]["implementation"] == "reference" and records[1]["status"] == "absent"


def faulty_step(state_bhpn, *args):
    return TORCH.ssd_step(state_bhpn.clone(), *args)


def faulty_attention(q_bhle, k_bjse, v_bjse, **options):
    return TORCH.attention(q_bhle, k_bjse.flip(1), v_bjse, **options)


@pytest.mark.parametrize(
    ("field", "fault", "phase"),
    [
        ("ssd_step", faulty_step, "decode"),
        ("attention", faulty_attention, "prefill"),
        ("attention", faulty_attention, "resume"),
        ("swiglu", lambda gate, up, m: TORCH.swiglu(gate, up, 1.0), "decode"),
        ("rms_norm", lambda x, weight, eps: TORCH.rms_norm(x, weight, eps + 0.1), "decode"),
        ("rope", lambda x, cos, sin, multiplier=1.0: TORCH.rope(x, cos, sin), "decode"),
        (
            "rope",
            lambda x, cos, sin, multiplier=1.0: TORCH.rope(x, cos, -sin, multiplier),
            "resume",
        ),
        (
            "decode_attention",
            lambda q, k, v, n: TORCH.decode_attention(q, k.flip(1), v, n),
            "decode",
        ),
        ("causal_conv1d_step", lambda x, *rest: TORCH.causal_conv1d_step(x * 0.9, *rest), "decode"),
        ("gated_rms_norm", lambda y, z, *rest: TORCH.gated_rms_norm(y, -z, *rest), "prefill"),
    ],
)
def test_a_fault_anywhere_in_the_layer_is_refused(monkeypatch, field, fault, phase):
    monkeypatch.setattr(layer.ops, "REFERENCE", REFERENCE._replace(**{field: fault}))
    records, wrong = run_layer(dtype=torch.bfloat16)
    status = {(r["phase"], r["implementation"]): r["status"] for r in records[1:]}
    assert status[phase, "reference"] == "wrong" and status[phase, "torch"] == "timed"
    assert wrong >= 1


def test_everyone_starts_from_the_same_cache_and_leaves_it_alone():
    model = FalconH1ForCausalLM(layer.block_config(TWO_GROUPS))
    inputs = layer.make_inputs(model, WORKLOADS[2], CPU, 0)
    before = layer.copy_of(inputs["cache"])
    for bound in (layer.bind(model, inputs), peer_layer._bind(model, inputs)):
        bound.call()
    for name in ("keys", "values", "windows", "states", "lengths"):
        assert torch.equal(getattr(before, name), getattr(inputs["cache"], name))


@torch.no_grad()
def test_transformers_context_does_not_grow_from_call_to_call():
    model = FalconH1ForCausalLM(layer.block_config(TWO_GROUPS))
    inputs = layer.make_inputs(model, WORKLOADS[2], CPU, 0)
    bound = peer_layer._bind(model, inputs)
    lengths = set()
    attend = torch.nn.functional.scaled_dot_product_attention

    def watching(q, k, v, **options):
        lengths.add(k.shape[2])
        return attend(q, k, v, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", watching)
        for _ in range(3):
            bound.call()
    assert lengths == {21}


def test_one_set_of_weights_under_several_tables():
    model = FalconH1ForCausalLM(TWO_GROUPS, dtype=torch.bfloat16)
    other, wide = layer.under(model, REFERENCE), layer.under(model, TORCH, torch.float64)
    pairs = zip(model.parameters(), other.parameters(), wide.parameters())
    for one, same, double in pairs:
        assert one.data_ptr() == same.data_ptr() and one.dtype == same.dtype
        assert double.dtype == torch.float64 and torch.equal(double, one.double())
    assert other.ops is REFERENCE and not any(p.is_meta for p in other.parameters())


@torch.no_grad()
def test_excited_weights_let_every_part_of_a_block_show():
    """Attention's scores vary by about 1, each branch adds about 1, dt spans its range."""
    config = make_config("two_groups", key_multiplier=0.03, ssm_out_multiplier=0.05)
    seen = {}

    def attention(q, k, v, **options):
        scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).mT * q.shape[-1] ** -0.5
        seen["scores"] = float(scores.std())
        return TORCH.attention(q, k, v, **options)

    def ssd_scan(x, dt, *rest, **options):
        seen["dt"] = dt
        return TORCH.ssd_scan(x, dt, *rest, **options)

    table = TORCH._replace(attention=attention, ssd_scan=ssd_scan)
    model = FalconH1ForCausalLM(layer.block_config(config), ops=table)
    inputs = layer.make_inputs(model, WORKLOADS[0], CPU, 0)
    call = layer.bind(model, inputs).call
    layer.excite(model, 0, call)
    block, added = model.model["layers"][0], {}
    for name, factor in (
        ("self_attn", config.attention_out_multiplier),
        ("mamba", config.ssm_out_multiplier),
        ("feed_forward", 1.0),
    ):
        block.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name, factor=factor: added.update(
                {name: float(out.square().mean().sqrt()) * factor}
            )
        )
    call()
    assert 0.5 < seen["scores"] < 4
    assert float(seen["dt"].min()) < 0.1 and float(seen["dt"].max()) > 0.5
    assert added == pytest.approx(dict.fromkeys(added, 1.0), rel=0.05) and len(added) == 3


def run_generate(model, workloads=WORKLOADS, only=(), skip=(), peers=False):
    """Records of results, and how many of ours were wrong; who is away is checked."""
    if not only:  # compiling takes seconds
        skip = [*skip, contestants.COMPILED]
    session, names = tiny_session(), contestants.select(only, skip, peers)
    wrong = generation_bench.run("t", model, workloads, session, names)
    records = session.results.records
    found = [r for r in records if r["record"] != "absent"]
    away = {r["implementation"] for r in records if r["record"] == "absent"}
    assert not away & {r["implementation"] for r in found}
    assert {"triton"} & set(names) <= away or "triton" in {r["implementation"] for r in found}
    return found, wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_generation_beside_transformers(dtype):
    model = generation_bench.random_model(TWO_GROUPS, dtype, CPU, 0)
    records, wrong = run_generate(model, peers=True)
    peers = [r for r in records if r["implementation"] == "transformers"]
    assert wrong == 0 and [r["status"] for r in peers] == ["timed"] * len(WORKLOADS)


@pytest.mark.parametrize("l", [1, 3])
@torch.no_grad()
def test_the_peers_step_is_ours(l):
    """From the same cache, at the same depth, again and again; its parameters are no copies."""
    model = generation_bench.random_model(TWO_GROUPS, torch.float32, CPU, 0)
    peer = peer_model.transformers_model(model)
    w = Workload("decode" if l == 1 else "resume", 2, l, 6)
    assert (
        peer.model.embed_tokens.weight.data_ptr()
        == model.state_dict()["model.embed_tokens.weight"].data_ptr()
    )
    cache, ids = generation_bench.filled_cache(model, w, 0), torch.arange(2 * l).view(2, l)
    seen, forward = [], peer.forward

    def watch(*args, **kwargs):
        seen.append(forward(*args, **kwargs))
        return seen[-1]

    peer.forward = watch
    step = peer_model.make_step(peer, w, ids, cache)
    step()
    expected = model(ids, cache=cache, logits_to_keep=1)
    assert rms_error(seen[-1].logits, expected) < 1e-5
    step()
    assert seen[-1][peer_model.cache_name(peer)].get_seq_length() == 6 + l


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_generation_counts_tokens_and_bytes(dtype):
    model = generation_bench.random_model(TWO_GROUPS, dtype, CPU, 0)
    records, wrong = run_generate(model)
    assert wrong == 0
    torchs = [r for r in records if r["implementation"] == "torch"]
    for r, w in zip(torchs, WORKLOADS, strict=True):
        tokens = w.batch * w.length
        assert (
            r["tokens_per_second"] == tokens / 0.5 and r["bytes_per_token"] * tokens == r["bytes"]
        )
        assert r["gate"]["rms"] <= r["gate"]["rms_allowed"]
    decode, w = torchs[2], WORKLOADS[2]
    moved = cost.decode_bytes(TWO_GROUPS, w.past + 1, w.batch, dtype)
    new = w.batch * cost.kv_bytes(TWO_GROUPS, 1, dtype)
    assert decode["bytes"] == moved["total"] + new
    assert decode["flops"] == w.batch * cost.decode_flops(TWO_GROUPS, w.past + 1)["total"]


def test_prefill_costs_what_its_layers_and_head_cost():
    c, w = TWO_GROUPS, WORKLOADS[0]
    found = generation_bench.step_cost(c, w, torch.float32)
    head = w.batch * 2 * c.vocab_size * c.hidden_size
    layers = c.num_hidden_layers * layer.layer_cost(c, w, torch.float32).flops
    assert found.flops == layers + head
    model = FalconH1ForCausalLM(c)
    cache = model.new_cache(w.batch, w.length)
    assert found.written == cache.nbytes
    weights = sum(p.nbytes for p in model.parameters())
    rows = model.model["embed_tokens"].weight[: w.batch]
    table = model.model["embed_tokens"].weight.nbytes - rows.nbytes
    assert found.read == weights - table + cache.windows.nbytes + cache.states.nbytes


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("ssd_step", lambda *args: TORCH.ssd_step(*args[:6])),
        ("causal_conv1d_step", lambda *args: TORCH.causal_conv1d_step(*args) * 1.2),
        ("decode_attention", lambda *args: TORCH.decode_attention(*args) * 1.2),
    ],
)
def test_a_table_that_decodes_wrongly_is_not_timed(monkeypatch, field, wrong):
    tables = {"torch": TORCH, "triton": TORCH._replace(**{field: wrong})}
    monkeypatch.setattr(contestants, "tables", lambda device, dtype: tables)
    model = generation_bench.random_model(TWO_GROUPS, torch.bfloat16, CPU, 0)
    records, count = run_generate(model, WORKLOADS[2:], only=["torch", "triton"])
    status = {r["implementation"]: r["status"] for r in records}
    assert (status, count) == ({"torch": "timed", "triton": "wrong"}, 1)


@torch.no_grad()
def test_every_decode_step_stands_at_the_same_depth():
    model = FalconH1ForCausalLM(TWO_GROUPS)
    w = WORKLOADS[2]
    depths, forward = [], model.forward
    model.forward = lambda ids, cache, **k: (
        depths.append(cache.lengths.tolist()),
        forward(ids, cache=cache, **k),
    )[1]
    cache = generation_bench.filled_cache(model, w, 0)
    step = contestants.make_step(model, w, torch.zeros(3, 1, dtype=torch.long), cache)
    step()
    step()
    assert depths == [[w.past] * w.batch] * 2


def test_memory_that_is_needed():
    model = FalconH1ForCausalLM(TWO_GROUPS, dtype=torch.bfloat16)
    weights = sum(p.nbytes for p in model.parameters())
    largest = max(model.new_cache(w.batch, w.past + w.length + 128).nbytes for w in WORKLOADS)
    found = generation_bench.memory_bytes(TWO_GROUPS, WORKLOADS, torch.bfloat16)
    assert found == weights + largest


@pytest.mark.slow  # compiles a step of each shape
def test_compiled_models_take_part(monkeypatch):
    model = generation_bench.random_model(TWO_GROUPS, torch.float32, CPU, 0)
    records, wrong = run_generate(model, only=["torch", contestants.COMPILED])
    assert wrong == 0
    names = [(r["phase"], r["implementation"], r["status"]) for r in records]
    assert names == [
        (phase, name, "timed")
        for phase in ("prefill", "resume", "decode")
        for name in ("torch", contestants.COMPILED)
    ]

    def none():
        raise ValueError("no C++ compiler")

    monkeypatch.setattr(contestants, "require_compiler", none)
    assert contestants._compiled(model) == "no C++ compiler"


def test_who_takes_part():
    everyone = [*contestants.OURS, *contestants.PEERS]
    assert contestants.select((), (), True) == everyone
    assert contestants.select((), ("torch",), False) == [
        n for n in contestants.OURS if n != "torch"
    ]
    assert contestants.select(("llama.cpp", "torch"), (), True) == ["torch", "llama.cpp"]
    for only, skip in (("torhc",), ()), ((), ("x",)):
        with pytest.raises(ValueError, match="no way to run a model is called"):
            contestants.select(only, skip, True)
    with pytest.raises(ValueError, match="nobody is left"):
        contestants.select(("llama.cpp",), (), False)


def test_only_those_who_take_part_are_built(monkeypatch):
    model = generation_bench.random_model(TWO_GROUPS, torch.float32, CPU, 0)
    monkeypatch.setattr(contestants.peer_model, "transformers_model", lambda model: 1 / 0)
    monkeypatch.setattr(contestants.llama_model, "llama_model", lambda model: 1 / 0)
    records, wrong = run_generate(model, peers=True, only=["torch", "triton"])
    assert wrong == 0 and [r["implementation"] for r in records] == ["torch"] * 3


def test_ratios_to_the_peers(monkeypatch):
    """Ours take a second, then two; the peer always three."""
    model = generation_bench.random_model(TWO_GROUPS, torch.float32, CPU, 0)
    monkeypatch.setattr(contestants.peer_model, "make_step", lambda peer, *rest: lambda: None)

    def measure(calls, clock, budget):
        samples = {"torch": [1.0, 2.0, 2.0], "transformers": [3.0, 3.0, 3.0]}
        samples[generation_bench.READING] = [0.5, 0.6, 0.7]
        return {name: timing.summarise(samples[name]) for name in calls}

    monkeypatch.setattr(generation_bench.timing, "measure", measure)
    records, _ = run_generate(
        model,
        WORKLOADS[2:],
        peers=True,
        skip=["reference", "torch, onednn", "llama.cpp"],
    )
    ours, peer = records
    assert ours["speed_over"] == {
        "transformers": pytest.approx({"p20": 1.5, "p50": 1.5, "p80": 2.4})
    }
    assert "speed_over" not in peer
    per_cent = 100 * ours["bytes"] / 2**28  # of what was read beside it, 256 MiB, in each round
    assert ours["percent_of_reading"] == pytest.approx(
        {"p20": 0.32 * per_cent, "p50": 0.35 * per_cent, "p80": 0.44 * per_cent}
    )
    line = report.line("torch", ours)
    assert "1.50x transformers [1.50, 2.40]" in line
    assert f"{ours['percent_of_reading']['p50']:.0f} % of reading memory" in line


def test_memory_is_given_in_turns():
    w = Workload("decode", 1, 1, 5)
    people = {
        name: contestants.Contestant(name, extra=lambda w, n=extra: n)
        for name, extra in (("a", 0), ("b", 6 * 10**9), ("c", 5 * 10**9), ("d", 4 * 10**9))
    }
    people["e"] = contestants.Contestant("e", refuses=lambda w: "no steps", extra=lambda w: 10**12)
    found = dict(generation_bench._unserved(w, people, 10e9))
    assert found == {"c": "takes 5.0 GB, 4.0 GB are left beside the others", "e": "no steps"}
    assert list(dict(generation_bench._unserved(w, people, -1.0))) == ["b", "c", "d", "e"]


def test_the_peers_that_do_not_fit_are_said_to_be_absent(monkeypatch):
    model = generation_bench.random_model(TWO_GROUPS, torch.float32, CPU, 0)
    w = WORKLOADS[2]
    cache = model.new_cache(w.batch, w.past + w.length + 128).nbytes
    extra = contestants._kept_bytes(model, w)
    kept = model.new_cache(w.batch, w.past + w.length)
    assert (
        extra
        == 2 * (kept.keys.nbytes + kept.values.nbytes) + kept.windows.nbytes + kept.states.nbytes
    )
    for room, status in ((cache + extra, "timed"), (cache + extra - 1, "absent")):
        free = room / generation_bench.MEMORY_SHARE + 1e-6
        monkeypatch.setattr(generation_bench.machine, "free_bytes", lambda device, f=free: f)
        records, _ = run_generate(model, [w], peers=True, only=["torch", "transformers"])
        assert [r["status"] for r in records] == ["timed", status]


def test_an_error_before_the_first_step_is_a_result_and_calls_are_closed(monkeypatch):
    model = generation_bench.random_model(TWO_GROUPS, torch.float32, CPU, 0)
    closed = []

    class Closing:
        settings = "as they come"

        def __call__(self):
            pass

        def close(self):
            closed.append(1)

    made = contestants.make_step
    steps = {"reference": lambda *a: 1 / 0, "torch": lambda *a: Closing(), "torch, onednn": made}

    def gather(model, names):
        pass_gate = lambda exact, ids: contestants.check(model, exact, ids)  # noqa: E731
        people = {
            name: contestants.Contestant(name, pass_gate, (lambda f: lambda *a: f(model, *a))(step))
            for name, step in steps.items()
        }
        return people, {"triton": "needs a GPU"}

    monkeypatch.setattr(contestants, "gather", gather)
    records, wrong = run_generate(model, WORKLOADS[2:])
    assert wrong == 1 and closed == [1]
    assert [r["status"] for r in records] == ["failed", "timed", "timed"]
    assert "ZeroDivisionError" in records[0]["reason"] and records[1]["settings"] == "as they come"
    assert "(as they come)" in report.line("torch", records[1])


def test_a_peer_that_is_wrong_is_not_timed_and_no_fault_of_ours(monkeypatch):
    model = generation_bench.random_model(TWO_GROUPS, torch.float32, CPU, 0)
    last = contestants.peer_model.last_logits
    monkeypatch.setattr(contestants.peer_model, "last_logits", lambda *a: last(*a) * 1.01)
    records, wrong = run_generate(model, WORKLOADS[2:], peers=True, only=["torch", "transformers"])
    assert wrong == 0 and [r["status"] for r in records] == ["timed", "wrong"]


def test_a_sample_on_a_cpu_is_more_than_one_short_step(monkeypatch):
    budgets, real = [], timing.measure

    def measure(calls, clock, budget):
        budgets.append(budget)
        return real(calls, clock, budget)

    monkeypatch.setattr(generation_bench.timing, "measure", measure)
    model = generation_bench.random_model(TWO_GROUPS, torch.float32, CPU, 0)
    run_generate(model, WORKLOADS[2:], only=["torch"])
    assert budgets == [BUDGET._replace(burst=generation_bench.BURST_SECONDS)]


def test_what_the_system_says_is_free(monkeypatch):
    from falcon_h1r.bench import machine

    assert 2**20 < machine.free_bytes(CPU) < 2**50
    monkeypatch.setattr(machine, "_proc", lambda path, key: "12 kB")
    assert machine.free_bytes(CPU) == 12 * 1024
    monkeypatch.setattr(machine, "_proc", lambda path, key: None)
    assert machine.free_bytes(CPU) == float("inf")
