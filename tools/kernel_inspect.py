"""One row of facts per compiled kernel: resources, occupancy bound, machine code counts."""

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import kernel_sass
from kernel_targets import TARGETS, occupancy
from triton import knobs

_AMD_FIELDS = {
    "registers": "vgpr_count",
    "agprs": "agpr_count",
    "sgprs": "sgpr_count",
    "spills": "vgpr_spill_count",
    "stack": "private_segment_fixed_size",
}
_AMD_WIDTHS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32}


def facts(compiled, target: str) -> dict:
    """Everything that is known of a compiled kernel without running it; plain JSON values."""
    metadata = compiled.metadata
    row = {
        "warps": metadata.num_warps,
        "stages": metadata.num_stages,
        "shared": metadata.shared,
        "tmem": getattr(metadata, "tmem_size", None) or 0,
        "dots": compiled.asm["ttir"].count("tt.dot "),
    }
    read = _nvidia if TARGETS[target].backend == "cuda" else _amd
    row |= read(compiled)
    bound = occupancy(target, row["registers"], row["shared"], row["warps"], row["tmem"])
    row |= {"blocks": bound.blocks, "limiter": bound.limiter, "occupancy": bound.percent}
    row["fits"] = bound.blocks > 0
    return row


def _nvidia(compiled) -> dict:
    """Registers and stack from cuobjdump's resource table, the rest from the instructions."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "-sass", "--dump-resource-usage", str(cubin)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    used = re.search(r"REG:(\d+) STACK:(\d+)", text)
    code = kernel_sass.parse(text)
    if not used or not code:
        raise RuntimeError("cuobjdump printed no resource table or no instructions")
    whole = kernel_sass.count(code)
    return {
        "registers": int(used.group(1)),
        "stack": int(used.group(2)),
        "code": _plain(whole),
        "hot": [_plain(loop) for loop in kernel_sass.hot_loops(code)],
    }


def _plain(count: kernel_sass.Count) -> dict:
    """JSON has no integer keys."""
    widths = {name: _strings(getattr(count, name)) for name in ("ldg", "ldgsts", "stg")}
    return count._asdict() | widths


def _strings(widths: dict) -> dict:
    return {str(bits): number for bits, number in sorted(widths.items(), reverse=True)}


def _amd(compiled) -> dict:
    """Registers of the assembler's metadata; `registers` counts vector and accumulator ones."""
    text = compiled.asm["amdgcn"]
    row = {}
    for name, field in _AMD_FIELDS.items():
        found = re.search(rf"\.{field}:\s+(\d+)", text)
        row[name] = int(found.group(1)) if found else 0
    loads, stores = Counter(), Counter()
    for kind, size in re.findall(r"\b(?:global|buffer)_(load|store)_(\w+)", text):
        bits = _AMD_WIDTHS.get(size) or (8 if "byte" in size else 16)
        (loads if kind == "load" else stores)[bits] += 1
    mfma = Counter(re.findall(r"\bv_(mfma_[a-z]+\d+_\d+x\d+x\d+)\w*", text))
    counts = {"mma": dict(sorted(mfma.items())), "ldg": _strings(loads), "stg": _strings(stores)}
    return row | {"code": counts, "hot": []}
