"""Compiles the Triton kernels of a mamba_ssm checkout with the same tools, to stand beside ours.

Their launchers run their own autotuner; each of its configurations is compiled once. Only counts
are kept. sm_90, bfloat16, the shape of H1R-7B.
"""

import contextlib
import itertools
import subprocess
import sys
import types
from pathlib import Path

from kernel_sass import density

# Their kernel: the kernels of ours that do its work.
PAIRS = {
    "_chunk_cumsum_fwd_kernel": ("_chunk_cumsum_kernel",),
    "_bmm_chunk_fwd_kernel": ("_chunk_bmm_kernel",),
    "_chunk_state_fwd_kernel": ("_chunk_state_kernel", "_state_walk_kernel"),
    "_state_passing_fwd_kernel": ("_state_passing_kernel",),
    "_chunk_scan_fwd_kernel": ("_chunk_scan_kernel", "_ssd_walk_kernel"),
    "_selective_scan_update_kernel": ("_ssd_step_kernel",),
    "_layer_norm_fwd_1pass_kernel": ("_gated_rms_norm_kernel",),
}
KEPT = 3
TARGET = "90"


def compile_peers(checkout: Path) -> dict:
    """{"commit", "shape", "pairs", "rows"}; rows are those of `kernel_inspect.facts`."""
    import kernel_compile
    import torch
    from kernel_inspect import facts

    # An empty package in place of theirs, whose __init__ asks for compiled extensions.
    package = types.ModuleType("mamba_ssm")
    package.__path__ = [str(checkout / "mamba_ssm")]
    sys.modules["mamba_ssm"] = package
    torch.cuda.device = lambda *_: contextlib.nullcontext()
    kernel_compile.Driver.get_benchmarker = lambda self: _once
    with kernel_compile.compiling(TARGET) as launches:
        _call_scan()
        _call_step()
        _call_norm()
    rows, seen = [], set()
    for one in launches:
        if one.compiled.hash in seen:
            continue
        seen.add(one.compiled.hash)
        sizes = [item for item in one.meta.items() if item[0].startswith("BLOCK_")]
        blocks = [f"{name.removeprefix('BLOCK_SIZE_')}={size}" for name, size in sizes]
        own = {"kernel": one.kernel, "config": " ".join(blocks), "dtype": "bfloat16"}
        rows.append(own | {"target": TARGET, "default": False} | facts(one.compiled, TARGET))

    def cost(row):
        densities = [float(d) for d in map(density, row["hot"]) if d != "-"]
        return (max(densities, default=0), -row["occupancy"], row["registers"])

    clean = sorted((r for r in rows if not r["stack"]), key=lambda r: (r["kernel"], cost(r)))
    kept = [
        row
        for _, group in itertools.groupby(clean, key=lambda row: row["kernel"])
        for row in itertools.islice(group, KEPT)
    ]
    command = ["git", "-C", str(checkout), "log", "-1", "--format=%h"]
    commit = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    shape = "1 x 4096, 24 heads of 128, state 256, 1 group, chunk 128; step: 64 rows"
    return {"commit": commit, "shape": shape, "rows": kept}


def _once(function, quantiles=None, **_):
    function()
    return [1.0, 1.0, 1.0]


def _tensors():
    import torch
    from kernel_launches import tensor

    return tensor, torch.bfloat16


def _call_scan(l=4096, h=24, p=128, n=256, chunk=128):
    from mamba_ssm.ops.triton.ssd_combined import _mamba_chunk_scan_combined_fwd

    tensor, half = _tensors()
    x, B = tensor(1, l, h, p, dtype=half), tensor(1, l, 1, n, dtype=half)
    dt, A = tensor(1, l, h), tensor(h)
    initial = tensor(1, h, p, n)
    _mamba_chunk_scan_combined_fwd(x, dt, A, B, B, chunk, D=A, initial_states=initial)


def _call_step(b=64, h=24, p=128, n=256):
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    tensor, half = _tensors()
    x, B, per_head = tensor(b, h, p, dtype=half), tensor(b, 1, n, dtype=half), tensor(h)
    dt, D = tensor(b, h)[..., None].expand(b, h, p), per_head[:, None].expand(h, p)
    A = per_head[:, None, None].expand(h, p, n)
    selective_state_update(tensor(b, h, p, n), x, dt, A, B, B, D, dt_bias=D)


def _call_norm(rows=4096, d=3072):
    from mamba_ssm.ops.triton.layernorm_gated import _layer_norm_fwd

    tensor, half = _tensors()
    y, weight = tensor(rows, d, dtype=half), tensor(d, dtype=half)
    _layer_norm_fwd(y, weight, None, 1e-5, z=y, norm_before_gate=False, is_rms_norm=True)
