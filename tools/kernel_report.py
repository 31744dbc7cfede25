"""Compiles every Triton kernel ahead of time, without a GPU, and reports what the compiler made.

python tools/kernel_report.py                     writes kernels/report.md and kernels/report.json
python tools/kernel_report.py --update --kernel rms_norm        the same of some families alone
python tools/kernel_report.py --check             compiles again, compares; status 1: see below
python tools/kernel_report.py --kernel rms_norm --targets 90 [--config NAME] [--dtype bfloat16]
                                                  prints what those compile to

--check prints each difference from kernels/report.json and each rule that a default configuration
breaks (tools/kernel_rules.py), and exits with status 1 if there is any. Registers, spills, shared
memory and instructions are exact for the compiled binary, occupancy is an upper bound; nothing here
is measured on a GPU.
"""

import argparse
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import kernel_collect
import kernel_render
import kernel_rules
from kernel_sass import Count
from kernel_targets import MACHINES, TARGETS

FOLDER = Path(__file__).resolve().parent.parent / "kernels"
DTYPES = ("bfloat16", "float16", "float32")
_EMPTY = Count(**{f: 0 if t is int else {} for f, t in Count.__annotations__.items()})._asdict()


def build(names, targets, workers=2, defaults=()) -> dict:
    """The report: versions, one row per binary, traffic per call, floors. No clock in it."""
    import torch
    import triton
    from kernel_launches import CASES, KernelCall

    counting = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("kernel_traffic.py"), *(names or ())],
        stdout=subprocess.PIPE,
        text=True,
    )
    rows = list(kernel_collect.collect(names, targets, workers=workers, defaults=defaults))
    for row in rows:
        row.pop("seconds", None)
    floors = []
    for case in CASES:
        if isinstance(case, KernelCall) and not case.options and (not names or case.name in names):
            cost = case.cost(torch.bfloat16)
            us = [max(cost.bytes / m.bandwidth, cost.flops / m.flops) for m in MACHINES.values()]
            named = {"case": case.name, "shape": case.shape, "us": [round(1e6 * t, 2) for t in us]}
            floors.append(named | {"bytes": cost.bytes, "flops": cost.flops})
    traffic = json.loads(counting.communicate()[0] or "[]")
    if counting.returncode:
        print("some calls could not be counted; see above", file=sys.stderr)
    versions = {"triton": triton.__version__}
    return {"versions": versions, "rows": rows, "traffic": traffic, "floors": floors}


def dump(report: dict) -> str:
    """JSON with a line per row, for a readable history; counts that are zero are left out."""
    parts = []
    for name, value in report.items():
        if isinstance(value, list):
            body = ",\n".join(json.dumps(_compact(one)) for one in value)
            parts.append(f'"{name}": [\n{body}\n]')
        else:
            parts.append(f'"{name}": {json.dumps(value)}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def load(path: Path) -> dict:
    """What `dump` wrote, with the zero counts."""
    report = json.loads(path.read_text())
    return report | {"rows": [_full(row) for row in report["rows"]]}


def _compact(row):
    def lean(counts):
        return {name: value for name, value in counts.items() if value}

    if "code" not in row:
        return row
    return row | {"code": lean(row["code"]), "hot": [lean(loop) for loop in row["hot"]]}


def _full(row):
    if "code" not in row:
        return row
    return row | {"code": _EMPTY | row["code"], "hot": [_EMPTY | loop for loop in row["hot"]]}


def merged(old: dict, new: dict) -> dict:
    """`old` with the families of `new` in place of its own, in the order of the cases."""
    from kernel_launches import CASES

    order = list(dict.fromkeys(case.name for case in CASES))
    report = old | {"versions": new["versions"]}
    for part in ("rows", "traffic", "floors"):
        fresh = {one["case"] for one in new[part]}
        kept = [one for one in old[part] if one["case"] in order and one["case"] not in fresh]
        report[part] = sorted(kept + new[part], key=lambda one: order.index(one["case"]))
    return report


_KEY = ("case", "shape", "kernel", "dtype", "config", "target", "call")


def differences(old: list[dict], new: list[dict]):
    """Lines on what the rows or records `new` have that `old` have not, and the other way."""

    def keyed(rows):
        found = {}
        for row in json.loads(json.dumps([_compact(row) for row in rows])):
            key = " ".join(str(row[name]) for name in _KEY if name in row)
            while key in found:
                key += "'"
            found[key] = row
        return found

    old, new = keyed(old), keyed(new)
    for key in [*old, *(key for key in new if key not in old)]:
        if key not in new:
            yield f"{key}: no longer there"
        elif key not in old:
            yield f"{key}: new"
        else:
            for name in sorted(old[key].keys() | new[key].keys()):
                before, after = old[key].get(name), new[key].get(name)
                if before != after:
                    yield f"{key}: {name}: {before} -> {after}"


def check(report: dict, committed: dict, complete: bool) -> list[str]:
    """Everything wrong with `report`: rules that do not hold, and what is not as committed."""
    lines = kernel_rules.verdict(report["rows"], complete)
    if committed["versions"] != report["versions"]:
        print(f"only the rules are checked: compiled with {report['versions']}, ", end="")
        print(f"committed with {committed['versions']}")
        return lines
    for part in ("rows", "traffic", "floors"):
        old = committed[part]
        if not complete:
            names = {record["case"] for record in report[part]}
            old = [record for record in old if record["case"] in names]
        if part == "rows":
            compiled = {(row["target"], row["default"]) for row in report[part]}
            old = [row for row in old if (row["target"], row["default"]) in compiled]
        lines += differences(old, report[part])
    return lines


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kernel", action="append", help="family; can be repeated; default all")
    parser.add_argument("--targets", default=",".join(TARGETS), help="default: %(default)s")
    parser.add_argument("--config", default="", help="only the configuration of this name")
    parser.add_argument("--dtype", choices=DTYPES, default="", help="default: all")
    parser.add_argument("--cases", type=Path, help="a Python file that registers further cases")
    parser.add_argument("--check", action="store_true", help="compare with kernels/report.json")
    parser.add_argument(
        "--defaults",
        default="",
        metavar="TARGETS",
        help="with --check: compile the default configurations alone for these targets",
    )
    parser.add_argument(
        "--update", action="store_true", help="with --kernel: write these anew, keep the others"
    )
    parser.add_argument(
        "--peers", type=Path, help="a checkout of mamba_ssm: compile its kernels, keep the rest"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=FOLDER,
        metavar="FOLDER",
        help="where report.json and report.md are read and written (default: kernels)",
    )
    parser.add_argument("--workers", type=int, default=2, help="processes (default: %(default)s)")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set; kernels are compiled without it")
    targets = args.targets.split(",")
    unknown = [target for target in targets if target not in TARGETS]
    if unknown:
        parser.error(f"unknown target {unknown[0]!r}; there are: {', '.join(TARGETS)}")
    if args.cases:
        import kernel_launches  # noqa: F401 - makes the kernels importable for that file

        runpy.run_path(str(args.cases))
    path = args.out / "report.json"
    try:
        if args.check:
            report = build(args.kernel, targets, args.workers, args.defaults.split(","))
            wrong = check(report, load(path), complete=not args.kernel)
            print("\n".join(wrong) or "as committed, and every rule holds")
            return 1 if wrong else 0
        if not args.update and (args.kernel or args.config or args.dtype or args.cases):
            for row in kernel_collect.collect(args.kernel, targets, args.config, args.dtype):
                print(kernel_render.show(row), flush=True)
            return 0
        if args.peers:
            import kernel_peers

            report = load(path) | {"peers": kernel_peers.compile_peers(args.peers)}
        elif args.update:
            report = merged(load(path), build(args.kernel, targets, args.workers))
        else:
            peers = load(path)["peers"] if path.exists() else {}
            report = build(None, targets, args.workers) | {"peers": peers}
    except ValueError as error:
        parser.error(str(error))
    path.write_text(dump(report))
    path.with_suffix(".md").write_text(kernel_render.markdown(report))
    wrong = kernel_rules.verdict(report["rows"], complete=True)
    print("\n".join(wrong) or "every rule holds")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
