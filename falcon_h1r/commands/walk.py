"""`falcon-h1r walk`: the tensors of one forward, in their order."""

from __future__ import annotations

import argparse
import json
import math
import sys

from .common import add_checkpoint_options, locate, operator_table


def add_to(commands) -> None:
    parser = commands.add_parser(
        "walk",
        help="every tensor of one forward, in order",
        description="Send one prompt through the model and list every tensor on its way: shape, "
        "extremes, root mean square, bytes, and the line of code that makes it. The checkpoint is "
        "read one layer at a time.",
    )
    add_prompt_options(parser)
    layers = parser.add_mutually_exclusive_group()
    layers.add_argument("--layer", type=int, metavar="N", help="one layer; default: the first")
    layers.add_argument(
        "--layers", nargs="+", metavar="N", help="several layers, from 0; 'all' for all of them"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.set_defaults(run=run)


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """The prompt, and a checkpoint that is streamed; shared with `dissect`."""
    parser.add_argument("prompt", nargs="?", help="default: an example; '-': read stdin")
    parser.add_argument("--raw", action="store_true", help="no chat template around the prompt")
    add_checkpoint_options(parser)


def run(args: argparse.Namespace) -> int:
    from ..study.walk import render, walk

    _, _, rendered, ids = encode(args)
    source = stream(args)
    steps = walk(source, ids, layers=_layers(args, source.model.config.num_hidden_layers))
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
        print(json.dumps(document, ensure_ascii=False, allow_nan=False))
    else:
        print(render(steps))
    return 0


def _layers(args, count: int) -> list[int] | None:
    if args.layers == ["all"]:
        return None
    asked = [args.layer or 0] if args.layers is None else args.layers
    try:
        return [int(number) for number in asked]
    except ValueError as error:
        raise ValueError(f"--layers: {' '.join(asked)}: expected numbers below {count}") from error


def encode(args: argparse.Namespace):
    """The checkpoint's tokenizer, the prompt, the prompt as rendered, and its ids."""
    from ..checkpoint import resolve
    from ..study.walk import EXAMPLE
    from ..text import load_tokenizer

    prompt = EXAMPLE if args.prompt is None else args.prompt
    if prompt == "-":
        prompt = sys.stdin.read().removesuffix("\n")
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    folder = resolve(locate(args.model, args.revision), args.revision, weights=False)
    tokenizer = load_tokenizer(folder)
    if args.raw or not tokenizer.chat_templates:
        return tokenizer, prompt, prompt, tokenizer.encode(prompt)
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
    return tokenizer, prompt, rendered, tokenizer.encode(rendered, add_special_tokens=False)


def stream(args: argparse.Namespace):
    """The checkpoint, read a layer at a time."""
    from ..checkpoint import stream_modules
    from ..model import FalconH1ForCausalLM

    return stream_modules(
        FalconH1ForCausalLM,
        args.model,
        dtype=args.dtype,
        device=args.device,
        ops=None if args.ops is None else operator_table(args.ops, args.device),
        revision=args.revision,
    )
