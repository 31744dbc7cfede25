"""`falcon-h1r info`: what a model is made of and what it costs."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from .common import DEFAULT_MODEL, DTYPES, counting


def add_to(commands) -> None:
    parser = commands.add_parser(
        "info",
        help="parameters, memory and work of a model",
        description="Parameters, memory and work per token of a model, from its config alone.",
    )
    parser.add_argument(
        "model",
        nargs="?",
        default=DEFAULT_MODEL,
        metavar="PRESET_OR_PATH",
        help="a preset such as falcon-h1r-7b, a checkpoint folder or a hub repository; "
        "default: the embedded h1r-pico",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub repository")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument(
        "--context", type=counting, nargs="+", metavar="N", help="context lengths in tokens"
    )
    parser.add_argument(
        "--traces", type=counting, nargs="+", metavar="N", help="numbers of sequences side by side"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of weights and cache")
    parser.add_argument(
        "--bandwidth",
        type=float,
        metavar="GB/S",
        help="memory bandwidth of a machine: adds the steps per second that it allows at most",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import torch

    from ..config import PRESETS, FalconH1Config
    from ..cost import render, sheet

    if args.model in PRESETS:
        if args.revision is not None:
            raise ValueError(f"--revision: the preset {args.model} has none")
        config = FalconH1Config.preset(args.model)
    else:
        if "/" not in args.model and args.model != DEFAULT_MODEL and not Path(args.model).exists():
            known = ", ".join(PRESETS)
            raise ValueError(f"{args.model!r} is neither a folder nor a preset; presets: {known}")
        config = FalconH1Config.from_pretrained(args.model, args.revision)
    options = {"contexts": args.context, "traces": args.traces}
    options = {name: tuple(value) for name, value in options.items() if value is not None}
    if args.bandwidth is not None:
        if not 0 < args.bandwidth < math.inf:
            raise ValueError(f"--bandwidth is {args.bandwidth}, expected GB/s above 0")
        options["bandwidth"] = args.bandwidth * 1e9
    values = sheet(config, getattr(torch, args.dtype), **options)
    if args.json:
        print(json.dumps({"model": args.model, **values}))
    else:
        print(render(args.model, values))
    return 0
