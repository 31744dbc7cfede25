"""`falcon-h1r generate`: one prompt in, text or a JSON document out."""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import asdict
from typing import Any

from . import common
from .prompt import add_prompt_options, check_system, opens_thinking, read_prompt, render
from .terminal import Display, print_json


def add_to(commands) -> None:
    parser = commands.add_parser(
        "generate",
        help="continue one prompt",
        description="Generate from one prompt. Text goes to stdout as it is made, everything else "
        "to stderr. A checkpoint with a chat template gets the prompt as a user's message, one "
        "without gets it as it is.",
    )
    add_prompt_options(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message of the chat template")
    parser.add_argument(
        "--samples",
        "--n",
        dest="n",
        type=int,
        default=1,
        metavar="N",
        help="texts to make; default: 1",
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON document on stdout, at the end"
    )
    parser.add_argument(
        "--logprobs",
        type=int,
        metavar="K",
        help="with --json: each token's log-probability, and the K likeliest tokens (0: none)",
    )
    common.add_model_options(parser)
    common.add_sampling_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.logprobs is not None and not args.json:
        raise ValueError("--logprobs: only with --json")
    check_system(args)
    prompt = read_prompt(args)
    logprobs = False if args.logprobs is None else args.logprobs
    request = common.prepare(args, n=args.n, logprobs=logprobs)
    tokenizer = request.tokenizer
    rendered, ids = render(tokenizer, prompt, args.raw, args.system)
    model = common.load_model(args)
    limit = model.config.max_position_embeddings
    params = common.fit(request.params, request.max_new_given, len(ids), limit)
    return _generate(args, model, tokenizer, rendered, ids, params)


def _generate(args, model, tokenizer, rendered: str, ids: list[int], params) -> int:
    from ..generation import stream

    run = stream(
        model,
        [ids],
        params,
        tokenizer=tokenizer,
        prefill_chunk=common.PREFILL_CHUNK,
        graph=common.compile_step(args, model, params.n),
    )
    print(f"[{common.describe(args, model)}]", file=sys.stderr, flush=True)
    # Several samples grow side by side: they are shown one after the other when all are done.
    display = None
    if not args.json and params.n == 1:
        display = Display(sys.stdout, opens_thinking(rendered))
    start = first = time.perf_counter()
    interrupted = False
    try:
        for step in run:
            if step.position == 0:
                first = time.perf_counter()
            if display is not None:
                display.write(step.text.get(0, ""))
    except KeyboardInterrupt:
        interrupted = True
    end = time.perf_counter()
    out = run.result()
    if args.json:
        timing = {"prefill_s": first - start, "decode_s": end - first}
        document = _document(args, rendered, params, out, timing)
        print_json(document)
    elif display is not None:
        display.close(out.texts[0])
    else:
        for number, text in enumerate(out.texts):
            print(
                f"=== {number + 1} of {params.n}, seed {out.seeds[number]}, "
                f"{out.finish_reasons[number]} ==="
            )
            final = Display(sys.stdout, opens_thinking(rendered))
            final.close(text)
    sys.stdout.flush()
    print(
        f"[{common.speed(out, end - first)}; prompt {len(ids)} tokens in {first - start:.2f} s; "
        f"seed {out.seeds[0]}; {', '.join(out.finish_reasons)}]",
        file=sys.stderr,
    )
    return common.INTERRUPTED if interrupted else 0


def _document(args, rendered: str, params, out, timing: dict[str, float]) -> dict[str, Any]:
    from ..text import split_thinking

    opened = opens_thinking(rendered) or None
    outputs = []
    for i, text in enumerate(out.texts):
        thinking, answer = split_thinking(text, opened)
        entry = {
            "text": text,
            "thinking": thinking,
            "answer": answer,
            "tokens": out.sequences[i].tolist(),
            "finish_reason": out.finish_reasons[i],
            "seed": out.seeds[i],
        }
        if out.logprobs is not None:
            entry["logprobs"] = _finite(out.logprobs[i].tolist())
        if out.top_logprobs is not None and out.top_logprobs[i] is not None:
            top_ids, values = out.top_logprobs[i]
            entry["top_logprobs"] = [
                [{"token": token, "logprob": value} for token, value in zip(row, _finite(numbers))]
                for row, numbers in zip(top_ids.tolist(), values.tolist())
            ]
        outputs.append(entry)
    return {
        "model": args.model,
        "prompt": rendered,
        "prompt_tokens": out.prompt_lengths[0],
        "params": asdict(params),
        "outputs": outputs,
        "timing": timing,
    }


def _finite(values: list[float]) -> list[float | None]:
    """JSON has no infinity: the log-probability of an impossible token is null."""
    return [value if math.isfinite(value) else None for value in values]
