"""Questions answered live: policies over a batched decode engine (`generation.Engine`).

`LiveRun` does for many questions at once what the loop in `online` does for one: free rows of the
engine go to the questions in the order in which they came, each step of the engine is cut by
question, every policy is told of its own tokens, and what it stops leaves the batch at once.

Which traces share a batch changes no decision but one: a consensus ends a question's traces when it
is reached, and how long those are by then depends on when they were started.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

import torch

from ..checks import check_integer
from ..generation import SamplingParams
from .confidence import WINDOW, token_confidence
from .online import INTERRUPTED, NATURAL, Ended, OnlinePolicy, OnlineResult
from .recorder import TraceRecorder
from .verifier import VERIFIER

# The paper's group of 2048 tokens is 1/32 of its longest trace, 64 Ki tokens.
_GROUPS, _LEAST_WINDOW = 32, 8


def fitting_window(max_new_tokens: int) -> int:
    """The paper's window, or its part of the longest trace where traces are shorter than there."""
    return max(_LEAST_WINDOW, min(WINDOW, max_new_tokens // _GROUPS))


def tokens_of_all(result: OnlineResult) -> float | None:
    """Estimate of what the whole budget run to its end would have taken.

    The budget times the mean length of the traces that came to their own end. Long traces are
    stopped more often than short ones, so it is more likely too low than too high. None where no
    trace came to its end.
    """
    lengths = [trace.tokens for trace in result.traces if trace.reason in NATURAL]
    return result.params.budget * sum(lengths) / len(lengths) if lengths else None


class Question:
    """One question of a `LiveRun`.

    prompt: 1-D token ids. policy: new, none of its traces started. sampling: how tokens are chosen;
    seeds and log-probabilities are the policy's, whatever stands there. recorder: new, or None.

    tokens: made so far. seconds: from its first trace to its end, or so far.
    """

    def __init__(
        self,
        prompt,
        policy: OnlinePolicy,
        sampling: SamplingParams | None = None,
        *,
        recorder: TraceRecorder | None = None,
        name: str = "",
    ):
        self.prompt = torch.as_tensor(prompt, dtype=torch.int64)
        self.policy = policy
        self.sampling = replace(sampling or SamplingParams(), logprobs=policy.params.k, seed=None)
        self.recorder = recorder
        self.name = name
        self.tokens = 0
        self.traces: dict[int, int] = {}  # of running traces: their numbers in the engine
        self._begun = self._ended = 0.0

    @property
    def seconds(self) -> float:
        return (self._ended or time.perf_counter()) - self._begun if self._begun else 0.0


class LiveRun:
    """Questions on one engine; `run` takes them to their end.

    engine: see `generation.Engine`; nothing else may step it meanwhile. questions: taken one by one
    as rows become free, so they may be made on demand. tokenizer: decodes finished traces where the
    engine has none. most_open: questions under way at a time; each holds its prompt's cache.

    open: questions under way, oldest first. done: those that came to their end, in that order, and
    were not handed to `run`'s on_done. asked: how many were taken.
    """

    def __init__(
        self, engine, questions: Iterable[Question], tokenizer=None, *, most_open: int = 16
    ):
        check_integer("most_open", most_open, 1)
        self.engine = engine
        self.open: list[Question] = []
        self.done: list[Question] = []
        self.asked = 0
        self._questions = iter(questions)
        self._tokenizer = tokenizer
        self._most_open = most_open
        self._owners: dict[int, tuple[Question, int]] = {}  # by number in the engine

    def run(
        self,
        on_step: Callable[[LiveRun], None] | None = None,
        on_done: Callable[[Question], None] | None = None,
    ) -> bool:
        """Step until nothing is left; whether Ctrl-C (KeyboardInterrupt) ended it before.

        on_step: called after every step; on_done: with each question when its policy is done, also
        when it was interrupted. Ctrl-C ends the questions under way with a result of what there is,
        and takes no further ones. On another exception the records are closed as interrupted, with
        the traces so far, and it is raised.
        """
        interrupted = False
        try:
            while self.step():
                self._hand_over(on_done)
                if on_step is not None:
                    on_step(self)
        except KeyboardInterrupt:
            interrupted = True
            self.interrupt()
            self._hand_over(on_done)
        except BaseException:
            for question in self.open:
                if question.recorder is not None:
                    with suppress(OSError):
                        question.recorder.close({"done": INTERRUPTED})
            raise
        return interrupted

    def step(self) -> bool:
        """One step of the engine; False where nothing was left to do.

        A KeyboardInterrupt comes out before or after, never between a step and its bookkeeping.
        """
        with _unbroken():
            self._admit()
        if not self.open:
            return False
        made = self.engine.step()
        if made is None:
            raise RuntimeError("the engine has nothing to do, and a question is not done")
        with _unbroken():
            self._settle(made)
        return True

    def interrupt(self) -> None:
        """End the questions under way, with what there is."""
        with _unbroken():
            for question in list(self.open):
                for trace in question.policy.interrupt():
                    if question.recorder is not None:
                        question.recorder.end(trace, INTERRUPTED)
                self._close(question)
            # The records are safe: whatever an engine interrupted in a step may say to this.
            self.engine.end(list(self._owners), INTERRUPTED)
            for number in self._owners:
                self.engine.pop(number)
            self._owners.clear()

    def _hand_over(self, on_done) -> None:
        with _unbroken():
            while on_done is not None and self.done:
                on_done(self.done.pop(0))

    def _admit(self) -> None:
        for question in self.open:
            self._start(question)
        while len(self.open) < self._most_open and self._room():
            question = next(self._questions, None)
            if question is None:
                return
            self.asked += 1
            self.open.append(question)
            question._begun = time.perf_counter()
            self.engine.hold(question.prompt)
            self._start(question)

    def _room(self) -> int:
        # Where nothing runs, one trace is always asked for: an engine that cannot have it says why.
        return self.engine.free or int(not self._owners)

    def _start(self, question: Question) -> None:
        policy = question.policy
        waiting = policy.waiting()
        if not waiting or not (new := policy.start(min(waiting, self._room()))):
            return
        seeds = [policy.seeds[trace] for trace in new]
        if question.recorder is not None:
            question.recorder.start(new, seeds)
        params = replace(question.sampling, n=len(new))
        for number, trace in zip(self.engine.add(question.prompt, params, seeds=seeds), new):
            self._owners[number] = question, trace
            question.traces[trace] = number

    def _settle(self, made) -> None:
        numbers = made.traces.tolist()
        rows: dict[Question, list[int]] = {}
        for row, number in enumerate(numbers):
            rows.setdefault(self._owners[number][0], []).append(row)
        for question, own in rows.items():
            self._tell(question, made, own, [numbers[row] for row in own])
        for question in rows:
            if question.policy.done:
                self._close(question)

    def _tell(self, question: Question, made, rows: list[int], numbers: list[int]) -> None:
        policy, recorder = question.policy, question.recorder
        traces = torch.tensor([self._owners[number][1] for number in numbers])
        places = torch.tensor(rows)
        tokens = made.tokens[places]
        top_ids, top_logprobs = made.top_ids[places], made.top_logprobs[places]
        confidence = token_confidence(top_logprobs, policy.params.k)
        finished = {
            self._owners[number][1]: Ended(made.finished[number], self._text(number))
            for number in numbers
            if number in made.finished
        }
        stops = policy.step(traces, tokens, confidence, finished)
        if recorder is not None:
            recorder.step(traces, tokens, confidence, top_ids, top_logprobs)
        question.tokens += len(numbers)
        for trace, reason in stops.items():
            self.engine.end([question.traces[trace]], reason)
            if recorder is not None:
                recorder.end(trace, reason)
        for trace, (reason, text) in finished.items():
            if recorder is not None:
                recorder.end(trace, reason, text, policy.answer(trace))
        for trace in (*stops, *finished):
            number = question.traces.pop(trace)
            self.engine.pop(number)
            del self._owners[number]

    def _text(self, number: int) -> str:
        """Of a trace that ended: without the stop token, up to the stop string."""
        output = self.engine.output(number)
        if output.text is not None:
            return output.text
        if self._tokenizer is None:
            raise ValueError("tokenizer: neither the engine nor the run has one to read answers by")
        tokens = output.tokens[:-1] if output.reason == "stop" else output.tokens
        return self._tokenizer.decode(tokens.tolist())

    def _close(self, question: Question) -> None:
        question._ended = time.perf_counter()
        self.open.remove(question)
        self.done.append(question)
        self.engine.release(question.prompt)
        if question.recorder is not None:
            result = question.policy.result()
            end = {"done": result.done, "answer": result.answer, "tokens": result.tokens}
            end["voted"] = sum(trace.weight is not None for trace in result.traces)
            question.recorder.close({**end, "seconds": question.seconds})


@contextmanager
def _unbroken() -> Iterator[None]:
    """Ctrl-C waits until the block is over. In the main thread only: elsewhere there is none.

    Comparisons of answers that are under way are cut: the exact rule decides them.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    caught: list[tuple] = []

    def catch(*arguments) -> None:
        caught.append(arguments)
        VERIFIER.cancel()

    signal.signal(signal.SIGINT, catch)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        VERIFIER.cancel(False)
    if caught:
        before(*caught[0])
