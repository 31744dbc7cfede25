"""Order, number and percentiles of samples, on clocks that do not run."""

from types import SimpleNamespace

import pytest
import torch
from bench.tiny_bench import CPU, FakeClock

from falcon_h1r.bench import timing
from falcon_h1r.bench.timing import TimeBudget, measure, percentile, summarise


def test_percentiles_are_torchs():
    samples = torch.rand(31, dtype=torch.float64).tolist()
    for share in (0.0, 0.2, 0.5, 0.8, 1.0):
        expected = float(torch.quantile(torch.tensor(samples, dtype=torch.float64), share))
        assert percentile(samples, share) == pytest.approx(expected, rel=1e-12)
    assert percentile([3.0], 0.8) == 3.0
    assert percentile([1.0, 2.0], 0.5) == 1.5


def named(*names):
    return {name: (lambda name=name: name) for name in names}


def test_contestants_take_turns():
    calls = named("a", "b", "c")
    clock = FakeClock({calls["a"]: [0.2], calls["b"]: [0.2], calls["c"]: [0.2]})
    out = measure(calls, clock, TimeBudget(seconds=1.0, least=2, most=50, warmup_calls=2))
    names = [next(n for n, c in calls.items() if c is call) for call in clock.log]
    assert names[:6] == ["a", "a", "b", "b", "c", "c"], "warm-up"
    assert names[6:] == ["a", "b", "c"] * 5, "one second each, in turns"
    assert [out[name].rounds for name in "abc"] == [5, 5, 5]


def test_the_median_is_of_the_rounds_and_not_of_the_warm_up():
    calls = named("a")
    clock = FakeClock({calls["a"]: [90.0, 0.1, 5.0, 1.0, 4.0, 2.0, 3.0]})
    out = measure(calls, clock, TimeBudget(seconds=0.5, least=5, most=50, warmup_calls=1))
    assert out["a"].rounds == 5 and out["a"].samples[:2] == (0.1, 5.0)
    assert out["a"].p50 in (2.0, 3.0)


def test_rounds_stay_within_bounds():
    fast, slow = named("a"), named("a")
    budget = TimeBudget(seconds=1.0, least=3, most=7, warmup_calls=1)
    assert measure(fast, FakeClock({fast["a"]: [1e-9]}), budget)["a"].rounds == 7
    assert measure(slow, FakeClock({slow["a"]: [100.0]}), budget)["a"].rounds == 3
    assert measure({}, FakeClock(), budget) == {}


def test_a_slow_call_is_warmed_up_once():
    calls = named("a")
    clock = FakeClock({calls["a"]: [100.0]})
    measure(calls, clock, TimeBudget(seconds=1.0, least=3, most=7, warmup_calls=4))
    assert len(clock.log) == 1 + 3


def test_a_limit_goes_before_the_least_number_of_rounds():
    budget = TimeBudget(seconds=1.0, least=5, most=50, warmup_calls=1, limit=9.0)

    def rounds(seconds, **options):
        calls = named("a", "b")
        clock = FakeClock({call: list(times) for call, times in zip(calls.values(), seconds)})
        out = measure(calls, clock, budget._replace(**options))
        return out["a"].samples, out["b"].samples, len(clock.log)

    # 3 s a round: three fit, the warm-up among them.
    assert rounds([[1.0, 1.1, 1.2], [2.0, 2.1, 2.2]]) == ((1.0, 1.1, 1.2), (2.0, 2.1, 2.2), 6)
    # 10 s a round: the warm-up is all there is.
    assert rounds([[4.0], [6.0]]) == ((4.0,), (6.0,), 2)
    # 0.04 s a round: fifty would be wanted, the limit allows ten, without the warm-up.
    a, b, calls = rounds([[0.02, 0.03], [0.02, 0.03]], limit=0.4)
    assert a == b == (0.03,) * 10 and calls == 2 * (1 + 10)
    # The limit does not lengthen what is short already.
    assert len(rounds([[0.5], [0.5]], limit=1e9)[0]) == 5


def test_a_sample_of_short_calls_is_the_mean_of_several():
    counts = {"a": 0, "b": 0}

    def call(name):
        counts[name] += 1

    calls = {name: (lambda name=name: call(name)) for name in counts}

    class Clock:
        def sample(self, call):
            before = dict(counts)
            call()
            a, b = (counts[name] - before[name] for name in "ab")
            return 0.03 * a + 0.4 * b, None

    out = measure(
        calls, Clock(), TimeBudget(seconds=1.0, least=3, most=3, warmup_calls=1, burst=0.1)
    )
    assert counts == {"a": 1 + 3 * 3, "b": 1 + 3}
    assert out["a"].samples == pytest.approx((0.03,) * 3) and out["b"].p50 == pytest.approx(0.4)
    counts["a"] = 0
    measure({"a": calls["a"]}, Clock(), TimeBudget(1.0, 1, 1, 1, burst=100.0))
    assert counts["a"] == 1 + timing.MOST_CALLS


def test_what_prepares_a_call_is_not_timed():
    log = []

    class Prepared:
        def prepare(self):
            log.append("prepare")

        def __call__(self):
            log.append("call")

    class Clock:
        def sample(self, call):
            log.append("start")
            call()
            log.append("stop")
            return 0.03, 0.02

    budget = TimeBudget(seconds=0.1, least=1, most=1, warmup_calls=2, burst=0.07)
    out = measure({"a": Prepared()}, Clock(), budget)["a"]
    once = ["prepare", "start", "call", "stop"]
    assert log == [*once, *once, "prepare", "start", "call", "call", "stop"]
    assert (out.p50, out.host) == pytest.approx((0.015, 0.01))


def test_ratios_are_taken_round_by_round():
    base, peer = summarise([1.0, 2.0, 4.0, 5.0]), summarise([3.0, 4.0, 4.0, 5.0])
    assert timing.ratio(peer, base) == pytest.approx({"p20": 1.0, "p50": 1.5, "p80": 2.4})
    with pytest.raises(ValueError):
        timing.ratio(peer, summarise([1.0]))


def test_the_wall_clock_rests_before_a_cpu_sample(monkeypatch):
    log = []
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: log.append(seconds))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: log.append("read") or 0.0)
    clock = timing.WallClock(CPU)
    clock.sample(lambda: log.append("call"))
    assert log == [timing.SETTLE_SECONDS, "read", "call", "read"] and "rest" in clock.description


def test_summary():
    found = summarise([3.0, 1.0, 2.0, 4.0, 5.0], [0.5, 0.1, 0.3])
    assert found[:5] == pytest.approx((1.8, 3.0, 4.2, 5, 0.3))
    assert found.samples == (3.0, 1.0, 2.0, 4.0, 5.0)
    assert summarise([1.0]).host is None


def test_the_cpu_clock_times_the_call(monkeypatch):
    readings = iter([10.0, 10.25])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(readings))
    assert timing.clock_for(CPU).sample(lambda: None) == (0.25, None)
    with pytest.raises(ValueError, match="expected cpu or cuda"):
        timing.clock_for(torch.device("meta"))


class FakeGpu:
    """Events that read a clock which clearing and calls advance; `log` is the order of all."""

    def __init__(self, monkeypatch, l2):
        self.now, self.log = 0.0, []
        gpu = self

        class FakeEvent:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = gpu.now
                gpu.log.append("event")

            def elapsed_time(self, end):
                return (end.at - self.at) * 1e3

        monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: self.log.append("wait"))
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=l2)
        )

    def spend(self, what, seconds):
        self.now += seconds
        self.log.append(what)


def test_the_gpu_clock_empties_the_cache_before_each_call(monkeypatch):
    gpu = FakeGpu(monkeypatch, l2=1000)
    monkeypatch.setattr(timing, "FLUSH_BYTES", 64)
    zero = torch.Tensor.zero_

    def spending_zero(tensor):
        gpu.spend("clear", 2e-4)
        return zero(tensor)

    monkeypatch.setattr(torch.Tensor, "zero_", spending_zero)
    clock = timing.CudaClock(CPU)
    assert clock._buffer.numel() == 4000, "four times the L2 cache"
    gpu.log.clear()
    seconds, host = clock.sample(lambda: gpu.spend("call", 3e-3))
    assert gpu.log == ["clear"] * 3 + ["event", "call", "event", "wait"], "half a millisecond"
    assert seconds == pytest.approx(3e-3) and host >= 0
    assert "3 x" in clock.description and clock.flushes


@pytest.mark.parametrize("host, passes", [(1e-4, 3), (1e-3, 8), (1.0, 51)])
def test_the_gpu_clock_lets_a_slow_launch_get_ahead(monkeypatch, host, passes):
    gpu = FakeGpu(monkeypatch, l2=1)
    monkeypatch.setattr(timing, "FLUSH_BYTES", 64)
    monkeypatch.setattr(torch.Tensor, "zero_", lambda tensor: gpu.spend("clear", 2e-4))
    clock = timing.CudaClock(CPU)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: gpu.cpu)
    gpu.cpu = 0.0

    def call():
        gpu.cpu += host
        gpu.log.append("call")

    for expected in (3, passes):
        gpu.log.clear()
        clock.sample(call)
        assert gpu.log.index("event") == expected
    assert gpu.log.count("clear") == passes


def test_the_wall_clock_waits_for_the_device(monkeypatch):
    gpu = FakeGpu(monkeypatch, l2=1)
    clock = timing.WallClock(torch.device("cuda"))
    clock.sample(lambda: gpu.log.append("call"))
    assert gpu.log == ["wait", "call", "wait"]
    assert timing.WallClock(CPU).sample(lambda: None)[1] is None
