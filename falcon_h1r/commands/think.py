"""`falcon-h1r think`: one question, or a file of them, answered by a vote of traces."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from . import common
from .policy import add_policy_options
from .prompt import add_prompt_options
from .terminal import print_json
from .think_run import say, start_engine, start_question, votes
from .think_setup import Asked, Setup, memory_size, prepare

ROWS = 64


def add_to(commands) -> None:
    parser = commands.add_parser(
        "think",
        help="answer a question by a vote of many traces",
        description="Sample many traces of a question side by side, stop those that are unsure of "
        "themselves and all of them once the vote is clear (DeepConf, arXiv 2508.15260), and "
        "answer by the vote. The answer goes to stdout, a view of what runs to stderr. Ctrl-C "
        "votes over what there is.",
    )
    add_prompt_options(parser, "question")
    parser.add_argument(
        "--questions",
        metavar="FILE",
        help='many: a line {"question": ..., "reference": ...} each (JSONL), or with the keys '
        "problem, answer (GSM8K's #### too), solution, id, choices, prompt_suffix; they share the "
        "rows. With --record a run that was cut short is taken up again by the same command. The "
        "seed's default is 0",
    )
    parser.add_argument("--reference", metavar="TEXT", help="the right answer: says if it is found")
    parser.add_argument(
        "--prompt-suffix",
        metavar="TEXT",
        help="a line under every question, such as how the answer is to be given",
    )
    parser.add_argument("--system", metavar="TEXT", help="system message of the chat template")
    _add_policy(parser)
    running = parser.add_argument_group("running")
    running.add_argument(
        "--rows", type=common.counting, default=ROWS, metavar="N", help="most traces at a time; 64"
    )
    running.add_argument(
        "--memory",
        type=memory_size,
        metavar="SIZE",
        help="most bytes for caches, such as 8GiB: fewer rows where they do not fit; default: "
        "three quarters of what is free once the weights are read",
    )
    running.add_argument(
        "--prefill-chunk",
        type=common.counting,
        default=512,
        metavar="N",
        help="most tokens of a prompt read between two steps; 512",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--record",
        metavar="FOLDER",
        help="keep every trace, for falcon-h1r replay; with --questions a folder of records",
    )
    output.add_argument(
        "--record-top",
        type=int,
        metavar="N",
        help="likeliest tokens of every position in the record; default: k; 0: none, some nine "
        "times smaller",
    )
    output.add_argument(
        "--plot", metavar="FILE", help="picture of the confidences along all traces, such as x.png"
    )
    output.add_argument("--json", action="store_true", help="one JSON document on stdout")
    output.add_argument("--quiet", action="store_true", help="nothing but the answer")
    common.add_model_options(parser)
    common.add_sampling_options(parser)
    parser.set_defaults(run=run)


def _add_policy(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "policy",
        "Defaults are DeepConf's, except the temperature, 0.6, and top-p, 0.95, where the "
        "checkpoint has none, the window, and the margin.",
    )
    group.add_argument(
        "--preset",
        choices=("low", "high", "low-authors", "high-authors"),
        help="stops many traces (default), or few; the authors' code has no consensus that ends "
        "all traces",
    )
    group.add_argument(
        "--policy",
        choices="majority mean lowest-group bottom-10 tail deepconf deepconf-low deepconf-high "
        "deepconf-low-authors deepconf-high-authors".split(),
        metavar="NAME",
        help="majority, or a vote weighted by mean, lowest-group, bottom-10 or tail: no trace is "
        "stopped; or deepconf, deepconf-low, deepconf-high, or one of these with -authors",
    )
    add_policy_options(
        group,
        budget="512, without DeepConf 64",
        window="2048, or 1/32 of --max-new-tokens where that is less, at least 8",
        k="20",
    )
    group.add_argument(
        "--extractor",
        default="boxed",
        metavar="SPEC",
        help="how an answer is read: boxed (default), number, choice, line, several with commas, "
        "or re:PATTERN",
    )
    group.add_argument(
        "--rule",
        choices=("auto", "exact", "math-verify"),
        default="auto",
        help="how answers are compared; auto: math-verify where it is installed",
    )


def run(args: argparse.Namespace) -> int:
    setup = prepare(args)
    say(args, *setup.notes)
    if args.record is None:
        return _run(args, setup)
    from ..reasoning.lock import FolderLock

    with FolderLock(args.record) as lock:
        return _run(args, setup, lock)


def _run(args: argparse.Namespace, setup: Setup, lock=None) -> int:
    """lock: of the --record folder, where there is one."""
    if args.questions is not None:
        from .think_many import run_many

        return run_many(args, setup)
    if args.record is not None or args.plot is None:
        return _run_one(args, setup, setup.questions[0], lock)
    # The picture is drawn from a record; without --record nobody keeps it.
    with tempfile.TemporaryDirectory() as folder:
        return _run_one(args, setup, setup.questions[0]._replace(folder=Path(folder)))


def _run_one(args: argparse.Namespace, setup: Setup, asked: Asked, lock=None) -> int:
    from ..reasoning import LiveRun, read_record
    from .think_view import View, report

    engine = start_engine(args, setup, [asked])
    question = start_question(args, setup, asked, lock)
    live = LiveRun(engine, [question], setup.tokenizer)
    with View(args, setup.tokenizer, args.extractor) as view:
        interrupted = live.run(view)
    result = question.policy.result()
    right = None
    if asked.reference is not None:
        right = result.answer is not None and setup.equality.same(asked.reference, result.answer)
    if args.json:
        document = _document(args, setup, asked, question, engine, right)
        print_json(document)
    elif args.quiet:
        print("no answer" if result.answer is None else result.answer)
    else:
        print(report(result, question.seconds, right, engine.plan(), asked.seed))
    if args.plot is not None and not result.tokens:
        say(args, "no picture: there are no tokens to draw")
    elif args.plot is not None:
        from ..reasoning.plot import plot_confidence

        plot_confidence(
            read_record(asked.folder, tensors=False),
            args.plot,
            window=setup.params.window,
            result=result,
            equality=setup.equality,
        )
        say(args, f"picture: {args.plot}")
    return common.INTERRUPTED if interrupted else 0


def _document(args, setup: Setup, asked: Asked, question, engine, right: bool | None) -> dict:
    from ..reasoning import tokens_of_all

    result, plan = question.policy.result(), engine.plan()
    everything = tokens_of_all(result)
    return {
        "model": args.model,
        "question": asked.text,
        "prompt": asked.prompt,
        "prompt_tokens": len(asked.ids),
        "answer": result.answer,
        "reference": asked.reference,
        "right": right,
        "extractor": args.extractor,
        "rule": setup.equality.rule,
        "sampling": setup.manifest(args, asked).sampling,
        "seeds": [trace.seed for trace in result.traces],
        "votes": votes(result),
        "tokens": result.tokens,
        "estimated_tokens_of_all": everything,
        "estimated_saved": None if everything is None else everything - result.tokens,
        "seconds": question.seconds,
        "tokens_per_second": question.tokens / question.seconds if question.seconds else None,
        "plan": {**plan._asdict(), "text": str(plan)},
        "record": None if args.record is None else str(asked.folder),
        "result": result.to_dict(),
    }
