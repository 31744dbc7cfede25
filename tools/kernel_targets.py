"""The machines that kernels are compiled for: limits per SM, and datasheet peaks for the floors."""

from typing import NamedTuple


class Target(NamedTuple):
    """Sizes in bytes. `registers`: 32-bit, per SM; `tmem`: tensor-memory columns per SM."""

    backend: str
    arch: int | str
    warp: int
    shared_per_block: int
    shared_per_sm: int
    registers: int = 65536
    warps: int = 64
    blocks: int = 32
    tmem: int = 0


KIB = 1024
TARGETS = {
    "80": Target("cuda", 80, 32, 163 * KIB, 164 * KIB),
    "90": Target("cuda", 90, 32, 227 * KIB, 228 * KIB),
    "100": Target("cuda", 100, 32, 227 * KIB, 228 * KIB, tmem=512),
    "gfx942": Target("hip", "gfx942", 64, 64 * KIB, 64 * KIB, 131072, warps=32),
}


class Machine(NamedTuple):
    bandwidth: float  # bytes per second of device memory
    flops: float  # dense bfloat16 tensor FLOP per second


SOURCE = (
    "Datasheets of NVIDIA: A100 80GB SXM (2021), H100 SXM (2023), H200 SXM (2024), HGX B200 (2025; "
    "an eighth of the eight-GPU system's 64 TB/s and 18 PFLOP/s dense)."
)
MACHINES = {
    "A100": Machine(2.039e12, 312e12),
    "H100": Machine(3.35e12, 989e12),
    "H200": Machine(4.8e12, 989e12),
    "B200": Machine(8.0e12, 2250e12),
}


class Occupancy(NamedTuple):
    blocks: int  # per SM
    limiter: str  # what allows no more: regs, shared, warps, blocks or tmem
    percent: int  # of the SM's warps


def occupancy(target: str, registers: int, shared: int, warps: int, tmem: int = 0) -> Occupancy:
    """Upper bound of resident blocks per SM. 0 blocks: the kernel does not fit at all.

    Registers are given out to warps in steps of 256, warps in fours (one per scheduler); every
    block costs 1 KiB of shared memory besides its own (CUDA C++ programming guide, compute
    capabilities). gfx942: steps of 8 vector registers for 64 lanes (CDNA 3 ISA).
    """
    t = TARGETS[target]
    cuda = t.backend == "cuda"
    step, overhead = (256, KIB) if cuda else (512, 0)
    per_warp = max(-(-registers * t.warp // step) * step, step)
    bounds = {
        "regs": t.registers // per_warp // 4 * 4 // warps,
        "warps": t.warps // warps,
        "blocks": t.blocks,
    }
    if shared:
        bounds["shared"] = t.shared_per_sm // (-(-shared // 128) * 128 + overhead)
    if tmem:
        bounds["tmem"] = t.tmem // tmem
    limiter = min(bounds, key=bounds.get)
    blocks = bounds[limiter] if shared <= t.shared_per_block else 0
    if not blocks and shared > t.shared_per_block:
        limiter = "shared"
    return Occupancy(blocks, limiter, round(100 * blocks * warps / t.warps))
