"""`falcon-h1r walk`: the tensors of one forward, in their order."""

from __future__ import annotations

import argparse
import math
import sys

from .common import add_checkpoint_options, describe, locate, operator_table, settle_device
from .prompt import add_prompt_options, read_prompt, render
from .terminal import print_json


def add_to(commands) -> None:
    parser = commands.add_parser(
        "walk",
        help="every tensor of one forward, in order",
        description="Send one prompt through the model and list every tensor on its way: shape, "
        "extremes, root mean square, bytes, and the line of code that makes it. The checkpoint is "
        "read one layer at a time.",
    )
    add_prompt_options(parser, example=True)
    parser.add_list(
        "--layers",
        "--layer",
        form=r"\d+|all",
        item=_layer,
        metavar="N",
        help="layers, from 0, such as 0,3; 'all' for all of them; default: 0",
    )
    add_checkpoint_options(parser)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..study.walk import render, walk

    _, _, rendered, ids = encode(args)
    source = stream(args)
    layers = args.layers or [0]
    steps = walk(source, ids, layers=None if "all" in layers else layers)
    print(f"[{describe(args, source.model)}]", file=sys.stderr, flush=True)
    if args.json:
        values = [step._asdict() for step in steps]
        for value in values:
            for key in ("min", "max", "rms"):
                value[key] = value[key] if math.isfinite(value[key]) else None
            limit = value["multipliers"].get("time_step_limit")
            if limit is not None:
                limit = [bound if math.isfinite(bound) else None for bound in limit]
                value["multipliers"]["time_step_limit"] = limit
        document = {"model": args.model, "prompt": rendered, "ids": ids, "walk": values}
        print_json(document)
    else:
        print(render(steps))
    return 0


def _layer(text: str) -> int | str:
    if text == "all" or text.isdecimal():
        return text if text == "all" else int(text)
    raise ValueError("expected the number of a layer, from 0, or all")


def encode(args: argparse.Namespace):
    """The checkpoint's tokenizer, the prompt, the prompt as rendered, and its ids."""
    from ..checkpoint import resolve
    from ..study.walk import EXAMPLE
    from ..text import load_tokenizer

    prompt = read_prompt(args, example=EXAMPLE)
    folder = resolve(locate(args.model, args.revision), args.revision, weights=False)
    tokenizer = load_tokenizer(folder)
    return tokenizer, prompt, *render(tokenizer, prompt, args.raw)


def stream(args: argparse.Namespace):
    """The checkpoint, read a layer at a time."""
    from ..checkpoint import stream_modules
    from ..model import FalconH1ForCausalLM

    settle_device(args)
    return stream_modules(
        FalconH1ForCausalLM,
        args.model,
        dtype=args.dtype,
        device=args.device,
        ops=None if args.ops is None else operator_table(args.ops, args.device),
        revision=args.revision,
    )
