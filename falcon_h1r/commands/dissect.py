"""`falcon-h1r dissect`: what a model does inside with one prompt, as a page or as JSON."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .common import add_checkpoint_options, add_force, check_target, describe, operator_table
from .prompt import add_prompt_options
from .terminal import print_json, progress
from .walk import encode, stream

NEW_TOKENS = 48
OUT = "dissect.html"


def add_to(commands) -> None:
    parser = commands.add_parser(
        "dissect",
        help="what a model does inside with one prompt",
        description="Measure what happens to one prompt inside the model - what each branch adds, "
        "attention and the SSM's hidden attention, time scales, the logit lens, branches turned "
        "off - and write one HTML page that needs no network. The checkpoint is read one layer at "
        "a time; to make the answer, all of it is loaded first.",
    )
    add_prompt_options(parser, example=True)
    parser.add_argument(
        "--out", metavar="FILE.html", help=f"the page; default: {OUT}, or none with --json"
    )
    add_force(parser)
    parser.add_argument("--json", action="store_true", help="every number, on stdout")
    parser.add_argument(
        "-n",
        "--max-new-tokens",
        type=int,
        default=NEW_TOKENS,
        metavar="N",
        help=f"tokens of the model's own answer (its likeliest) to include; default: {NEW_TOKENS}",
    )
    parser.add_argument(
        "--no-switches", action="store_true", help="leave out turning branches off, the long part"
    )
    add_checkpoint_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..study.dissect import dissect
    from ..study.page import MOST_TOKENS, page, write_page

    if args.max_new_tokens < 0:
        raise ValueError(f"--max-new-tokens is {args.max_new_tokens}, expected 0 or more")
    out = OUT if args.out is None and not args.json else args.out
    if out is not None:
        check_target("--out", out, args.force)
    tokenizer, prompt, rendered, ids = encode(args)
    if len(ids) + args.max_new_tokens > MOST_TOKENS:
        raise ValueError(
            f"{len(ids)} tokens and --max-new-tokens {args.max_new_tokens} are more than "
            f"{MOST_TOKENS}, the most that dissect takes"
        )
    source = stream(args)
    print(f"[{describe(args, source.model)}]", file=sys.stderr, flush=True)
    both = ids + (_answer(args, source.model.dtype, tokenizer, ids) if args.max_new_tokens else [])
    found = dissect(source, both, branch_switches=not args.no_switches, progress=_progress)
    if args.json:
        document = {"model": args.model, "prompt": rendered, "prompt_tokens": len(ids)}
        document |= {"tokens": [tokenizer.decode([i]) for i in both], **found.to_dict()}
        print_json(document)
    if out is not None:
        name = Path(args.model).name or args.model
        html = page(found, tokenizer, model=name, prompt_tokens=len(ids), title=prompt)
        write_page(out, html)
        print(f"{out}: {len(html.encode()) / 1e6:.1f} MB", file=sys.stderr)
    return 0


def _answer(args, dtype, tokenizer, ids: list[int]) -> list[int]:
    """The likeliest continuation, up to an end token; the weights are let go afterwards."""
    from ..generation import SamplingParams, generate
    from ..model import FalconH1ForCausalLM

    table = None if args.ops is None else operator_table(args.ops, args.device)
    load = FalconH1ForCausalLM.from_pretrained
    model = load(args.model, dtype, args.device, table, args.revision)
    ends = {*model.eos_token_ids, tokenizer.eos_token_id}
    params = SamplingParams(
        max_new_tokens=args.max_new_tokens,
        temperature=0.0,
        stop_token_ids=tuple(sorted(ends - {None})),
    )
    return generate(model, [ids], params, tokenizer=tokenizer).sequences[0].tolist()


def _progress(done: int, total: int) -> None:
    progress("" if done == total else f"layer {done} of {total}")
