"""Training steps and the scan's backward beside transformers: time, then memory.

    python benchmarks/bench_train.py                              # 90M, 512 and 2,048 tokens
    python benchmarks/bench_train.py --lengths 2048 --dtypes float32 --part step
    python benchmarks/bench_train.py --preset h1r-pico --part memory --lengths 65536 --ways ours

A step is zero_grad, forward, mean cross-entropy and backward on one row of random tokens, without
the optimiser, which would be the same for all. transformers gets its sdpa and its eager attention,
and its own loss; "ours, recompute" keeps the input of each block alone. bfloat16: float32 weights
under torch.autocast. First the loss and all gradients are compared with those of transformers.
Steps take turns in one process: medians, their 20th and 80th percentile, ratios round by round.
Memory: a fresh process each, the high-water mark of the resident set during one step, less the set
before, when weights and gradients exist. Linux only. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]
WAYS = ("ours", "ours, recompute", "transformers, sdpa", "transformers, eager")
DTYPES = ("float32", "bfloat16")
WARM_TOKENS = 64


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--preset", default="tiny-90m", help="a preset or h1r-pico (default: %(default)s)")
    add("--lengths", type=int, nargs="+", default=[512, 2048], metavar="N")
    add("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    add("--part", choices=("step", "scan", "memory"), help="default: all three")
    add("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    add("--rounds", type=int, default=5, help="of each, in turns (default: %(default)s)")
    add("--threads", type=int, default=2)
    add("--worker", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if min(*args.lengths, args.rounds, args.threads) < 1:
        parser.error("--lengths, --rounds and --threads must be positive")
    return args


def main() -> int:
    args = parse()
    if args.worker:
        print(json.dumps({"peak": peak_of_a_step(args)}))
        return 0
    import torch

    torch.set_num_threads(args.threads)
    found: list[dict] = []
    if args.part != "memory":
        print("| what | dtype | tokens | way | median | p20 to p80 | of transformers' |")
        print("|---|---|---:|---|---:|---:|---:|")
    for dtype in args.dtypes:
        for length in args.lengths:
            if args.part in (None, "step"):
                found += timed("step", steps(args, dtype, length), dtype, length, args.rounds)
            if args.part in (None, "scan") and dtype == "float32":
                found += timed("scan", scans(args, length), dtype, length, args.rounds)
    if args.part in (None, "memory"):
        print("\n| tokens | dtype | way | beyond weights and gradients | bytes a token |")
        print("|---:|---|---|---:|---:|")
        for dtype in args.dtypes:
            for length in args.lengths:
                for way in args.ways:
                    peak = run_worker(args, way, dtype, length)
                    found.append({"what": "memory", "dtype": dtype, "tokens": length, "way": way})
                    found[-1]["bytes"] = peak
                    print(
                        f"| {length:,} | {dtype} | {way} | {peak / 2**20:,.0f} MiB | "
                        f"{peak / length:,.0f} |",
                        flush=True,
                    )
    record = {"benchmark": "train", "preset": args.preset, "threads": args.threads}
    print(f"\n{json.dumps(record | {'rows': found})}")
    return 0


def timed(what: str, calls: dict, dtype: str, length: int, rounds: int) -> list[dict]:
    """Print and return a row for each call, with its ratio to the fastest of transformers'."""
    import torch

    from falcon_h1r.bench.timing import TimeBudget, WallClock, measure, ratio

    budget = TimeBudget(seconds=0, least=rounds, most=rounds)
    timings = measure(calls, WallClock(torch.device("cpu")), budget)
    theirs = [way for way in timings if way.startswith("transformers")]
    base = min(theirs, key=lambda way: timings[way].p50) if theirs else None
    rows = []
    for way, timing in timings.items():
        row = {"what": what, "dtype": dtype, "tokens": length, "way": way}
        row |= {"p50": timing.p50, "p20": timing.p20, "p80": timing.p80}
        share = ""
        if base is not None and way != base:
            row["times as fast"] = 1 / ratio(timing, timings[base])["p50"]
            share = f"{row['times as fast']:.2f}x as fast"
        spread = f"{1e3 * timing.p20:,.0f} to {1e3 * timing.p80:,.0f}"
        print(
            f"| {what} | {dtype} | {length:,} | {way} | {1e3 * timing.p50:,.1f} ms | {spread} | "
            f"{share} |",
            flush=True,
        )
        rows.append(row)
    return rows


def read_config(preset: str):
    from falcon_h1r import FalconH1Config

    embedded = ROOT / "falcon_h1r" / "assets" / preset
    if embedded.is_dir():
        return FalconH1Config.from_pretrained(embedded)
    return FalconH1Config.preset(preset)


def make_step(way: str, preset: str, dtype: str, length: int):
    """A training step of random weights on the tokens of a seed: (step(length), parameters)."""
    import torch
    from torch.nn.functional import cross_entropy

    from falcon_h1r import FalconH1ForCausalLM
    from falcon_h1r.bench.peer_model import transformers_model
    from falcon_h1r.training import next_token_loss

    torch.manual_seed(0)
    config = read_config(preset)
    config = replace(config, max_position_embeddings=max(config.max_position_embeddings, length))
    model = FalconH1ForCausalLM(config)
    ids = torch.randint(1, config.vocab_size, (1, length + 1))
    cast = functools.partial(
        torch.autocast, "cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"
    )
    if way.startswith("transformers"):
        model = transformers_model(model)
        if isinstance(model, str):
            raise SystemExit(f"transformers: {model}")
        model.requires_grad_(True).train()
        model.set_attn_implementation(way.rsplit(" ", 1)[1])

    def step(tokens: int = length) -> float:
        model.zero_grad()
        text, targets = ids[:, :tokens], ids[:, 1 : tokens + 1]
        with cast():
            if way.startswith("transformers"):
                logits = model(text, use_cache=False).logits
                loss = cross_entropy(logits.float().flatten(0, 1), targets.flatten())
            else:
                recompute = way.endswith("recompute")
                loss = next_token_loss(model, text, targets, recompute=recompute) / tokens
        loss.backward()
        return loss.item()

    return step, dict(model.named_parameters())


def steps(args, dtype: str, length: int) -> dict:
    """The ways' steps, once their losses and gradients were found to agree."""
    import torch

    made = {way: make_step(way, args.preset, dtype, length) for way in args.ways}
    losses = {way: step() for way, (step, _) in made.items()}
    first, reference = next(iter(losses)), next(iter(made.values()))[1]
    tolerance = 1e-4 if dtype == "float32" else 0.05
    for way, (_, parameters) in made.items():
        pairs = [(p.grad, parameters[name].grad) for name, p in reference.items()]
        apart = torch.stack([(a - b).norm() for a, b in pairs]).norm()
        apart /= torch.stack([b.norm() for _, b in pairs]).norm()
        if abs(losses[way] / losses[first] - 1) > tolerance or apart > tolerance:
            raise SystemExit(f"{way}: loss {losses}, gradients {apart:.1e} from {first}'s")
    return {way: step for way, (step, _) in made.items()}


def scans(args, length: int) -> dict:
    """The scan alone, forward and backward, on the preset's heads."""
    import torch
    from transformers.models.falcon_h1.modeling_falcon_h1 import mamba2_chunk_scan

    from falcon_h1r.ops import TORCH

    scan = getattr(mamba2_chunk_scan, "__wrapped__", mamba2_chunk_scan)
    config = read_config(args.preset)
    h, p = config.mamba_n_heads, config.mamba_d_head
    g, n = config.mamba_n_groups, config.mamba_d_state
    torch.manual_seed(0)
    x, B, C = (torch.randn(1, length, *shape) for shape in ((h, p), (g, n), (g, n)))
    dt, A, D = torch.rand(1, length, h) * 0.1, -torch.rand(h) - 0.1, torch.randn(h)
    inputs = [t.requires_grad_() for t in (x, dt, A, B, C, D)]

    def ours():
        y, _ = TORCH.ssd_scan(*inputs, chunk_size=config.mamba_chunk_size)
        return torch.autograd.grad(y.square().sum(), inputs)

    def theirs():
        y = scan(x, dt, A, B, C, chunk_size=config.mamba_chunk_size, D=D)
        return torch.autograd.grad(y.square().sum(), inputs)

    for one, other in zip(ours(), theirs()):
        apart = (one - other).norm() / other.norm()
        if apart > 1e-4:
            raise SystemExit(f"scan: gradients {apart:.1e} apart")
    return {"ours": ours, "transformers": theirs}


def peak_of_a_step(args) -> int:
    """Bytes, in a process of its own."""
    import torch
    from bench_memory import memory

    torch.set_num_threads(args.threads)
    (length,), (dtype,) = args.lengths, args.dtypes
    step, _ = make_step(args.worker, args.preset, dtype, length)
    step(min(WARM_TOKENS, length))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes VmRSS
    before = memory("VmRSS")
    step()
    return memory("VmHWM") - before


def run_worker(args, way: str, dtype: str, length: int) -> int:
    command = [sys.executable, __file__, "--worker", way, "--lengths", str(length)]
    command += ["--dtypes", dtype, "--preset", args.preset, "--threads", str(args.threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"the step of {way} over {length} tokens failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])["peak"]


if __name__ == "__main__":
    raise SystemExit(main())
