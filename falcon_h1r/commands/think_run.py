"""What one question and many of them share in `falcon-h1r think`: engine, start, remarks, votes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import common
from .think_setup import Asked, Setup


def say(args: argparse.Namespace, *notes: str) -> None:
    for note in notes:
        if not args.quiet:
            print(f"[{note}]", file=sys.stderr)


def start_engine(args: argparse.Namespace, setup: Setup, questions: list[Asked]):
    """An engine for the questions; ValueError where one of them does not fit its memory."""
    from ..generation import Engine

    model = common.load_model(args)
    rows = min(args.rows, len(questions) * setup.params.budget)
    engine = Engine(
        model,
        # Text is read once, at a trace's end, unless the engine must follow it.
        setup.tokenizer if setup.sampling.needs_tokenizer else None,
        max_rows=rows,
        memory_budget=free_memory(args.device) if args.memory is None else args.memory,
        prefill_chunk=args.prefill_chunk,
        graph=True if args.compile else None,
    )
    # Refused here, before a record of it is begun.
    longest = max(questions, key=lambda asked: len(asked.ids))
    for number in engine.add(longest.ids, setup.sampling, seeds=[0]):
        engine.end([number], "probe")
        engine.pop(number)
    say(args, common.describe(args, model), *[common.COMPILING] * args.compile)
    if model.dtype.itemsize < 4 and getattr(setup.params, "margin", None) is not None:
        say(
            args,
            "weights of 16 bits round confidences by more than the margin: another --rows, "
            "--memory or --prefill-chunk may stop other traces",
        )
    return engine


def free_memory(device: str) -> int | None:
    """Three quarters of the bytes that are free on a device; None where the system does not say."""
    import torch

    free = None
    if torch.device(device).type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    elif (info := Path("/proc/meminfo")).exists():
        lines = dict(line.split(":") for line in info.read_text().splitlines())
        free = 1024 * int(lines["MemAvailable"].split()[0])
    return None if free is None else free * 3 // 4


def start_question(args: argparse.Namespace, setup: Setup, asked: Asked, lock=None):
    """lock: of its record's folder, where the caller holds it."""
    from ..reasoning import Question, TraceRecorder

    recorder = None
    if asked.folder is not None:
        top = 0 if args.record is None else args.record_top
        recorder = TraceRecorder(asked.folder, setup.manifest(args, asked), top, lock=lock)
    policy = setup.policy(args, asked)
    return Question(asked.ids, policy, setup.sampling, recorder=recorder, name=asked.name)


def votes(result) -> dict[str, int]:
    """How many traces were let to vote, of how many that began.

    ended: came to their own end; answered: of these, gave an answer; left_out: of these, have no
    vote because they were unsure. stopped: for low confidence. cut: by a consensus or Ctrl-C.
    """
    from ..reasoning.online import LOW, NATURAL

    ended = [trace for trace in result.traces if trace.reason in NATURAL]
    answered = sum(trace.answer is not None for trace in ended)
    voted = sum(trace.weight is not None for trace in ended)
    stopped = result.count(LOW)
    return {
        "traces": len(result.traces),
        "voted": voted,
        "ended": len(ended),
        "answered": answered,
        "left_out": answered - voted,
        "stopped": stopped,
        "cut": len(result.traces) - len(ended) - stopped,
    }
