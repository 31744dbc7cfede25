"""`falcon-h1r info`: what a model is made of and what it costs."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from ..checks import shown
from .common import DEFAULT_MODEL, DTYPES, add_model_argument, counting, model_argument
from .grammar import nearest
from .terminal import print_json


def add_to(commands) -> None:
    parser = commands.add_parser(
        "info",
        help="parameters, memory and work of a model",
        description="Parameters, memory and work per token of a model, from its config alone.",
    )
    add_model_argument(
        parser,
        "PRESET_OR_PATH",
        "a preset such as falcon-h1r-7b, a checkpoint folder or a hub repository",
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    for option, what in {
        "--context": "context lengths in tokens",
        "--traces": "numbers of sequences side by side",
    }.items():
        parser.add_list(
            option, form=r"\d+", item=counting, metavar="N", help=f"{what}, such as 1,64"
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
    from ..presets import PRESETS

    args.model = model_argument(args)
    preset = args.model in PRESETS
    if preset and args.revision is not None:
        raise ValueError(f"--revision: the preset {args.model} has none")
    if not (preset or "/" in args.model or args.model == DEFAULT_MODEL):
        _require_folder(args.model, PRESETS)
    import torch

    from ..checkpoint import config_values
    from ..config import FalconH1Config, ignored_keys
    from ..cost import render, sheet

    ignored = []
    if preset:
        config = FalconH1Config.preset(args.model)
    else:
        config = FalconH1Config.from_pretrained(args.model, args.revision)
        ignored = ignored_keys(config_values(args.model, args.revision)[1])
    options = {"contexts": args.context, "traces": args.traces}
    options = {name: tuple(value) for name, value in options.items() if value is not None}
    if args.bandwidth is not None:
        if not 0 < args.bandwidth < math.inf:
            raise ValueError(f"--bandwidth is {args.bandwidth}, expected GB/s above 0")
        options["bandwidth"] = args.bandwidth * 1e9
    values = sheet(config, getattr(torch, args.dtype), **options)
    if args.json:
        print_json({"model": args.model, **values, "ignored_keys": ignored})
    else:
        print(render(args.model, values))
        if ignored:
            print(f"\nKeys of config.json without effect here: {', '.join(map(shown, ignored))}")
    return 0


def _require_folder(name: str, presets) -> None:
    if not Path(name).exists():
        near = nearest(name, presets)
        hint = f"did you mean {near}? " if near else ""
        known = ", ".join(presets)
        raise ValueError(f"{name!r} is neither a folder nor a preset; {hint}presets: {known}")
