"""`falcon-h1r think --questions`: many questions over one engine, a record each."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

from .common import INTERRUPTED
from .terminal import print_json
from .think_run import say, start_engine, start_question, votes
from .think_setup import Asked, Setup
from .think_view import View, short

MOST_OPEN = 16


def run_many(args: argparse.Namespace, setup: Setup) -> int:
    """Records that are complete are not asked again; those that were cut short are, from the
    start."""
    from ..reasoning import LiveRun

    rows, open_questions = {}, []
    for asked in setup.questions:
        if (found := _finished(args, setup, asked)) is not None:
            rows[asked.name] = found
        else:
            open_questions.append(asked)
    if rows:
        say(args, f"{len(rows)} of {len(setup.questions)} questions have a complete record")
    start, made, interrupted, plan = time.perf_counter(), 0, False, None
    if open_questions:
        engine = start_engine(args, setup, open_questions)
        start = time.perf_counter()
        by_name = {asked.name: asked for asked in open_questions}

        def on_done(question) -> None:
            nonlocal made
            made += question.tokens
            row = _row(setup, by_name[question.name], question)
            rows[question.name] = row
            say(args, line_of(row))

        live = LiveRun(
            engine, _begin(args, setup, open_questions), setup.tokenizer, most_open=MOST_OPEN
        )
        with View(args, setup.tokenizer, args.extractor) as view:
            interrupted = live.run(view, on_done)
        plan = engine.plan()
    seconds = time.perf_counter() - start
    table = [rows[asked.name] for asked in setup.questions if asked.name in rows]
    document = summary(table, len(setup.questions))
    document = {**document, "tokens_made": made, "seconds": seconds}
    if args.json:
        document["plan"] = None if plan is None else {**plan._asdict(), "text": str(plan)}
        document["policy"] = setup.params.to_dict()
        print_json({**document, "questions": table})
    else:
        print(render(document))
    return INTERRUPTED if interrupted else 0


def _begin(args: argparse.Namespace, setup: Setup, questions: list[Asked]) -> Iterator:
    for asked in questions:
        if asked.folder is not None:
            _clear(args, asked)
        yield start_question(args, setup, asked)


def _finished(args: argparse.Namespace, setup: Setup, asked: Asked) -> dict | None:
    """The row of a question whose record is complete; ValueError where it is of another one."""
    from ..reasoning import read_record
    from ..reasoning.traces import MANIFEST, manifest_document

    if asked.folder is None or not (asked.folder / MANIFEST).exists():
        return None
    record = read_record(asked.folder, tensors=False)
    say(args, *record.notes)
    ours = manifest_document(setup.manifest(args, asked))
    theirs = manifest_document(record.manifest)
    differ = [name for name in ours if ours[name] != theirs[name] and name != "check"]
    if differ:
        raise ValueError(
            f"{asked.folder}: holds a record with another {', '.join(differ)}; "
            "give another --record folder"
        )
    if not record.complete or record.end.get("done") == "interrupted":
        return None
    end = record.end
    return {
        "name": asked.name,
        "id": asked.id,
        "question": asked.text,
        "reference": asked.reference,
        "answer": end["answer"],
        "right": _right(setup, asked, end["answer"]),
        "done": end["done"],
        "traces": len(record.traces),
        "voted": end.get("voted"),  # older records do not say
        "tokens": record.tokens,
        "seconds": end["seconds"],
        "record": str(asked.folder),
    }


def _clear(args: argparse.Namespace, asked: Asked) -> None:
    """Remove what a run that was cut short left."""
    from ..reasoning.recorder import remove_record
    from ..reasoning.traces import MANIFEST

    if (asked.folder / MANIFEST).exists():
        say(args, f"{asked.name}: its record was cut short, it is asked anew")
        remove_record(asked.folder)


def _right(setup: Setup, asked: Asked, answer: str | None) -> bool | None:
    if asked.reference is None:
        return None
    return answer is not None and setup.equality.same(asked.reference, answer)


def _row(setup: Setup, asked: Asked, question) -> dict:
    result = question.policy.result()
    return {
        "name": asked.name,
        "id": asked.id,
        "question": asked.text,
        "reference": asked.reference,
        "answer": result.answer,
        "right": _right(setup, asked, result.answer),
        "done": result.done,
        "traces": len(result.traces),
        "voted": votes(result)["voted"],
        "tokens": result.tokens,
        "seconds": question.seconds,
        "record": None if asked.folder is None else str(asked.folder),
    }


def line_of(row: dict) -> str:
    judged = {None: "", True: ", right", False: ", wrong"}[row["right"]]
    traces = f"{row['traces']} traces"
    if row["voted"] is not None:
        traces = f"{row['voted']} of {traces} voted"
    named = row["name"] if row["id"] is None else f"{row['name']} ({short(row['id'])})"
    return (
        f"{named}: {short(row['answer'], 'no answer')}{judged}; {traces}, "
        f"{row['tokens']:,} tokens; {row['done']}"
    )


def summary(table: list[dict], asked: int) -> dict:
    """Over the questions that came to their end; a question that was interrupted counts as open."""
    from ..reasoning.plot import wilson_interval

    whole = [row for row in table if row["done"] != "interrupted"]
    judged = [row["right"] for row in whole if row["right"] is not None]
    return {
        "asked": asked,
        "done": len(whole),
        "answered": sum(row["answer"] is not None for row in whole),
        "judged": len(judged),
        "right": sum(judged),
        "accuracy": sum(judged) / len(judged) if judged else None,
        "interval_95": list(wilson_interval(sum(judged), len(judged))) if judged else None,
        "traces": sum(row["traces"] for row in whole),
        "tokens": sum(row["tokens"] for row in whole),
    }


def render(document: dict) -> str:
    lines = [
        ("questions", f"{document['done']} of {document['asked']}"),
        ("answered", str(document["answered"])),
    ]
    if document["judged"]:
        low, high = (100 * bound for bound in document["interval_95"])
        lines.append(("right", f"{document['right']} of {document['judged']}"))
        interval = f"{100 * document['accuracy']:.1f} % (95 % Wilson: {low:.1f} to {high:.1f} %)"
        lines.append(("accuracy", interval))
    rate = document["tokens_made"] / document["seconds"] if document["seconds"] else 0
    lines += [
        ("traces", f"{document['traces']:,}"),
        ("tokens", f"{document['tokens']:,}"),
        ("seconds", f"{document['seconds']:.1f} ({rate:,.0f} tokens/s)"),
    ]
    return "\n".join(f"{name:<9}  {value}" for name, value in lines)
