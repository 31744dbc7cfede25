"""Peak memory of a prefill beyond the loaded weights, and of long prompts read in chunks.

    python benchmarks/bench_memory.py                       # 90M, 8192 tokens, beside transformers
    python benchmarks/bench_memory.py --preset h1r-pico --chunk 1024 --tokens 4096 16384 65536

Every measurement is a fresh process with random weights: a prompt of 64 tokens first, then the
high-water mark of the resident set (VmHWM, set back through /proc/self/clear_refs) while the prompt
is read into an empty cache, less the resident set before. The cache is part of it. The ways to run
take turns; medians. Long prompts that would pass --limit, by the time of the shorter ones, are left
out, and said to be. Linux only. Prints a table, and one line of JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
WAYS = ("ours", "ours, onednn", "transformers")
WARM_TOKENS = 64


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--preset", default="tiny-90m", help="a preset or h1r-pico (default: %(default)s)")
    add("--dtype", default="float32", choices=("float32", "bfloat16"))
    add("--tokens", type=int, nargs="+", default=[8192], metavar="N", help="prompt lengths")
    add("--chunk", type=int, metavar="N", help="tokens per forward (default: the whole prompt)")
    add("--sample", type=int, metavar="K", help="of the chunks, 2 or more (default: all)")
    add("--ways", nargs="+", choices=WAYS, help="default: all; with --chunk: ours")
    add("--repeats", type=int, default=1, help="runs of each, in turns (default: %(default)s)")
    add("--limit", type=float, default=240.0, help="seconds for one prompt (default: %(default)s)")
    add("--worker", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if min(*args.tokens, args.repeats, args.chunk or 1, WARM_TOKENS) < 1:
        parser.error("--tokens, --chunk and --repeats must be positive")
    args.ways = args.ways or (["ours"] if args.chunk else list(WAYS))
    if args.sample is not None and (args.sample < 2 or args.chunk is None):
        parser.error("--sample: at least 2, with --chunk")
    if args.chunk and "transformers" in args.ways:
        parser.error("--chunk: transformers reads whole prompts here")
    return args


def main() -> int:
    args = parse()
    if args.worker:
        print(json.dumps(work(args.worker, args)))
        return 0
    print(f"{args.preset}, {args.dtype}, " + (f"chunks of {args.chunk}" if args.chunk else "whole"))
    print("\n| tokens | way | beyond the weights | of it cache | bytes a token | seconds |")
    print("|---:|---|---:|---:|---:|---:|")
    rows: list[dict] = []
    for tokens in sorted(args.tokens):
        runs: dict[str, list[dict]] = {way: [] for way in args.ways}
        for _ in range(args.repeats):
            for way in args.ways:
                expected = estimate(rows, way, tokens)
                if args.sample:
                    expected *= args.sample * args.chunk / tokens
                if expected > args.limit:
                    print(f"| {tokens:,} | {way} | not run: about {expected:.0f} s | | | |")
                    continue
                runs[way].append(run_worker(way, tokens, args))
        for way, done in runs.items():
            if done:
                row = {key: statistics.median(run[key] for run in done) for key in done[0]}
                rows.append({"way": way, "tokens": tokens, **row})
                print(line(rows[-1]), flush=True)
    summary = {"benchmark": "memory", "preset": args.preset, "dtype": args.dtype}
    summary |= {
        "chunk": args.chunk,
        "sample": args.sample,
        "repeats": args.repeats,
        "rows": rows,
        "ratios": ratios(rows),
    }
    for tokens, found in summary["ratios"].items():
        print(f"\nours / transformers at {int(tokens):,} tokens: {found:.2f}")
    print(f"\n{json.dumps(summary)}")
    return 0


def estimate(rows: list[dict], way: str, tokens: int) -> float:
    """Seconds of a prompt by the next shorter one's, as if all work were attention's."""
    before = [row for row in rows if row["way"] == way]
    if not before:
        return 0.0
    return before[-1]["seconds"] * (tokens / before[-1]["tokens"]) ** 2


def line(row: dict) -> str:
    mib = 2**20
    return (
        f"| {row['tokens']:,} | {row['way']} | {row['peak_bytes'] / mib:,.0f} MiB | "
        f"{row['cache_bytes'] / mib:,.0f} MiB | {row['peak_bytes'] / row['tokens']:,.0f} | "
        f"{row['seconds']:.1f} |"
    )


def ratios(rows: list[dict]) -> dict[int, float]:
    """The leanest of ours over transformers, by length."""
    out = {}
    for row in rows:
        if row["way"] == "transformers":
            own = [r for r in rows if r["tokens"] == row["tokens"] and r["way"] != "transformers"]
            if own:
                out[row["tokens"]] = min(r["peak_bytes"] for r in own) / row["peak_bytes"]
    return out


def run_worker(way: str, tokens: int, args: argparse.Namespace) -> dict:
    command = [sys.executable, __file__, "--worker", way, "--tokens", str(tokens)]
    command += ["--preset", args.preset, "--dtype", args.dtype, "--ways", way]
    for option in ("chunk", "sample"):
        value = getattr(args, option)
        command += [f"--{option}", str(value)] if value else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"the run of {way} over {tokens} tokens failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def work(way: str, args: argparse.Namespace) -> dict:
    """One measurement, in a process of its own."""
    import torch

    (tokens,) = args.tokens
    torch.manual_seed(0)
    read, cache_bytes, vocabulary = reader(way, args, tokens)
    ids = torch.randint(vocabulary, (1, tokens))
    with torch.no_grad():
        read(ids[:, :WARM_TOKENS])
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes VmRSS
        before = memory("VmRSS")
        start = time.perf_counter()
        seconds = read(ids) or time.perf_counter() - start
    peak = memory("VmHWM") - before
    return {"peak_bytes": peak, "before_bytes": before, "cache_bytes": cache_bytes} | {
        "seconds": seconds
    }


def reader(way: str, args: argparse.Namespace, tokens: int):
    """A function that reads a prompt into an empty cache; the cache's bytes; the vocabulary.

    The function returns None, or the seconds that it estimates.
    """
    from dataclasses import replace

    import torch

    from falcon_h1r import FalconH1Config, FalconH1ForCausalLM

    embedded = ROOT / "falcon_h1r" / "assets" / args.preset
    if embedded.is_dir():
        config = FalconH1Config.from_pretrained(embedded)
    else:
        config = FalconH1Config.preset(args.preset)
    config = replace(config, max_position_embeddings=max(config.max_position_embeddings, tokens))
    model = FalconH1ForCausalLM(config, dtype=getattr(torch, args.dtype))
    cache_bytes = model.new_cache(1, tokens).nbytes
    if way == "transformers":
        from falcon_h1r.bench.peer_model import transformers_model

        peer = transformers_model(model)
        if isinstance(peer, str):
            raise SystemExit(f"transformers: {peer}")
        whole = {"use_cache": True, "logits_to_keep": 1}

        def read_whole(ids):
            peer(ids, **whole)

        return read_whole, cache_bytes, config.vocab_size
    if way != "ours":
        from falcon_h1r.cpu.onednn import use_onednn

        use_onednn(model)

    def read(ids):
        cache = model.new_cache(1, ids.shape[1])
        for piece in ids.split(args.chunk or ids.shape[1], dim=1):
            model(piece, cache=cache, logits_to_keep=1)

    def read_some(ids):
        """Seconds that all chunks would take."""
        pieces = ids.split(args.chunk, dim=1)
        if len(pieces) <= args.sample:
            return read(ids)
        cache = model.new_cache(1, ids.shape[1])
        for tensor in (cache.keys, cache.values, cache.windows, cache.states):
            tensor.normal_()
        taken = []
        for number in range(args.sample):
            index = round(number * (len(pieces) - 1) / (args.sample - 1))
            cache.lengths.fill_(index * args.chunk)
            start = time.perf_counter()
            model(pieces[index], cache=cache, logits_to_keep=1)
            taken.append(time.perf_counter() - start)
        return len(pieces) * sum(taken) / len(taken)

    return read_some if args.sample else read, cache_bytes, config.vocab_size


def memory(key: str) -> int:
    """Bytes from /proc/self/status."""
    for text in Path("/proc/self/status").read_text().splitlines():
        if text.startswith(f"{key}:"):
            return int(text.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {key}")


if __name__ == "__main__":
    sys.exit(main())
