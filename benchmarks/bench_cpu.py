"""Whole models on a CPU beside transformers and llama.cpp: the tables of docs/cpu.md.

    python benchmarks/bench_cpu.py --presets tiny-90m --dtypes float32 --work decode
    python benchmarks/bench_cpu.py -- --only torch transformers --seconds 5

What follows `--` goes to `falcon-h1r bench generate`, which measures, gates and appends JSON lines
to benchmarks/results/; the table comes last. Work that does not fit in memory is skipped, and said
to be. Left out are the reference table, and what takes minutes a call, unless --all is given.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from falcon_h1r.cli import main  # noqa: E402

PRESETS = ("tiny-90m", "falcon-h1-0.5b")
PREFILL = ("1x128", "1x512", "1x2048", "1x8192")
DECODE = ("1@129", "8@129", "1@2049", "8@2049", "1@16385", "8@16385")
SLOW = {("falcon-h1-0.5b", "1x8192")}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--presets", nargs="+", choices=PRESETS, default=PRESETS)
    add("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=("float32", "bfloat16"))
    add("--work", nargs="+", default=("prefill", "decode"), metavar="prefill|decode|1x512|8@2049")
    add("--limit", default="240", help="seconds per case at most (default: %(default)s)")
    add("--all", action="store_true", help="what is left out otherwise, too")
    add("--out", type=Path, help="JSON lines; default: benchmarks/results/DATE-MACHINE.jsonl")
    add("rest", nargs="*", help="options of `falcon-h1r bench generate`, behind --")
    return parser.parse_args()


def run() -> int:
    args = parse()
    import torch

    from falcon_h1r.bench import generation_table, machine, report

    path = args.out or report.default_path(machine.card(torch.device("cpu")))
    written = path.stat().st_size if path.exists() else 0
    status = 0
    for preset in args.presets:
        chosen = [one for one in (*PREFILL, *DECODE) if wanted(one, preset, args)]
        prefill = [one for one in chosen if "x" in one]
        decode = [one for one in chosen if "@" in one]
        for dtype in args.dtypes:
            argv = ["bench", "generate", "--peers", "--device", "cpu", "--model-shape", preset]
            argv += ["--dtype", dtype, "--limit", args.limit, "--out", str(path)]
            argv += [] if args.all else ["--skip", "reference"]
            for option, values in (("--prefill", prefill), ("--decode", decode)):
                argv += [option, *values] if values else []
            status = max(status, main([*argv, *args.rest])) if chosen else status
    with open(path, encoding="utf-8") as file:
        file.seek(written)
        print(f"\n{generation_table.markdown([json.loads(line) for line in file])}")
    return status


def wanted(work: str, preset: str, args: argparse.Namespace) -> bool:
    phase = "prefill" if "x" in work else "decode"
    slow = (preset, work) in SLOW and not (args.all or work in args.work)
    return not slow and (phase in args.work or work in args.work)


if __name__ == "__main__":
    sys.exit(run())
