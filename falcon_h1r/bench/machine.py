"""The machine card, and the machine's own measured ceilings."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import llama_library
from .timing import QUICK, TimeBudget, measure

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "mamba-ssm",
    "causal-conv1d",
    "flash-linear-attention",
    "flash-attn",
    *llama_library.MODULES,
    "numpy",
)
GPU_SIZES, GPU_MATRIX = (2**30,), 8192  # bytes of arrays, rows and columns of matrices
CPU_SIZES, CPU_MATRIX = (2**20, 2**24, 2**28), 1024
_GPU_FIELDS = ("driver_version", "power.limit", "clocks.max.sm", "clocks.max.mem")
_GPU_STATE = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "utilization.gpu")


def find_device(name: torch.device | str | None, option: str = "device") -> torch.device:
    """The device of this name, made the current one; None: a GPU where there is one.

    option: for messages. Raises ValueError for a device that is neither a CPU nor a GPU of this
    machine.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"{option} is {str(name)!r}, expected cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ValueError(f"{option} {name}: torch sees {count} GPUs")
        torch.cuda.set_device(device.index or 0)
    return device


def card(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on, as plain JSON values; what cannot be read is left out."""
    now = datetime.datetime.now(datetime.timezone.utc)
    out: dict[str, Any] = {
        "date": now.strftime("%Y-%m-%d %H:%M UTC"),
        "device": str(device),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "matmul_precision": torch.get_float32_matmul_precision(),
    }
    if (memory := _proc("/proc/meminfo", "MemTotal")) is not None:
        out["memory_gib"] = round(int(memory.split()[0]) / 2**20, 1)
    if device.type == "cuda":
        out["gpu"] = _gpu(device)
    commit = _commit()
    return out | state(device) | ({"commit": commit} if commit else {})


def state(device: torch.device) -> dict[str, Any]:
    """What changes in the course of a run: load, clocks, temperature."""
    out: dict[str, Any] = {}
    if hasattr(os, "getloadavg"):
        out["load_average"] = round(os.getloadavg()[0], 2)
    if (clock := _proc("/proc/cpuinfo", "cpu MHz")) is not None:
        out["cpu_mhz"] = round(float(clock))
    if device.type == "cuda":
        out["gpu_state"] = _gpu_query(device, _GPU_STATE)
    return out


def free_bytes(device: torch.device) -> float:
    """Memory that a program can still take; infinity where the system does not say."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    available = _proc("/proc/meminfo", "MemAvailable")
    return math.inf if available is None else 1024.0 * int(available.split()[0])


def busy(values: dict[str, Any]) -> str:
    """A warning for a machine that others use, or ""."""
    load, cores = values.get("load_average", 0.0), values["cores"]
    if load <= max(1.0, cores / 4):
        return ""
    return f"load average {load} on {cores} cores before the start: others compute, times are noisy"


def _gpu(device: torch.device) -> dict[str, Any]:
    p = torch.cuda.get_device_properties(device)
    out = {
        "name": p.name,
        "capability": f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "memory_gib": round(p.total_memory / 2**30, 1),
        "l2_mib": round(getattr(p, "L2_cache_size", 0) / 2**20, 1),
        "cuda": torch.version.cuda,
    }
    return out | _gpu_query(device, _GPU_FIELDS)


def _gpu_query(device: torch.device, fields: tuple[str, ...]) -> dict[str, str]:
    """What nvidia-smi says; nothing where it does not exist or does not know."""
    index = torch.cuda.current_device() if device.index is None else device.index
    chosen = str(getattr(torch.cuda.get_device_properties(device), "uuid", index))
    chosen = chosen if chosen.isdigit() or chosen.startswith("GPU-") else f"GPU-{chosen}"
    command = ["nvidia-smi", f"--id={chosen}", f"--query-gpu={','.join(fields)}"]
    values = _output([*command, "--format=csv,noheader"])
    cells = values.splitlines()[0].split(", ") if values else []
    return dict(zip(fields, cells)) if len(cells) == len(fields) else {}


def checkout() -> Path | None:
    """The root of the git checkout this package runs from, or None."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / ".git").exists() and (root / "benchmarks").is_dir() else None


def _commit() -> str | None:
    root = checkout()
    if root is None or not (found := _output(["git", "-C", str(root), "rev-parse", "HEAD"])):
        return None
    dirty = _output(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"])
    return found.strip() + (" with changes" if dirty else "")


def short_name(values: dict[str, Any]) -> str:
    """A machine's name for a file: letters, digits and dashes."""
    name = values["gpu"]["name"] if "gpu" in values else f"{values['cpu']}-{values['cores']}-cores"
    dashed = "".join(c.lower() if c.isalnum() and c.isascii() else "-" for c in name)
    return "-".join(part for part in dashed.split("-") if part) or "machine"


def _cpu_name() -> str:
    return _proc("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()


def _proc(path: str, key: str) -> str | None:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), None)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(command: list[str]) -> str | None:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        ).stdout.rstrip()
    except (OSError, subprocess.SubprocessError):
        return None


class Bandwidth(NamedTuple):
    """Bytes per second over an array of `size` bytes."""

    size: int
    read: float
    copy: float

    @property
    def best(self) -> float:
        return max(self.read, self.copy)


class Ceilings(NamedTuple):
    """What the machine did at its best, measured: bandwidths by array size, FLOP/s by dtype."""

    bandwidths: tuple[Bandwidth, ...]
    matmul: dict[torch.dtype, float]

    def bandwidth(self, size: int) -> float:
        """Bytes per second that a working set of `size` bytes can have at most.

        From the smallest measured array that is at least as large, otherwise the largest: what
        fits into a cache is held against the cache.
        """
        fitting = [b for b in self.bandwidths if b.size >= size] or [self.bandwidths[-1]]
        return fitting[0].best

    def seconds(self, size: int, flops: int, dtype: torch.dtype) -> float:
        """The least time for so many bytes and FLOPs (roofline)."""
        return max(size / self.bandwidth(size), flops / self.matmul[dtype])

    def to_json(self) -> dict[str, Any]:
        rates = {str(dtype).removeprefix("torch."): rate for dtype, rate in self.matmul.items()}
        return {"bandwidths": [b._asdict() for b in self.bandwidths], "matmul": rates}


def measure_ceilings(
    device: torch.device, dtypes: Sequence[torch.dtype], clock, budget: TimeBudget = QUICK
) -> Ceilings:
    """Sum and copy arrays, and multiply square matrices; each at the 20th percentile of time.

    On a GPU one array of 1 GiB, since caches are flushed before each call anyway. A copy counts
    its bytes twice, read and written. Matrix products of float32 are IEEE, not TF32, where torch's
    own setting says so ("matmul_precision" of the card); the second matrix lies either way, as in a
    linear layer or not, and the faster one counts.
    """
    on_gpu = device.type == "cuda"
    sizes, n = (GPU_SIZES, GPU_MATRIX) if on_gpu else (CPU_SIZES, CPU_MATRIX)
    bandwidths = []
    for size in sizes:
        source = torch.ones(size // 4, device=device)
        target = torch.empty_like(source)
        calls = {"read": source.sum, "copy": lambda t=target, s=source: t.copy_(s)}
        taken = measure(calls, clock, budget)
        bandwidths.append(Bandwidth(size, size / taken["read"].p20, 2 * size / taken["copy"].p20))
        del source, target
    matmul = {}
    for dtype in dict.fromkeys(dtypes):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        calls = {"plain": lambda a=a, b=b: a @ b, "linear": lambda a=a, b=b: a @ b.mT}
        taken = measure(calls, clock, budget)
        matmul[dtype] = 2 * n**3 / min(timing.p20 for timing in taken.values())
    return Ceilings(tuple(bandwidths), matmul)
