"""Time to the first token of a fresh process: import, load h1r-pico, prefill, choose.

    python benchmarks/bench_start.py --repeats 7

Ours and transformers, in turns, in float32, with the same token ids and no tokenizer; the clock
runs from before the process starts until its first token is there. Both must give the same token.
Files are in the page cache. The second table splits our time, with `python -X importtime`'s largest
imports beneath.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "falcon_h1r" / "assets" / "h1r-pico"
IDS = [1, 40, 41, 42, 43, 44, 45, 46]
WAYS = ("ours", "transformers")
IMPORTS = 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=7, help="of each (default: %(default)s)")
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps({"ours": ours, "transformers": theirs}[args.worker]()), flush=True)
        os._exit(0)
    if args.repeats < 1:
        parser.error("--repeats must be positive")
    for way in WAYS:
        run(way)
    runs: dict[str, list[dict]] = {way: [] for way in WAYS}
    for _ in range(args.repeats):
        for way in WAYS:
            runs[way].append(run(way))
    tokens = {one["token"] for done in runs.values() for one in done}
    if len(tokens) != 1:
        raise SystemExit(f"different first tokens: {sorted(tokens)}")
    print(f"first token of h1r-pico, a fresh process, median of {args.repeats} [min, max]\n")
    print("| | seconds |\n|---|---:|")
    for way, done in runs.items():
        totals = [one["total"] for one in done]
        middle = statistics.median(totals)
        print(f"| {way} | {middle:.2f} [{min(totals):.2f}, {max(totals):.2f}] |")
    pairs = [a["total"] / b["total"] for a, b in zip(*(runs[way] for way in WAYS))]
    print(f"\nours / transformers, run by run: {statistics.median(pairs):.2f}\n")
    print(f"| stage | {' | '.join(WAYS)} |\n|---|---:|---:|")
    stages = [key for key in runs["ours"][0] if key not in ("total", "token")]
    medians = {
        way: {stage: statistics.median(one[stage] for one in done) for stage in stages}
        for way, done in runs.items()
    }
    for stage in stages:
        print(f"| {stage} | {' | '.join(f'{medians[way][stage]:.3f}' for way in WAYS)} |")
    print("\nour largest imports, seconds of their own:")
    for name, seconds in largest_imports():
        print(f"  {seconds:.3f}  {name}")
    summary = {"benchmark": "start", "repeats": args.repeats, "medians": medians, "runs": runs}
    print(f"\n{json.dumps(summary | {'ratio': statistics.median(pairs)})}")
    return 0


def run(way: str) -> dict:
    """One process; its stages, and the time until it answers."""
    start = time.time()
    command = [sys.executable, __file__, "--worker", way]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = child.stdout.readline()
    total = time.time() - start
    _, errors = child.communicate()
    if not line:
        raise SystemExit(f"the run of {way} failed:\n{errors}")
    stages = json.loads(line)
    return {"interpreter": stages.pop("entered") - start} | stages | {"total": total}


def ours() -> dict:
    clock = Stages()
    import torch

    clock.mark("import torch")
    sys.path.insert(0, str(ROOT))
    from falcon_h1r import FalconH1ForCausalLM, SamplingParams, generate

    clock.mark("import the package")
    model = FalconH1ForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    clock.mark("load")
    out = generate(model, [IDS], SamplingParams(max_new_tokens=1, stop_token_ids=()))
    clock.mark("first token")
    return clock.found | {"token": int(out.sequences[0][0])}


def theirs() -> dict:
    clock = Stages()
    import torch

    clock.mark("import torch")
    from transformers import FalconH1ForCausalLM

    clock.mark("import the package")
    model = FalconH1ForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    clock.mark("load")
    out = model.generate(torch.tensor([IDS]), max_new_tokens=1, do_sample=False)
    clock.mark("first token")
    return clock.found | {"token": int(out[0, -1])}


class Stages:
    """Seconds since the last mark, by name."""

    def __init__(self):
        self.last = time.time()
        self.found = {"entered": self.last}

    def mark(self, name: str) -> None:
        now = time.time()
        self.found[name], self.last = now - self.last, now


def largest_imports() -> list[tuple[str, float]]:
    """Modules that our worker imports after torch, by their own time."""
    command = [sys.executable, "-X", "importtime", __file__, "--worker", "ours"]
    done = subprocess.run(command, capture_output=True, text=True)
    found, ours = [], False
    for text in done.stderr.splitlines():
        parts = text.removeprefix("import time:").split("|")
        if len(parts) != 3 or not parts[0].strip().isdigit():
            continue
        name = parts[2].strip()
        if ours:
            found.append((name, int(parts[0]) / 1e6))
        ours = ours or name == "torch"
    return sorted(found, key=lambda pair: -pair[1])[:IMPORTS]


if __name__ == "__main__":
    sys.exit(main())
