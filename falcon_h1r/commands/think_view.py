"""What `falcon-h1r think` shows: the traces while they run, and what came of them."""

from __future__ import annotations

import sys
import time
from typing import NamedTuple

from ..tables import aligned
from .terminal import can_rewrite, can_style, progress
from .think_run import votes

REFRESH, REPORT = 0.25, 10.0  # seconds between two views: on a terminal, elsewhere
_LONGEST = 24  # characters of an answer
_TAIL = 256  # tokens of a running trace in which its answer is looked for
_CANDIDATES = 10
_REASONS = {
    "stop": "end token",
    "stop_string": "stop string",
    "length": "length limit",
    "low_confidence": "low confidence",
    "consensus": "consensus",
    "interrupted": "interrupted",
}
_DONE = {
    "consensus": "the vote was clear",
    "budget": "the budget is used up",
    "all": "all traces came to their end",
    "interrupted": "interrupted",
}
_SHOWN = ("threshold", "consensus", "budget", "all", "interrupted")


class Row(NamedTuple):
    """A trace in the table, its cells as text. low: its group is below the threshold."""

    trace: str
    tokens: str
    group: str
    mean: str
    answer: str
    state: str
    low: bool


HEAD = ("trace", "tokens", "group", "mean", "answer", "state")


def short(answer: str | None, none: str = "-") -> str:
    if answer is None:
        return none
    line = " ".join(answer.split())
    return line if len(line) <= _LONGEST else line[: _LONGEST - 3] + "..."


def trace_rows(question, read, most: int) -> list[Row]:
    """Running traces by number, then those that ended last; `most` together.

    read: a number in the engine -> the answer in what the trace said last, or None.
    """
    policy = question.policy
    running = [trace for trace in policy.running if trace in question.traces][:most]
    ends = {event.trace: event for event in reversed(policy.log) if event.what in _ENDS}
    ended = list(ends)[: most - len(running)]
    threshold = policy.threshold
    rows = []
    for trace, (tokens, group, mean) in zip([*running, *ended], policy.live([*running, *ended])):
        if trace in ends:
            event = ends[trace]
            reason = event.value if event.what == "end" else event.what
            answer, state = policy.answer(trace), _REASONS[reason]
        else:
            answer = read(question.traces[trace])
            state = "warm-up" if threshold is None else "running"
        numbers = (f"{group:.3f}", f"{mean:.3f}") if tokens else ("-", "-")
        low = threshold is not None and tokens > 0 and group < threshold
        if low and state != _REASONS["low_confidence"]:
            state += ", low"
        rows.append(Row(str(trace), str(tokens), *numbers, short(answer), state, low))
    return rows


_ENDS = ("end", "low_confidence", "consensus")


def status(question, rate: float | None = None) -> str:
    """One line: how many traces, the threshold, the vote so far."""
    policy, result = question.policy, question.policy.result()
    parts = [f"{len(policy.running)} running, {len(result.traces)} of {policy.params.budget} begun"]
    parts.append(f"{question.tokens:,} tokens" + (f", {rate:,.0f}/s" if rate else ""))
    if policy.threshold is not None:
        parts.append(f"threshold {policy.threshold:.3f}")
    if result.vote.candidates:
        leader = result.vote.candidates[0]
        voters = sum(len(candidate.traces) for candidate in result.vote.candidates)
        share = f"{100 * result.vote.share:.1f} % of {voters} voters"
        parts.append(f"{short(leader.answer)} has {share}")
    return "; ".join(parts)


def report(result, seconds: float, right: bool | None, plan, seed: int) -> str:
    """The end of one question. plan: the engine's, which is shown where memory limited the rows."""
    lines = [_verdict(result, right), ""]
    lines += vote_table(result)
    counts = [f"{result.count(r)} {name}" for r, name in _REASONS.items() if result.count(r)]
    begun = f"{len(result.traces)} of at most {result.params.budget} traces"
    lines.append(f"{begun}: {', '.join(counts)}; {_DONE[result.done]}")
    lines.append(voting(result))
    lines.append(spent(result))
    rate = f"{result.tokens / seconds:,.0f} tokens/s; " if seconds > 0 else ""
    threshold = "" if result.threshold is None else f"threshold {result.threshold:.3f}; "
    lines.append(f"{seconds:.1f} s, {rate}{threshold}window {result.params.window}; seed {seed}")
    if plan.limit == "memory_budget":
        lines.append(str(plan))
    if result.threshold is not None and not any(
        trace.tokens >= result.params.window for trace in result.traces
    ):
        lines.append("no trace was as long as the window: none could be stopped; give --window")
    return "\n".join(lines)


def voting(result) -> str:
    """How many traces were let to vote, and why others were not."""
    from ..reasoning import Offline

    count = votes(result)
    text = f"{count['voted']} of {count['traces']} traces voted"
    text += f": {count['ended']} came to their end, {count['answered']} of them with an answer"
    if count["left_out"]:
        plain = isinstance(result.params, Offline)
        reason = "not among the surest" if plain else "below the threshold"
        text += f", {count['left_out']} of those {reason}"
    if result.done == "consensus" and (few := few_voters(count["voted"])):
        text += f"\n{few}"
    return text


def few_voters(count: int) -> str:
    """What is to be said where so few traces had voted when a consensus ended a run; "" of more."""
    if count >= 4:
        return ""
    voters = "one vote" if count == 1 else f"{count} votes"
    return f"the consensus is of {voters}: --min-voters asks for more, --no-consensus for all"


def _verdict(result, right: bool | None) -> str:
    judged = {None: "", True: " (right)", False: " (wrong)"}[right]
    if result.answer is not None:
        return f"answer: {result.answer}{judged}"
    if result.unfiltered.answer is None:
        return f"no answer: no trace that came to its end gave one{judged}"
    leader = result.unfiltered.candidates[0]
    return (
        f"no answer: no trace with a vote gave one; below the threshold {short(leader.answer)} "
        f"was the first of {len(result.unfiltered.candidates)}{judged}"
    )


def vote_table(result) -> list[str]:
    candidates = result.vote.candidates
    if not candidates:
        return []
    total = sum(candidate.weight for candidate in candidates)
    lines = [("answer", "traces", "weight", "share")]
    for answer, weight, traces in candidates[:_CANDIDATES]:
        share = f"{100 * weight / total:.1f} %" if total else "-"
        lines.append((short(answer), str(len(traces)), f"{weight:.2f}", share))
    text = aligned(lines, "lr")
    if len(candidates) > _CANDIDATES:
        text.append(f"and {len(candidates) - _CANDIDATES} more answers")
    return [*text, ""]


def spent(result) -> str:
    from ..reasoning import tokens_of_all

    everything = tokens_of_all(result)
    if result.done in ("all", "interrupted") or not everything:
        return f"{result.tokens:,} tokens"
    whole = everything / result.params.budget
    return (
        f"{result.tokens:,} tokens, {100 * (1 - result.tokens / everything):.1f} % fewer than the "
        f"{everything:,.0f} estimated for the whole budget ({result.params.budget} traces of "
        f"{whole:.1f} tokens, the mean of those that came to their end)"
    )


class View:
    """A live view on stderr, called after every step; a context manager.

    On a terminal a table (with rich) or a line that is written over; elsewhere a line per decision
    and every 10 s. Nothing with --quiet.
    """

    def __init__(self, args, tokenizer, extractor: str, out=None):
        from ..reasoning import make_extractor

        self._out = sys.stderr if out is None else out
        self._quiet = args.quiet
        self._tokenizer, self._extract = tokenizer, make_extractor(extractor)
        self._terminal = can_rewrite(self._out)
        self._live = None
        self._began = self._last = time.perf_counter()
        self._noted: dict[int, int] = {}  # by question: how much of its log was shown

    def __enter__(self) -> View:
        if self._terminal and not self._quiet:
            try:
                from rich.console import Console
                from rich.live import Live
            except ImportError:
                return self
            colors = "auto" if can_style(self._out) else None
            console = Console(file=self._out, color_system=colors)
            self._live = Live(console=console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(self, *error) -> None:
        if self._live is not None:
            self._live.stop()
        elif self._terminal and not self._quiet:
            progress("", self._out)

    def __call__(self, run) -> None:
        if self._quiet:
            return
        now = time.perf_counter()
        if not self._terminal:
            self._note_events(run)
        if now - self._last < (REFRESH if self._terminal else REPORT):
            return
        self._last = now
        if self._live is not None:
            self._live.update(self.table(run), refresh=True)
        elif self._terminal:
            progress("; ".join(status(q, self._rate(q)) for q in run.open[:1]), self._out)
        else:
            for question in run.open:
                self._say(question, status(question, self._rate(question)))

    def table(self, run):
        """The renderable of the questions under way; of one, its traces."""
        from rich.table import Table

        if len(run.open) > 1 or (run.open and run.open[0].name):
            table = Table(title=f"{run.asked} questions begun", title_justify="left")
            table.add_column("question", no_wrap=True, min_width=8)
            table.add_column("state", no_wrap=True)
            for question in run.open:
                table.add_row(question.name, status(question))
            return table
        if not run.open:
            return ""
        question = run.open[0]
        most = max(4, self._live.console.height - 7) if self._live is not None else 20
        table = Table(caption=status(question, self._rate(question)), caption_justify="left")
        for name in HEAD:
            right = name in ("trace", "tokens", "group", "mean")
            table.add_column(name, justify="right" if right else "left", no_wrap=True)
        for row in trace_rows(question, lambda number: self._read(run, number), most):
            table.add_row(*row[:-1], style="red" if row.low else None)
        return table

    def _read(self, run, number: int) -> str | None:
        tokens = run.engine.output(number).tokens[-_TAIL:]
        return self._extract(self._tokenizer.decode(tokens.tolist()))

    def _rate(self, question) -> float | None:
        return question.tokens / question.seconds if question.seconds > 0 else None

    def _note_events(self, run) -> None:
        for question in run.open:
            log = question.policy.log
            for event in log[self._noted.get(id(question), 0) :]:
                if event.what in _SHOWN and event.trace is None:
                    value = "" if event.value is None else f" {event.value:.3f}"
                    text = f"{event.what}{value} after {question.tokens:,} tokens"
                    self._say(question, text)
            self._noted[id(question)] = len(log)

    def _say(self, question, text: str) -> None:
        name = f"{question.name}: " if question.name else ""
        print(f"[{name}{text}]", file=self._out, flush=True)
