"""`falcon-h1r chat`: a conversation in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from dataclasses import replace

from ..checks import check_text
from . import common
from .prompt import opens_thinking
from .terminal import Display

HELP = "/system TEXT sets the system message (nothing: none), /reset forgets all turns, /exit ends"


def add_to(commands) -> None:
    parser = commands.add_parser(
        "chat",
        help="a conversation in the terminal",
        description=f"Chat with a model. {HELP}; so does the end of input. Ctrl-C ends an answer, "
        "which is kept as far as it came.",
    )
    parser.add_argument("--system", metavar="TEXT", help="system message")
    common.add_model_options(parser)
    common.add_sampling_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.system is not None:
        check_text("--system", args.system)
    request = common.prepare(args)
    if not request.tokenizer.chat_templates:
        raise ValueError("chat: this checkpoint has no chat template")
    model = common.load_model(args)
    print(f"[{common.describe(args, model)}]", file=sys.stderr, flush=True)
    chat = Conversation(
        model,
        request.tokenizer,
        request.params,
        request.max_new_given,
        args.system,
        graph=common.compile_step(args, model, 1),
    )
    typed = sys.stdin.isatty()
    if typed:
        # input() edits lines once this is imported; where it does not exist, the console does it.
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401

        print(HELP, file=sys.stderr)
    while True:
        try:
            line = input("> " if typed else "").strip()
        except EOFError:
            if typed:
                print()
            return 0
        if line == "/exit":
            return 0
        if line == "/reset":
            chat.reset()
        elif line == "/system" or line.startswith("/system "):
            _set_system(chat, line.removeprefix("/system").strip() or None)
        elif line.startswith("/"):
            print(f"unknown command {line.split()[0]}; {HELP}", file=sys.stderr)
        elif line:
            _turn(chat, line)


def _set_system(chat: Conversation, text: str | None) -> None:
    try:
        check_text("the system message", text or "")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return
    chat.system = text
    chat.reset()
    done = "removed" if text is None else "set"
    print(f"[system message {done}, conversation forgotten]", file=sys.stderr)


def _turn(chat: Conversation, line: str) -> None:
    start = first = time.perf_counter()
    try:
        answer = chat.ask(line)
    except ValueError as error:  # such as a conversation longer than the model's positions
        print(f"error: {error}", file=sys.stderr)
        return
    except KeyboardInterrupt:
        print("[interrupted while reading the prompt]", file=sys.stderr)
        return
    display = Display(sys.stdout, answer.opened)
    try:
        for step in answer.run:
            if step.position == 0:
                first = time.perf_counter()
            display.write(step.text.get(0, ""))
    except KeyboardInterrupt:
        pass
    end = time.perf_counter()
    out = chat.keep(answer)
    display.close(out.texts[0])
    again = ""
    if answer.reused < answer.comparable:
        again = ", the rest again: the template renders earlier turns differently"
    print(
        f"[{common.speed(out, end - first)}; prompt {len(answer.ids)} tokens, {answer.reused} from "
        f"the cache{again}; {first - start:.2f} s; {out.finish_reasons[0]}]",
        file=sys.stderr,
    )


class Answer:
    """One turn under way.

    opened: the prompt ends inside a think block. reused: prompt tokens taken from what was kept;
    comparable: tokens that were kept.
    """

    def __init__(self, run, cache, ids: list[int], opened: bool, reused: int, comparable: int):
        self.run, self.cache, self.ids, self.opened = run, cache, ids, opened
        self.reused, self.comparable = reused, comparable


class Conversation:
    """Messages, and what the model remembers of them.

    An SSM state cannot be cropped, and a template may render an earlier turn differently from how
    it was generated (the released one drops its reasoning). So two states are kept after each turn:
    at the end of the prompt, and at the end of the answer. The next prompt goes on from the longest
    one whose tokens it begins with, or from nothing.
    """

    def __init__(
        self, model, tokenizer, params, max_new_given: bool, system: str | None, graph=None
    ):
        self._model, self._tokenizer, self._graph = model, tokenizer, graph
        self._params, self._max_new_given = params, max_new_given
        self.system = system
        self.reset()

    def reset(self) -> None:
        """Forget all turns; the next one starts with the system message, if there is one."""
        self._messages = []
        if self.system is not None:
            self._messages = [{"role": "system", "content": self.system}]
        self._kept: list[tuple[list[int], object]] = []
        self._turns = 0

    def ask(self, text: str) -> Answer:
        """Add a user's message and prepare the answer; `keep` it afterwards.

        Raises ValueError, and adds nothing, when the template or the model's length refuses it.
        """
        from ..generation import stream

        check_text("the message", text)
        messages = [*self._messages, {"role": "user", "content": text}]
        rendered = self._tokenizer.apply_chat_template(messages)
        ids = self._tokenizer.encode(rendered, add_special_tokens=False)
        limit = self._model.config.max_position_embeddings
        params = common.fit(self._params, self._max_new_given, len(ids), limit)
        if params.seed is not None:
            params = replace(params, seed=(params.seed + self._turns) % 2**63)
        if len(ids) + params.max_new_tokens > limit:
            raise ValueError(
                f"the conversation has {len(ids)} tokens, and with {params.max_new_tokens} new "
                f"ones more than the model's {limit}; /reset starts a new one"
            )
        cache = self._model.new_cache(1, len(ids) + params.max_new_tokens)
        reused = self._recall(ids, cache)
        comparable = max((len(held) for held, _ in self._kept), default=0)
        self._read(ids[reused:-1], cache)
        self._kept = [(ids[:-1], cache.snapshot())]
        run = stream(
            self._model, [ids], params, tokenizer=self._tokenizer, cache=cache, graph=self._graph
        )
        self._messages = messages
        self._turns += 1
        opened = opens_thinking(rendered)
        return Answer(run, cache, ids, opened, reused, comparable)

    def keep(self, answer: Answer):
        """Add an answer, whole or broken off, to the conversation; returns its `GenerateOutput`."""
        from ..text import split_thinking

        out = answer.run.result()
        if out.new_tokens == 0:
            self._messages.pop()
            return out
        thinking, said = split_thinking(out.texts[0], answer.opened or None)
        message = {"role": "assistant", "content": said, "reasoning_content": thinking}
        self._messages.append(message)
        if out.finish_reasons[0] != "interrupted":
            # After an interruption the cache may be anywhere inside a step.
            held = answer.ids + out.sequences[0].tolist()[:-1]
            self._kept.append((held, answer.cache.snapshot()))
        return out

    def _recall(self, ids: list[int], cache) -> int:
        """Restore the longest kept state that `ids` begins with; returns its number of tokens."""
        fitting = [
            (held, snapshot)
            for held, snapshot in self._kept
            if len(held) < len(ids) and ids[: len(held)] == held and held
        ]
        if not fitting:
            return 0
        held, snapshot = max(fitting, key=lambda kept: len(kept[0]))
        cache.restore(snapshot)
        return len(held)

    def _read(self, ids: list[int], cache) -> None:
        import torch

        with torch.no_grad():
            for start in range(0, len(ids), common.PREFILL_CHUNK):
                piece = torch.tensor([ids[start : start + common.PREFILL_CHUNK]])
                self._model(piece.to(self._model.device), cache=cache, logits_to_keep=1)
