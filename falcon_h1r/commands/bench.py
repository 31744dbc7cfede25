"""`falcon-h1r bench`: microbenchmarks of operators, of one layer, and of generation."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from .common import DEFAULT_MODEL, DTYPES, counting

FAMILY = "family"
PICTURES = (".png", ".svg", ".pdf")
WRONG = 1


def add_to(commands) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure operators, a layer or generation",
        description="Microbenchmarks. A machine card and the machine's own measured ceilings come "
        "first; nothing is timed before it has passed a correctness check against float64. Exit "
        "status 1: one of our own implementations did not pass.",
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
        kind.add_argument("--compile", action="store_true", help="also torch.compile of TORCH")


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
        help="the roofline's picture; default: beside --out's file, where matplotlib is installed",
    )
    add("--json", action="store_true", help="one JSON document on stdout in place of the table")


def run(args: argparse.Namespace) -> int:
    import torch

    from ..bench import contestants, machine, report, timing
    from ..bench.plot import has_matplotlib, require_matplotlib, roofline

    device = _device(args.device)
    workloads = _workloads(args, device)
    shapes = _shapes(args, device)
    if args.bench == "ops":
        _check_operators(args, device, workloads)
    if args.bench == "generate":
        contestants.select(args.only, args.skip, args.peers)
        _check_memory(args, device, shapes, workloads)
    if args.plot is not None:
        require_matplotlib()
        if args.plot.suffix not in PICTURES:
            known = ", ".join(PICTURES)
            raise ValueError(f"--plot is {str(args.plot)!r}, expected a name that ends in {known}")
        if not args.plot.parent.is_dir():
            raise ValueError(f"--plot: the folder {args.plot.parent} does not exist")
    budget = _budget(args)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    stream = sys.stderr if args.json else sys.stdout

    def say(text: str) -> None:
        print(text, file=stream, flush=True)

    card, clock = machine.card(device), timing.clock_for(device)
    dtypes = [getattr(torch, name) for name in args.dtype]
    ceilings = machine.measure_ceilings(device, dtypes, clock)
    path = args.out or report.default_path(card)
    steps = args.bench == "generate"
    conditions = {
        "command": _command(args),
        "clock": timing.WallClock(device).description if steps else clock.description,
        "seconds_per_case": budget.seconds,
        "seed": args.seed,
    }
    with report.Report(path, say) as out:
        out.head(card, ceilings, conditions)
        if warning := machine.busy(card):
            say(f"NOTE: {warning}")
        measure = {"ops": _ops, "layer": _layer, "generate": _generate}[args.bench]
        wrong = measure(args, shapes, workloads, dtypes, device, clock, ceilings, budget, out)
        out.add({"record": "end", **machine.state(device)})
        say(f"\n{len(out.records)} records appended to {path}")
        if wrong:
            say(f"{wrong} of our own implementations did not pass the correctness check")
    if args.plot is None and not has_matplotlib():
        say("no roofline drawn: matplotlib is not installed (pip install 'falcon-h1r[bench]')")
    elif args.plot is not None or any(r.get("status") == "timed" for r in out.records):
        picture = args.plot or path.with_suffix(".png")
        roofline(out.records, ceilings, card, picture)
        say(f"roofline: {picture}")
    if args.json:
        print(json.dumps({"records": out.records, "file": str(path), "wrong": wrong}))
    return WRONG if wrong else 0


def _ops(args, shapes, workloads, dtypes, device, clock, ceilings, budget, out) -> int:
    from ..bench import operator_bench, registry, tune

    found = registry.cases(list(shapes), args.ops, dtypes, workloads, shapes)
    if not args.tune:
        return operator_bench.run(
            found, device, clock, ceilings, budget, out, args.compile, args.seed
        )
    return sum(tune.run(case, device, clock, ceilings, budget, out, args.seed) for case in found)


def _layer(args, shapes, workloads, dtypes, device, clock, ceilings, budget, out) -> int:
    from ..bench import layer

    options = (device, clock, ceilings, budget, out, args.compile, args.seed)
    return sum(
        layer.run(name, config, workloads, dtype, *options)
        for name, config in shapes.items()
        for dtype in dtypes
    )


def _generate(args, shapes, workloads, dtypes, device, clock, ceilings, budget, out) -> int:
    from ..bench import generation_bench
    from ..model import FalconH1ForCausalLM

    wrong = 0
    for name, config in shapes.items():
        for dtype in dtypes:
            if args.model is not None:
                load = FalconH1ForCausalLM.from_pretrained
                model = load(args.model, dtype, device, revision=args.revision)
            else:
                model = generation_bench.random_model(config, dtype, device, args.seed)
            options = (args.seed, args.peers, args.only, args.skip)
            wrong += generation_bench.run(name, model, workloads, ceilings, budget, out, *options)
            del model
    return wrong


def _device(name: str | None):
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device is {name!r}, expected cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ValueError(f"--device {name}: torch sees {count} GPUs")
        torch.cuda.set_device(device.index or 0)
    return device


def _workloads(args: argparse.Namespace, device) -> list:
    from ..bench.registry import CPU_WORKLOADS, GPU_WORKLOADS, QUICK_WORKLOADS

    given = []
    for phase, texts in (
        ("prefill", args.prefill),
        ("resume", args.resume),
        ("decode", args.decode),
    ):
        given += [_workload(phase, text) for text in texts or ()]
    if given:
        return given
    if args.quick:
        return list(QUICK_WORKLOADS)
    return list(GPU_WORKLOADS if device.type == "cuda" else CPU_WORKLOADS)


def _workload(phase: str, text: str):
    """`BxL`, `BxL@P` or `B@N` as a workload."""
    from ..bench.registry import Workload

    form = {"prefill": "BxL", "resume": "BxL@P", "decode": "B@N"}[phase]
    rows, _, rest = text.partition("@" if phase == "decode" else "x")
    length, _, past = ("1", "", rest) if phase == "decode" else rest.partition("@")
    numbers = [rows, length] + ([] if phase == "prefill" else [past])
    if not all(number.isdecimal() for number in numbers) or (phase == "prefill" and "@" in rest):
        raise ValueError(f"--{phase} is {text!r}, expected {form}, all positive integers")
    values = [int(number) for number in numbers]
    if min(values) < 1 or (phase == "decode" and values[2] < 2):
        least = "; N is at least 2" if phase == "decode" else ""
        raise ValueError(f"--{phase} is {text!r}, expected {form}, all positive integers{least}")
    if phase == "decode":
        return Workload(phase, values[0], 1, values[2] - 1)
    return Workload(phase, *values)


def _shapes(args: argparse.Namespace, device) -> dict[str, Any]:
    """Configs by the name that results will bear."""
    from ..bench.registry import FAMILY as FIVE
    from ..config import PRESETS, FalconH1Config

    if getattr(args, "model", None) is not None:
        if args.model_shape is not None:
            raise ValueError("--model-shape: not with --model, which has a shape of its own")
        return {args.model: FalconH1Config.from_pretrained(args.model, args.revision)}
    if getattr(args, "revision", None) is not None:
        raise ValueError("--revision: only with --model")
    on_cpu = args.bench == "generate" and device.type == "cpu"
    names = args.model_shape or ["falcon-h1-0.5b" if on_cpu else "falcon-h1r-7b"]
    names = [one for name in names for one in (FIVE if name == FAMILY else (name,))]
    found = {}
    for name in names:
        if name in PRESETS:
            found[name] = FalconH1Config.preset(name)
        elif name == DEFAULT_MODEL or Path(name).exists():
            found[name] = FalconH1Config.from_pretrained(name)
        else:
            known = ", ".join((*PRESETS, DEFAULT_MODEL, FAMILY))
            raise ValueError(f"--model-shape: {name!r} is neither a folder nor one of: {known}")
    return found


def _check_operators(args: argparse.Namespace, device, workloads) -> None:
    from ..bench.registry import select

    operators = select(args.ops)
    phases = {w.phase for w in workloads}
    if not any(phases & set(operator.phases) for operator in operators):
        names, those = (", ".join(o.name for o in operators), ", ".join(sorted(phases)))
        raise ValueError(f"no case to measure: {names} has no {those} shapes")
    if args.tune and not args.ops:
        raise ValueError("--tune: give the operator with --op NAME")
    if args.tune and device.type != "cuda":
        raise ValueError(f"--tune: kernels are tuned on a GPU, --device is {device}")


def _check_memory(args: argparse.Namespace, device, shapes, workloads) -> None:
    """Refuse a model that cannot fit before minutes go by in filling memory."""
    import os

    import torch

    from ..bench.generation_bench import memory_bytes

    if device.type == "cuda":
        available = torch.cuda.get_device_properties(device).total_memory
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return
    for name, config in shapes.items():
        for dtype in args.dtype:
            needed = memory_bytes(config, workloads, getattr(torch, dtype))
            if needed > available:
                raise ValueError(
                    f"generate {name} {dtype}: weights and cache take {needed / 1e9:.1f} GB, "
                    f"{device} has {available / 1e9:.1f} GB; take a smaller --model-shape, or "
                    f"fewer rows with --prefill and --decode"
                )


def _budget(args: argparse.Namespace):
    from ..bench.timing import FULL, QUICK

    budget = QUICK if args.quick else FULL
    for name in ("seconds", "limit"):
        if (given := getattr(args, name, None)) is None:
            continue
        if not 0 < given < float("inf"):
            raise ValueError(f"--{name} is {given}, expected a number above 0")
        budget = budget._replace(**{name: given})
    return budget


def _command(args: argparse.Namespace) -> str:
    """The options that decide the numbers, as one line."""
    shown = {k: v for k, v in vars(args).items() if k not in ("run", "out", "plot", "json")}
    words = [shown.pop("command"), shown.pop("bench")]
    for name, value in shown.items():
        if value not in (None, False, []):
            text = " ".join(map(str, value)) if isinstance(value, list) else value
            words.append(f"--{name.replace('_', '-')}" + ("" if value is True else f" {text}"))
    return " ".join(words)
