"""`falcon-h1r bench`: microbenchmarks of operators, of one layer, and of generation."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from . import bench_setup
from .bench_setup import FAMILY
from .common import DEFAULT_MODEL, DTYPES, check_target, counting

PICTURES = (".png", ".svg", ".pdf")
WRONG = 1


def add_to(commands) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure operators, a layer or generation",
        description="Microbenchmarks. A machine card and the machine's own measured ceilings come "
        "first; nothing is timed before it has passed a correctness check against float64. Exit "
        "status 1: one of our own implementations, or one given with --impl, did not pass.",
    )
    kinds = parser.add_subparsers(metavar="ops|layer|generate", required=True, dest="bench")
    ops = kinds.add_parser(
        "ops",
        help="every implementation of every operator",
        description="Every implementation of every operator at the shapes of a model: our tables, "
        "torch.compile, Triton, and installed peers.",
    )
    ops.add_argument(
        "--ops", "--op", nargs="+", metavar="NAME", default=[], help="these operators only"
    )
    ops.add_argument(
        "--impl",
        nargs="+",
        metavar="[OP=]MODULE:FUNCTION",
        default=[],
        help="also this function of a module in the current folder or an installed one, called as "
        "the model calls operator OP; OP= may be left out where --op names one operator. Without "
        "--op only these operators are measured",
    )
    ops.add_argument(
        "--sizes",
        nargs="+",
        metavar="AXIS=N,...",
        default=[],
        help="the operator's axes by the letters of its argument names, such as l=777,h=4,p=64, in "
        "place of --prefill, --resume and --decode; other sizes are those of --model-shape",
    )
    ops.add_argument(
        "--tune",
        action="store_true",
        help="time every configuration of the Triton kernels of --op NAME (on a GPU)",
    )
    layer = kinds.add_parser(
        "layer",
        help="one hybrid block",
        description="One hybrid block with its cache under each operator table, beside "
        "transformers' layer where that is installed.",
    )
    generate = kinds.add_parser(
        "generate",
        help="prefill and decode of a whole model",
        description="Prefill and decode tokens/s of a randomly initialised model of a preset's "
        "shape, or of a checkpoint.",
    )
    generate.add_argument(
        "--model", metavar="PATH_OR_REPO", help="measure this checkpoint, not a random model"
    )
    generate.add_argument("--revision", help="branch, tag or commit of a hub repository")
    generate.add_argument(
        "--peers",
        action="store_true",
        help="also transformers and llama.cpp, with the same weights",
    )
    generate.add_argument(
        "--only", nargs="+", metavar="NAME", default=[], help="these ways to run the model only"
    )
    generate.add_argument(
        "--skip", nargs="+", metavar="NAME", default=[], help="all but these ways to run the model"
    )
    generate.add_argument(
        "--limit", type=float, metavar="S", help="time per case, which goes before the rounds"
    )
    for kind in (ops, layer, generate):
        _add_common(kind)
        kind.set_defaults(run=run)
    for kind in (ops, layer):
        kind.add_argument("--compile", action="store_true", help="also torch.compile of ours")


def _add_common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--model-shape",
        nargs="+",
        metavar="PRESET_OR_PATH",
        help=f"shapes to measure: presets, checkpoint folders, {DEFAULT_MODEL}, or {FAMILY!r} for "
        "the five sizes that differ; default: falcon-h1r-7b (generate on a CPU: falcon-h1-0.5b)",
    )
    add("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"], help="default: bfloat16")
    add("--device", default=None, help="cpu or cuda; default: cuda where there is one")
    add("--prefill", nargs="+", metavar="BxL", help="B rows of L new tokens each, such as 1x4096")
    add("--resume", nargs="+", metavar="BxL@P", help="the same behind P tokens read before")
    add("--decode", nargs="+", metavar="B@N", help="one token for B rows that hold N afterwards")
    add("--quick", action="store_true", help="few shapes, a tenth of the time: a look, no result")
    add("--seconds", type=float, metavar="S", help="time per implementation and case; default: 1")
    add("--threads", type=counting, metavar="N", help="CPU threads of torch")
    add("--seed", type=int, default=0, help="of inputs and weights; default: 0")
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help="append JSON lines here; default: benchmarks/results/DATE-MACHINE.jsonl in a "
        "checkout, DATE-MACHINE.jsonl here otherwise",
    )
    add(
        "--plot",
        type=Path,
        metavar="FILE.png",
        help="the roofline's picture, which replaces one that is there; default: beside --out's "
        "file, where matplotlib is installed",
    )
    add("--json", action="store_true", help="one JSON document on stdout in place of the table")


def run(args: argparse.Namespace) -> int:
    import torch

    from ..bench import machine, report, session, timing
    from ..bench.plot import has_matplotlib, roofline

    device = machine.find_device(args.device, "--device")
    work = {"ops": _ops, "layer": _layer, "generate": _generate}[args.bench](args, device)
    _check_picture(args.plot)
    if args.out is not None and args.out.is_dir():
        raise ValueError(f"--out: {args.out} is a folder, expected a file")
    budget = bench_setup.find_budget(args)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    stream = sys.stderr if args.json else sys.stdout

    def say(text: str) -> None:
        print(text, file=stream, flush=True)

    card, clock = machine.card(device), timing.clock_for(device)
    ceilings = machine.measure_ceilings(device, bench_setup.find_dtypes(args), clock)
    path = args.out or report.default_path(card)
    if args.bench == "generate":
        clock = timing.WallClock(device)
    conditions = {
        "command": _command(args),
        "clock": clock.description,
        "seconds_per_case": budget.seconds,
        "seed": args.seed,
    }
    compiled = getattr(args, "compile", False)
    with report.Results(path, say) as out:
        out.head(card, ceilings, conditions)
        if warning := machine.busy(card):
            say(f"NOTE: {warning}")
        wrong = work(session.Session(device, clock, ceilings, budget, out, compiled, args.seed))
        out.add({"record": "end", **machine.state(device)})
        say(f"\n{len(out.records)} records appended to {path}")
        if wrong:
            say(f"{wrong} results did not pass the correctness check, those of peers left aside")
    if args.plot is None and not has_matplotlib():
        say("no roofline drawn: matplotlib is not installed (pip install 'falcon-h1r[bench]')")
    elif args.plot is not None or any(r.get("status") == "timed" for r in out.records):
        picture = args.plot or path.with_suffix(".png")
        roofline(out.records, ceilings, card, picture)
        say(f"roofline: {picture}")
    if args.json:
        print(json.dumps({"records": out.records, "file": str(path), "wrong": wrong}))
    return WRONG if wrong else 0


# Each of these checks what its command was given, and returns what measures it: called with the
# session, that returns the number of results which are wrong.


def _ops(args: argparse.Namespace, device):
    from ..bench import operator_bench, tune
    from ..bench.user_operator import check_signature

    if args.tune and not args.ops:
        raise ValueError("--tune: give the operator with --op NAME")
    if args.tune and args.impl:
        raise ValueError("--tune: not with --impl, which has no configurations")
    if args.tune and device.type != "cuda":
        raise ValueError(f"--tune: kernels are tuned on a GPU, --device is {device}")
    user = bench_setup.find_user_operators(args)
    cases = bench_setup.find_cases(args, device, {one.op for one in user})
    for one in user:
        own = [case for case in cases if case.op == one.op]
        if not own:
            raise ValueError(f"--impl {one.name}: no case of {one.op} is among what is measured")
        try:
            for case in own:
                check_signature(one, case)
        except ValueError as error:
            raise ValueError(f"--impl {error}") from None
    if args.tune:
        return lambda session: sum(tune.run(case, session) for case in cases)
    return lambda session: operator_bench.run(cases, replace(session, user=user))


def _layer(args: argparse.Namespace, device):
    from ..bench import layer

    workloads = bench_setup.find_workloads(args, device)
    shapes = bench_setup.find_shapes(args, device)
    return lambda session: sum(
        layer.run(name, config, workloads, dtype, session)
        for name, config in shapes.items()
        for dtype in bench_setup.find_dtypes(args)
    )


def _generate(args: argparse.Namespace, device):
    from ..bench import contestants, generation_bench
    from ..model import FalconH1ForCausalLM

    workloads = bench_setup.find_workloads(args, device)
    shapes = bench_setup.find_shapes(args, device)
    names = contestants.select(args.only, args.skip, args.peers)
    bench_setup.check_memory(args, device, shapes, workloads)

    def measure(session) -> int:
        wrong = 0
        for name, config in shapes.items():
            for dtype in bench_setup.find_dtypes(args):
                if args.model is not None:
                    load = FalconH1ForCausalLM.from_pretrained
                    model = load(args.model, dtype, device, revision=args.revision)
                else:
                    model = generation_bench.random_model(config, dtype, device, args.seed)
                wrong += generation_bench.run(name, model, workloads, session, names)
                del model
        return wrong

    return measure


def _check_picture(path: Path | None) -> None:
    from ..bench.plot import require_matplotlib

    if path is None:
        return
    require_matplotlib()
    if path.suffix not in PICTURES:
        known = ", ".join(PICTURES)
        raise ValueError(f"--plot is {str(path)!r}, expected a name that ends in {known}")
    if not path.parent.is_dir():
        raise ValueError(f"--plot: the folder {path.parent} does not exist")
    check_target("--plot", path, force=True)


def _command(args: argparse.Namespace) -> str:
    """The options that decide the numbers, as one line."""
    shown = {k: v for k, v in vars(args).items() if k not in ("run", "out", "plot", "json")}
    words = [shown.pop("command"), shown.pop("bench")]
    for name, value in shown.items():
        if value not in (None, False, []):
            text = " ".join(map(str, value)) if isinstance(value, list) else value
            words.append(f"--{name.replace('_', '-')}" + ("" if value is True else f" {text}"))
    return " ".join(words)
