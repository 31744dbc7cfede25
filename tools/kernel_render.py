"""Text of the kernel report: lines for a terminal, tables for kernels/report.md."""

from itertools import groupby

import kernel_rules
import kernel_sass
from kernel_peers import PAIRS
from kernel_targets import MACHINES, SOURCE, TARGETS


def widths(counts: dict) -> str:
    return ",".join(f"{bits}:{number}" for bits, number in counts.items()) or "-"


def kinds(counts: dict) -> str:
    return ", ".join(f"{name} x{number}" for name, number in counts.items()) or "-"


def loop_figures(loop: dict) -> str:
    """instructions/MMA/MUFU/barriers/local."""
    parts = (loop["instructions"], sum(loop["mma"].values()), loop["mufu"])
    return "/".join(map(str, (*parts, loop["barriers"], loop["local"])))


def show(row: dict) -> str:
    """One compiled kernel for a terminal."""
    where = f"{row['case']} [{row['shape']}] {row['dtype']} {row['config']} on {row['target']}"
    where += " (default)" * row.get("default", False)
    if "error" in row:
        return f"{where}\n  FAILED {row['error']}"
    code = row["code"]
    lines = [
        f"{where}: {row['kernel']} grid {tuple(row['grid'])} {row['meta']}",
        f"  warps {row['warps']} stages {row['stages']}  registers {row['registers']}"
        f"  stack {row['stack']} B  shared {row['shared'] / 1024:.1f} KiB  tmem {row['tmem']}"
        f"  blocks/SM <= {row['blocks']} ({row['limiter']}), {row['occupancy']}% of warps"
        f"  {'fits' if row['fits'] else 'DOES NOT FIT'}  compiled in {row['seconds']:.2f} s",
    ]
    if TARGETS[row["target"]].backend == "hip":
        lines.append(
            f"  sgprs {row['sgprs']} agprs {row['agprs']} spills {row['spills']}"
            f"  MMA {kinds(code['mma'])}"
            f"  loads {widths(code['ldg'])}  stores {widths(code['stg'])}"
        )
        return "\n".join(lines)
    lines.append(
        f"  instructions {code['instructions']}  MMA {kinds(code['mma'])}  FMA {code['fma']}"
        f"  MUFU {code['mufu']}  barriers {code['barriers']}  LDL/STL {code['local']}"
        f"  calls {code['calls']}  atomics {code['atomics']}  TMA {code['tma']}"
    )
    lines.append("  " + _memory(code))
    for loop in row["hot"]:
        lines.append(
            f"  loop: instructions {loop['instructions']}  MMA {kinds(loop['mma'])}"
            f"  FMA {loop['fma']}  MUFU {loop['mufu']}  barriers {loop['barriers']}"
            f"  LDL/STL {loop['local']}  {_memory(loop)}"
            f"  instructions per MMA kFLOP {kernel_sass.density(loop)}"
        )
    lines += [f"  BREAKS {rule}: {text}" for rule, text in kernel_rules.broken(row).items()]
    return "\n".join(lines)


def _memory(code: dict) -> str:
    parts = (f"{name.upper()} {widths(code[name])}" for name in ("ldg", "ldgsts", "stg"))
    return "  ".join(parts)


def table(head: str, rows) -> list[str]:
    """A Markdown table; `head` and each row are cells."""
    cells = head.split("|")
    lines = ["| " + " | ".join(c.strip() for c in cells) + " |", "|" + " --- |" * len(cells)]
    return [*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows), ""]


def markdown(report: dict) -> str:
    """kernels/report.md of what kernels/report.json holds."""
    rows, peers, versions = report["rows"], report["peers"], report["versions"]
    lines = [
        "# Kernel report",
        "",
        "Made by `python tools/kernel_report.py`; `--check` compiles again and compares. "
        f"Compiled with Triton {versions['triton']} and its own assemblers. **Not measured on a "
        "GPU**: registers, stack, shared memory and instructions are those of the compiled binary; "
        "blocks per SM is an upper bound; the floors are not times.",
        "",
        *_rules(rows),
        *_families(rows),
        *_amd(rows),
        *_defaults(rows),
        *_traffic(report["traffic"]),
        *_floors(report["floors"]),
        *_peers(rows, peers),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _rules(rows):
    broken = kernel_rules.verdict(rows, complete=True)
    lines = ["## Rules", "", *kernel_rules.__doc__.strip().splitlines()[2:4], "", "```"]
    lines += [*kernel_rules.__doc__.strip().splitlines()[5:], "```", ""]
    lines += ["Broken:", "", *(f"- {line}" for line in broken)] if broken else ["All hold."]
    excused = [
        f"- {kernel}, {rule}" + f" ({where})" * bool(where) + f": {why}"
        for (kernel, rule, where), why in kernel_rules.EXEMPT.items()
    ]
    return [*lines, "", *(["Excused:", "", *excused, ""] if excused else [])]


def _families(rows):
    yield "## NVIDIA"
    yield ""
    yield (
        "One table per family. An asterisk marks the default. Loads and stores: bits per thread: "
        "number of instructions in the binary. Hot loops: instructions/MMA/MUFU/barriers/LDL+STL "
        "of each innermost loop with the kernel's matrix products (without any: with its loads), "
        "and its instructions per 1000 FLOPs of them, per warp; the instructions of sm_100 do not "
        "name their shape."
    )
    yield ""
    chosen = [row for row in rows if _in_full(row) and TARGETS[row["target"]].backend == "cuda"]
    for name, family in groupby(chosen, key=lambda row: row["case"]):
        yield f"### {name}"
        yield ""
        for shape, group in groupby(family, key=lambda row: row["shape"]):
            yield f"{shape}:"
            yield ""
            yield from table(
                "kernel | type | configuration | sm | warps/stages | registers | stack B "
                "| shared KiB | tmem | blocks/SM | warps | MMA | LDG | LDGSTS | STG | BAR "
                "| LDL+STL | hot loops | per MMA kFLOP",
                map(_nvidia_cells, group),
            )


def _nvidia_cells(row):
    own = (row["dtype"], row["config"] + "*" * row["default"], row["target"])
    if "error" in row:
        return ("-", *own, row["error"])
    code, hot = row["code"], row["hot"]
    return (
        row["kernel"].strip("_").removesuffix("_kernel"),
        *own,
        f"{row['warps']}/{row['stages']}",
        row["registers"],
        row["stack"],
        f"{row['shared'] / 1024:.1f}",
        row["tmem"],
        f"{row['blocks']} ({row['limiter']})" if row["fits"] else f"none ({row['limiter']})",
        f"{row['occupancy']}%",
        kinds(code["mma"]),
        widths(code["ldg"]),
        widths(code["ldgsts"]),
        widths(code["stg"]),
        code["barriers"],
        code["local"],
        "; ".join(map(loop_figures, hot)) or "-",
        "; ".join(map(kernel_sass.density, hot)) or "-",
    )


def _amd(rows):
    chosen = [row for row in rows if _in_full(row) and TARGETS[row["target"]].backend == "hip"]
    yield "## AMD gfx942"
    yield ""
    yield "Compiled, never run. Registers are vector registers with the accumulators among them."
    yield ""
    yield from table(
        "family | shape | kernel | type | configuration | warps | registers | accumulators "
        "| scalar | spills | LDS KiB | fits 64 KiB | MFMA | loads | stores",
        (
            (
                row["case"],
                row["shape"],
                *(
                    ("-", row["dtype"], row["config"], row["error"])
                    if "error" in row
                    else _amd_cells(row)
                ),
            )
            for row in chosen
        ),
    )


def _amd_cells(row):
    code = row["code"]
    return (
        row["kernel"].strip("_").removesuffix("_kernel"),
        row["dtype"],
        row["config"] + "*" * row["default"],
        row["warps"],
        row["registers"],
        row["agprs"],
        row["sgprs"],
        row["spills"],
        f"{row['shared'] / 1024:.1f}",
        "yes" if row["fits"] else "no",
        kinds(code["mma"]),
        widths(code["ldg"]),
        widths(code["stg"]),
    )


def _in_full(row):
    """Whether a row stands in the long tables: bfloat16 and float32, without further options."""
    return row["dtype"] != "float16" and "options" not in row


def _defaults(rows):
    yield "## float16, and further options"
    yield ""
    yield (
        "Default configurations alone: registers / shared KiB / bytes of stack (gfx942: spilled "
        "registers) of each launch's binary. float16 otherwise mostly compiles as bfloat16 does."
    )
    yield ""
    # The columns follow the targets, whatever of them was compiled.
    kernels = {}
    for row in rows:
        if not _in_full(row):
            name = row.get("kernel", "-").strip("_").removesuffix("_kernel")
            key = (row["case"], row["shape"], row["dtype"], name)
            kernels.setdefault(key, {}).setdefault(row["target"], []).append(row)
    targets = [name for name in TARGETS if any(name in found for found in kernels.values())]
    heads = [name if name.startswith("gfx") else f"sm_{name}" for name in targets]
    yield from table(
        "family | call | type | kernel | " + " | ".join(heads),
        (
            (*key, *("; ".join(map(_resources, found.get(name, []))) or "-" for name in targets))
            for key, found in kernels.items()
        ),
    )


def _resources(row):
    if "error" in row:
        return row["error"]
    spilled = row["stack"] if "spills" not in row else row["spills"]
    return f"{row['registers']} / {row['shared'] / 1024:.1f} / {spilled}"


def _traffic(records):
    yield "## Bytes and FLOPs"
    yield ""
    yield (
        "Counted in Triton's interpreter on reduced calls of the default bfloat16 configurations: "
        "H1R-7B widths and head sizes, two SSM heads, six query heads on one key head. Issued: "
        "what the lanes ask for, traffic to the caches; unique: each element once per launch, what "
        "device memory must deliver. Minimum: the registry's formula, each distinct element of the "
        "call's arguments and results once, and the operator's own FLOPs; those of element-wise "
        "operations are no dot FLOPs."
    )
    yield ""
    body = []
    for record in records:
        launches, minimum = record["launches"], record["minimum"]
        call = f"{record['case']}: {record['call']}"
        for launch in launches:
            name = launch["kernel"].strip("_").removesuffix("_kernel")
            body.append((call, name, launch["programs"], *_bytes(launch), "", ""))
        total = {key: sum(one[key] for one in launches) for key in _COUNTED}
        needed = minimum["load"] + minimum["store"]
        moved = total["unique_load_bytes"] + total["unique_store_bytes"]
        ratio = f"{moved / needed:.2f}"
        flops = total["dot_flops"] / minimum["flops"] if total["dot_flops"] else 0
        times = f"{flops:.2f}" if flops else "-"
        body.append((call, "**all**", "", *_bytes(total), ratio, times))
        floor = (minimum["load"], "", minimum["store"], minimum["flops"] if flops else "-")
        body.append((call, "minimum", "", "", *floor, "1.00", "1.00" if flops else "-"))
    yield from table(
        "call | kernel | programs | load issued | load unique | store issued | store unique "
        "| dot FLOPs | bytes / minimum | FLOPs / minimum",
        body,
    )


_COUNTED = (
    "issued_load_bytes",
    "unique_load_bytes",
    "issued_store_bytes",
    "unique_store_bytes",
    "dot_flops",
)


def _bytes(launch):
    return tuple(launch[key] for key in _COUNTED)


def _floors(floors):
    yield "## Floors"
    yield ""
    yield (
        "What no implementation of the call can be faster than on the datasheet's machine: the "
        "larger of minimum bytes over bandwidth and minimum FLOPs over the dense bfloat16 rate. "
        "Microseconds; no kernel has been timed."
    )
    yield ""
    yield from table(
        "machine | bandwidth TB/s | bfloat16 TFLOP/s",
        ((name, m.bandwidth / 1e12, m.flops / 1e12) for name, m in MACHINES.items()),
    )
    yield SOURCE
    yield ""
    yield from table(
        "family | call | bytes | FLOPs | " + " | ".join(MACHINES),
        (
            (f["case"], f["shape"], f["bytes"], f["flops"], *(f"{us:.1f}" for us in f["us"]))
            for f in floors
        ),
    )


def _peers(rows, peers):
    if not peers:
        return
    yield "## Beside mamba_ssm, sm_90"
    yield ""
    yield (
        f"mamba_ssm {peers['commit']} compiled with the same tools at the same shape (bfloat16, "
        f"{peers['shape']}) and counted the same way. Of each of its kernels: the "
        "configurations of its autotune table without spills, fewest instructions per MMA kFLOP "
        "first, three at most; then our defaults. The walks do more: `state_walk` also passes the "
        "states on, `ssd_walk` (once for the ends of segments, once for y) does both and the scan."
    )
    yield ""
    body = []
    defaults = [row for row in rows if row["default"] and row["target"] == "90"]
    for theirs, ours in PAIRS.items():
        body += [("theirs", *_peer_cells(row)) for row in peers["rows"] if row["kernel"] == theirs]
        for row in defaults:
            same = row["dtype"] == "bfloat16" and row["shape"].startswith("h1r-7b")
            if same and _in_full(row) and row.get("kernel") in ours:
                body.append((f"ours, {row['case']}", *_peer_cells(row)))
    yield from table(
        "whose | kernel | configuration | warps/stages | registers | stack B | shared KiB "
        "| blocks/SM | MMA | LDG | LDGSTS | hot loops | per MMA kFLOP",
        body,
    )


def _peer_cells(row):
    cells = _nvidia_cells(row)
    return (cells[0], row["config"], *cells[4:8], cells[9], *cells[11:14], *cells[17:])
