"""The batched decode engine on a CPU: tokens per second by rows, continuous batching, memory.

    python benchmarks/bench_engine.py                                # all of it, minutes
    python benchmarks/bench_engine.py --parts steps --dtypes float32 --forms compiled

A 90M model with random weights and a head of its own, scaled until the nucleus of top-p 0.95 at
temperature 0.6 has about 40 tokens, as a real model's; temperature 0.6, top-p 0.95, the
log-probabilities of 20 tokens. Linear layers are prepared by `use_onednn`, in the compiled form
with stream=True.

steps: engines of --rows traces of one prompt take turns, a step each; medians in the steady state,
after compilation and warm-up. crowd: traces of unequal lengths through 64 rows that are taken as
they become free, beside batches of `generate`'s stream that start together; whole runs in turns.
memory: what the resident set grows by for 64 full traces, in a process of its own (Linux), against
`cost`. Prints Markdown tables; appends JSON lines to benchmarks/results/DATE-MACHINE.jsonl.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import random
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
PARTS, FORMS, DTYPES = (
    ("steps", "crowd", "memory"),
    ("uncompiled", "compiled"),
    ("float32", "bfloat16"),
)
NUCLEUS = 40  # tokens, on average
MOST_STEPS, WARM_STEPS = 384, 3
ASK = {"temperature": 0.6, "top_p": 0.95, "logprobs": 20, "stop_token_ids": (), "seed": 1}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--preset", default="tiny-90m", help="default: %(default)s")
    add("--parts", nargs="+", choices=PARTS, default=PARTS)
    add("--forms", nargs="+", choices=FORMS, default=FORMS)
    add("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    add("--rows", type=int, nargs="+", default=[1, 8, 64], help="traces at a time, of `steps`")
    add("--width", type=int, default=64, help="rows of `crowd` and `memory` (default: %(default)s)")
    add("--prompt", type=int, default=128, help="tokens of the prompt (default: %(default)s)")
    add("--seconds", type=float, default=5.0, help="per engine of `steps` (default: %(default)s)")
    add("--traces", type=int, default=128, help="of `crowd` (default: %(default)s)")
    add("--mean", type=int, default=48, help="mean new tokens of `crowd` (default: %(default)s)")
    add("--repeats", type=int, default=2, help="runs of `crowd`, in turns (default: %(default)s)")
    add("--new", type=int, default=64, help="new tokens of `memory` (default: %(default)s)")
    add("--out", type=Path, help="JSON lines; default: benchmarks/results/DATE-MACHINE.jsonl")
    add("--worker", choices=DTYPES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    least = (*args.rows, args.width, args.prompt, args.traces, args.mean, args.repeats, args.new)
    if min(*least, args.seconds) <= 0:
        parser.error("numbers must be positive")
    return args


def main() -> int:
    args = parse()
    try:
        if args.worker:
            print(json.dumps(memory(args)))
            return 0
        run(args)
    except (ValueError, OSError) as error:
        print(f"bench_engine.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace) -> None:
    import torch

    from falcon_h1r.bench import machine, report

    card = machine.card(torch.device("cpu"))
    with report.Results(args.out or report.default_path(card), print) as out:
        out.add({"record": "machine", "format": report.FORMAT, **card})
        for part, work in (("steps", steps), ("crowd", crowd), ("memory", memories)):
            if part in args.parts:
                for row in work(args):
                    out.add({"record": "result", "bench": "engine", "part": part, **row})


def make(args: argparse.Namespace, dtype: str, form: str | None):
    """The model, its prompt, and the mean nucleus at the prompt's positions."""
    import torch

    from falcon_h1r import FalconH1Config, FalconH1ForCausalLM
    from falcon_h1r.cpu.onednn import use_onednn

    # Not tied: a random model whose head is its embedding says one token for ever.
    config = replace(FalconH1Config.preset(args.preset), tie_word_embeddings=False)
    torch.manual_seed(0)
    model = FalconH1ForCausalLM(config).requires_grad_(False)
    ids = torch.randint(config.vocab_size, (args.prompt,))
    with torch.no_grad():
        logits = model(ids[None, -64:])[0].double()
    low, high = 1.0, 1e4
    while high / low > 1.01:
        scale = (low * high) ** 0.5
        low, high = (scale, high) if nucleus(logits * scale) > NUCLEUS else (low, scale)
    config = replace(config, lm_head_multiplier=config.lm_head_multiplier * low)
    scaled = FalconH1ForCausalLM(config, dtype=getattr(torch, dtype)).requires_grad_(False)
    scaled.load_state_dict(model.state_dict())
    if form is not None:
        use_onednn(scaled, stream=form == "compiled")
    return scaled, ids, nucleus(logits * low)


def nucleus(logits) -> float:
    """Mean number of tokens that top-p leaves at the temperature."""
    p = (logits / ASK["temperature"]).softmax(-1).sort(-1, descending=True).values
    return float(((p.cumsum(-1) - p) < ASK["top_p"]).sum(-1).double().mean())


def timed_engine(model, **options):
    """An engine that knows how long its parts took: `model`, `sampling`; and its logits."""
    from falcon_h1r.generation import Engine

    class Timed(Engine):
        def _decode(self):
            start = time.perf_counter()
            logits = super()._decode()
            self.took["model"].append(time.perf_counter() - start)
            return logits

        def _choose(self, logits):
            start = time.perf_counter()
            step = super()._choose(logits)
            self.took["sampling"].append(time.perf_counter() - start)
            self.logits = logits
            return step

    engine = Timed(model, **options)
    engine.took = {"model": [], "sampling": []}
    return engine


def steps(args: argparse.Namespace):
    """Steps of engines in turns; yields a record for each, and prints the table."""
    import torch

    from falcon_h1r.bench import timing
    from falcon_h1r.generation import SamplingParams

    engines, calls, sizes = {}, {}, {}
    for dtype in args.dtypes:
        for form in args.forms:
            model, ids, sizes[dtype, form] = make(args, dtype, form)
            for rows in args.rows:
                engine = timed_engine(model, max_rows=rows, graph=form == "compiled" or None)
                engine.add(ids, SamplingParams(**ASK, n=rows, max_new_tokens=MOST_STEPS))
                for _ in range(WARM_STEPS):
                    engine.step()
                engines[dtype, form, rows], calls[dtype, form, rows] = engine, engine.step
    most = MOST_STEPS - 2 * WARM_STEPS
    budget = timing.TimeBudget(args.seconds, most=most, warmup_calls=WARM_STEPS)
    for engine in engines.values():
        for taken in engine.took.values():
            taken.clear()
    taken = timing.measure(calls, timing.WallClock(torch.device("cpu")), budget)
    print("\n| dtype | form | traces | step, ms | model | sampling | tokens/s | x 1 trace |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for (dtype, form, rows), t in taken.items():
        engine = engines[dtype, form, rows]
        shares = {k: statistics.median(v[-t.rounds :]) / t.p50 for k, v in engine.took.items()}
        one = taken.get((dtype, form, 1))
        ratio = None if one is None else rows * one.p50 / t.p50
        print(
            f"| {dtype} | {form} | {rows} | {1e3 * t.p50:.1f} [{1e3 * t.p20:.1f}, "
            f"{1e3 * t.p80:.1f}] | {shares['model']:.0%} | {shares['sampling']:.0%} | "
            f"{rows / t.p50:,.0f} | {'' if ratio is None else f'{ratio:.1f}'} |"
        )
        yield {
            "dtype": dtype,
            "form": form,
            "rows": rows,
            "prompt": args.prompt,
            "preset": args.preset,
            "seconds": {"p20": t.p20, "p50": t.p50, "p80": t.p80},
            "rounds": t.rounds,
            "tokens_per_second": rows / t.p50,
            "times_one_trace": ratio,
            "share": shares,
            "nucleus_of_prompt": sizes[dtype, form],
            "nucleus": nucleus(engine.logits.double()),
        }
    held = [nucleus(engine.logits.double()) for engine in engines.values()]
    print(
        f"\nNucleus: {statistics.mean(sizes.values()):.0f} tokens in the mean over the prompt, "
        f"{min(held):.0f} to {max(held):.0f} in the last steps."
    )


def crowd(args: argparse.Namespace):
    """Unequal traces: the engine beside batches that start together."""
    from falcon_h1r.generation import Engine, SamplingParams, stream

    chance = random.Random(0)
    cap = 4 * args.mean
    lengths = [min(cap, 1 + int(chance.expovariate(1 / args.mean))) for _ in range(args.traces)]
    print(
        f"\n{args.traces} traces of 1 to {max(lengths)} new tokens, mean "
        f"{statistics.mean(lengths):.0f}, in {args.width} rows\n"
    )
    print("| dtype | form | engine, s | batches, s | engine, tokens/s | faster |")
    print("|---|---|---:|---:|---:|---:|")
    for dtype in args.dtypes:
        for form in args.forms:
            model, ids, _ = make(args, dtype, form)
            graph = form == "compiled"

            def continuous(model=model, ids=ids, graph=graph):
                engine = Engine(model, max_rows=args.width, graph=graph or None)
                for k, new in enumerate(lengths):
                    engine.add(ids, SamplingParams(**{**ASK, "seed": k}, max_new_tokens=new))
                return sum(len(step.traces) for step in engine)

            def static(model=model, ids=ids, graph=graph):
                tokens = 0
                for start in range(0, len(lengths), args.width):
                    part = lengths[start : start + args.width]
                    ask = {**ASK, "seed": start, "n": len(part), "max_new_tokens": max(part)}
                    going = stream(model, [ids], SamplingParams(**ask), graph=graph or None)
                    for step in going:
                        tokens += len(step.sequences)
                        at = step.position + 1
                        going.end([i for i in step.sequences.tolist() if part[i] == at], "over")
                return tokens

            took: dict[str, list[float]] = {"continuous": [], "static": []}
            for repeat in range(args.repeats + graph):  # one more, in which it compiles
                for way in (continuous, static):
                    start = time.perf_counter()
                    said = way()
                    assert said == sum(lengths), (said, sum(lengths))
                    if repeat >= graph:
                        took[way.__name__].append(time.perf_counter() - start)
            ours, theirs = (statistics.median(took[name]) for name in ("continuous", "static"))
            print(
                f"| {dtype} | {form} | {ours:.1f} | {theirs:.1f} | {sum(lengths) / ours:,.0f} | "
                f"{theirs / ours:.2f}x |",
                flush=True,
            )
            yield {
                "dtype": dtype,
                "form": form,
                "rows": args.width,
                "traces": args.traces,
                "preset": args.preset,
                "tokens": sum(lengths),
                "longest": max(lengths),
                "seconds": took,
                "times_static": theirs / ours,
            }


def memories(args: argparse.Namespace):
    print(f"\n| dtype | traces of {args.prompt + args.new} tokens | a trace, measured | by `cost` |"
          " ratio | peak |")  # fmt: skip
    print("|---|---:|---:|---:|---:|---:|")
    for dtype in args.dtypes:
        command = [sys.executable, __file__, "--worker", dtype, "--preset", args.preset]
        for option in ("width", "prompt", "new"):
            command += [f"--{option}", str(getattr(args, option))]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise ValueError(done.stderr.strip().splitlines()[-1])
        row = json.loads(done.stdout.splitlines()[-1])
        mib = 2**20
        print(
            f"| {dtype} | {row['traces']} | {row['bytes_per_trace'] / mib:.2f} MiB | "
            f"{row['row_bytes'] / mib:.2f} MiB | {row['ratio']:.3f} | "
            f"{row['peak_bytes'] / mib:,.0f} MiB |"
        )
        yield {"dtype": dtype, "preset": args.preset, **row}


def memory(args: argparse.Namespace) -> dict:
    """One process: the resident set before and behind the traces, and its peak beyond before."""
    from bench_memory import memory as resident

    from falcon_h1r.generation import Engine, SamplingParams

    model, ids, _ = make(args, args.worker, None)
    ask = SamplingParams(**ASK, n=args.width, max_new_tokens=args.new)

    def settled() -> int:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        return resident("VmRSS")

    warm = Engine(model, max_rows=2)
    warm.add(ids, replace(ask, n=2, max_new_tokens=3))
    list(warm)
    del warm
    before = settled()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes VmRSS
    engine = Engine(model, max_rows=args.width)
    engine.add(ids, ask)
    list(engine)
    held, made = settled() - before, engine.plan()
    per_trace = held / args.width
    return {
        "traces": args.width,
        "bytes_per_trace": per_trace,
        "row_bytes": made.row_bytes,
        "ratio": per_trace / made.row_bytes,
        "peak_bytes": resident("VmHWM") - before,
        "row_tokens": made.tokens,
    }


if __name__ == "__main__":
    sys.exit(main())
