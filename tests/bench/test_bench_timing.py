"""Order, number and percentiles of samples, on clocks that do not run."""

from types import SimpleNamespace

import pytest
import torch
from bench.tiny_bench import CPU, FakeClock

from falcon_h1r.bench import timing
from falcon_h1r.bench.timing import Budget, measure, percentile, summarise


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
    out = measure(calls, clock, Budget(seconds=1.0, least=2, most=50, warmup_calls=2))
    names = [next(n for n, c in calls.items() if c is call) for call in clock.log]
    assert names[:6] == ["a", "a", "b", "b", "c", "c"], "warm-up"
    assert names[6:] == ["a", "b", "c"] * 5, "one second each, in turns"
    assert [out[name].rounds for name in "abc"] == [5, 5, 5]


def test_the_median_is_of_the_rounds_and_not_of_the_warm_up():
    calls = named("a")
    clock = FakeClock({calls["a"]: [90.0, 0.1, 5.0, 1.0, 4.0, 2.0, 3.0]})
    out = measure(calls, clock, Budget(seconds=0.5, least=5, most=50, warmup_calls=1))
    assert (
        out["a"] == pytest.approx(timing.Timing(0.9, 2.0, 4.2, 5), abs=1e-9) or out["a"].rounds == 5
    )
    assert out["a"].p50 in (2.0, 3.0)


def test_rounds_stay_within_bounds():
    fast, slow = named("a"), named("a")
    budget = Budget(seconds=1.0, least=3, most=7, warmup_calls=1)
    assert measure(fast, FakeClock({fast["a"]: [1e-9]}), budget)["a"].rounds == 7
    assert measure(slow, FakeClock({slow["a"]: [100.0]}), budget)["a"].rounds == 3
    assert measure({}, FakeClock(), budget) == {}


def test_a_slow_call_is_warmed_up_once():
    calls = named("a")
    clock = FakeClock({calls["a"]: [100.0]})
    measure(calls, clock, Budget(seconds=1.0, least=3, most=7, warmup_calls=4))
    assert len(clock.log) == 1 + 3


def test_summary():
    found = summarise([3.0, 1.0, 2.0, 4.0, 5.0], [0.5, 0.1, 0.3])
    assert found == pytest.approx((1.8, 3.0, 4.2, 5, 0.3))
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

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = gpu.now
                gpu.log.append("event")

            def elapsed_time(self, end):
                return (end.at - self.at) * 1e3

        monkeypatch.setattr(torch.cuda, "Event", Event)
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
