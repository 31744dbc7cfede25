"""Clocks, and the interleaved measurement that all benchmarks share.

Contestants take turns (A B C A B C ...), so that a machine that slows down slows all of them; a
result is a median with its 20th and 80th percentile over the rounds.

On a CPU a sample is one call between two readings of `time.perf_counter`, inputs warm in the
caches as far as they fit. On a GPU it is the time between two CUDA events around one call, after
a buffer larger than the L2 cache was cleared: inputs come from memory. Clearing takes at least
half a millisecond, and up to LEAD_SECONDS for a call that took longer to launch when it was sampled
before; meanwhile the CPU gets ahead, so launching is not in the time. `host` is what the CPU spent.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

FLUSH_SECONDS = 5e-4
LEAD_SECONDS = 1e-2
FLUSH_BYTES = 2**28
SETTLE_SECONDS = 0.02
MOST_CALLS = 8


class TimeBudget(NamedTuple):
    """How long to measure: seconds per contestant, rounds at least and at most, warm-up calls.

    limit: seconds that all contestants together may take, which goes before `least`; where so many
    rounds do not fit, the warm-up is the first of them. burst: a sample is as many calls as take
    so many seconds (at most MOST_CALLS, at least one), and counts as their mean.
    """

    seconds: float = 1.0
    least: int = 5
    most: int = 1000
    warmup_calls: int = 2
    limit: float = math.inf
    burst: float = 0.0


FULL = TimeBudget()
QUICK = TimeBudget(seconds=0.1, least=3, most=100, warmup_calls=1)


class Timing(NamedTuple):
    """Seconds per call over `rounds` samples; host: median CPU time per call, None on a CPU.

    samples: in the order of the rounds, so that those of two contestants can be paired.
    """

    p20: float
    p50: float
    p80: float
    rounds: int
    host: float | None = None
    samples: tuple[float, ...] = ()


class CpuClock:
    """Wall-clock time of one call."""

    description = "perf_counter around one call, inputs warm in the caches"
    flushes = False

    def sample(self, call: Callable[[], Any]) -> tuple[float, float | None]:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start, None


class CudaClock:
    """GPU time of one call after a flushed L2 cache."""

    flushes = True

    def __init__(self, device: torch.device):
        self.device = device
        l2 = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        size = max(4 * l2, FLUSH_BYTES)
        self._buffer = torch.empty(size, dtype=torch.uint8, device=device)
        self._hosts: dict[int, float] = {}  # what each call took to launch, by its id
        took = min(self._events(self._buffer.zero_, 0)[0] for _ in range(5))
        self._pass_seconds = max(took, 1e-6)
        self.description = (
            f"CUDA events around one call, after {self._passes_for(0.0)} x {size >> 20} MiB (more "
            "where launching takes long) were cleared to empty the L2 cache"
        )

    def sample(self, call: Callable[[], Any]) -> tuple[float, float | None]:
        seconds, host = self._events(call, self._passes_for(self._hosts.get(id(call), 0.0)))
        self._hosts[id(call)] = host
        return seconds, host

    def _passes_for(self, host: float) -> int:
        """How often the buffer is cleared before a call that takes `host` seconds to launch."""
        lead = max(FLUSH_SECONDS, min(1.5 * host, LEAD_SECONDS))
        return max(1, math.ceil(lead / self._pass_seconds))

    def _flush(self, passes: int) -> None:
        for _ in range(passes):
            self._buffer.zero_()

    def _events(self, call, passes: int) -> tuple[float, float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush(passes)
        start.record()
        before = time.perf_counter()
        call()
        host = time.perf_counter() - before
        end.record()
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(end) * 1e-3, host


class WallClock:
    """Wall-clock time until the device is done: what a user of whole steps waits for.

    On a CPU it pauses before every sample: OpenMP's threads of the contestant before, of another
    library perhaps, wait actively for a while and would hold a core.
    """

    flushes = False

    def __init__(self, device: torch.device):
        self._wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else None
        self.description = "perf_counter around one step" + (
            ", device synchronised before and after"
            if self._wait
            else f", {1000 * SETTLE_SECONDS:.0f} ms of rest before it"
        )

    def sample(self, call: Callable[[], Any]) -> tuple[float, float | None]:
        if self._wait:
            self._wait()
        else:
            time.sleep(SETTLE_SECONDS)
        start = time.perf_counter()
        call()
        if self._wait:
            self._wait()
        return time.perf_counter() - start, None


def clock_for(device: torch.device) -> CpuClock | CudaClock:
    """The clock of a device. Raises ValueError for one that has none here."""
    if device.type == "cpu":
        return CpuClock()
    if device.type == "cuda":
        return CudaClock(device)
    raise ValueError(f"--device {device}: expected cpu or cuda")


def percentile(samples: Sequence[float], share: float) -> float:
    """Linear interpolation between the order statistics; share: 0 to 1."""
    ordered = sorted(samples)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def measure(
    calls: dict[str, Callable[[], Any]], clock, budget: TimeBudget = FULL
) -> dict[str, Timing]:
    """Time every call, in turns.

    The last warm-up sample of each decides the number of rounds: so many that all take
    `budget.seconds` per contestant, within the budget's bounds. A call that alone takes longer is
    warmed up once. A call with an attribute `prepare` has that called before every sample, outside
    the time.
    """
    if not calls:
        return {}
    bursts, first, estimate = {}, {}, 0.0
    for name, call in calls.items():
        for _ in range(max(budget.warmup_calls, 1)):
            first[name] = _sample(call, 1, clock)
            if (last := first[name][0]) > budget.seconds:
                break
        bursts[name] = max(1, min(MOST_CALLS, int(budget.burst / max(last, 1e-9))))
        estimate += bursts[name] * last
    estimate = max(estimate, 1e-9)
    rounds = min(max(math.ceil(budget.seconds * len(calls) / estimate), budget.least), budget.most)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    hosts: dict[str, list[float]] = {name: [] for name in calls}
    if budget.limit < budget.least * estimate:
        rounds = max(1, int(budget.limit / estimate)) - 1
        for name, (seconds, host) in first.items():
            samples[name].append(seconds)
            hosts[name] += [] if host is None else [host]
    elif budget.limit < rounds * estimate:
        rounds = int(budget.limit / estimate)
    for _ in range(rounds):
        for name, call in calls.items():
            seconds, host = _sample(call, bursts[name], clock)
            samples[name].append(seconds)
            if host is not None:
                hosts[name].append(host)
    return {name: summarise(taken, hosts[name]) for name, taken in samples.items()}


def _sample(call: Callable[[], Any], times: int, clock) -> tuple[float, float | None]:
    """One sample of `times` calls, per call."""
    if (prepare := getattr(call, "prepare", None)) is not None:
        prepare()
    if times == 1:
        return clock.sample(call)

    def burst():
        for _ in range(times):
            call()

    seconds, host = clock.sample(burst)
    return seconds / times, None if host is None else host / times


def summarise(samples: Sequence[float], hosts: Sequence[float] = ()) -> Timing:
    """The percentiles of samples in seconds."""
    points = (percentile(samples, share) for share in (0.2, 0.5, 0.8))
    host = percentile(hosts, 0.5) if hosts else None
    return Timing(*points, len(samples), host, tuple(samples))


def ratio(taken: Timing, base: Timing) -> dict[str, float]:
    """How many times as long as `base` it took: percentiles of the ratios round by round."""
    pairs = [a / b for a, b in zip(taken.samples, base.samples, strict=True)]
    return {f"p{round(100 * share)}": percentile(pairs, share) for share in (0.2, 0.5, 0.8)}
