"""What the commands share: options, loading with a progress bar, sampling defaults, output."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TextIO

if TYPE_CHECKING:
    from ..generation import SamplingParams
    from ..text import Tokenizer

DEFAULT_MODEL = "h1r-pico"
DTYPES = ("float32", "bfloat16", "float16", "float64")
# Without a word from the user or the checkpoint: enough for a short trace, cut to what fits.
MAX_NEW_TOKENS = 1024
# Prompt tokens per forward: bounds the memory of a long prompt, a shorter one is read in one piece.
PREFILL_CHUNK = 4096
# Options whose default a checkpoint's generation_config.json may set.
_FROM_CHECKPOINT = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")

_DIM, _NORMAL = "\x1b[2m", "\x1b[0m"


def counting(text: str) -> int:
    """An integer >= 1, as an argparse type."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def add_model_options(parser: argparse.ArgumentParser) -> None:
    group = add_checkpoint_options(parser)
    group.add_argument(
        "--check", action="store_true", help="refuse weights that hold NaN or infinities"
    )
    group.add_argument(
        "--fold",
        action="store_true",
        help="fold the multipliers into the weights: fewer products, each weight rounded once more",
    )
    group.add_argument(
        "--no-onednn",
        action="store_true",
        help="on a CPU, linear layers as torch has them rather than through oneDNN",
    )
    group.add_argument(
        "--int8",
        action="store_true",
        help="on a CPU, linear layers in int8: a quarter of float32's memory and faster, each "
        "product with an error of about one per cent",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="on a CPU, compile the decode step: some seconds first, then about twice the "
        "tokens/s; needs a C++ compiler, and room to hold bfloat16 weights twice",
    )


def add_checkpoint_options(parser: argparse.ArgumentParser):
    """Which weights, where and how; returns the group, for more of its kind."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="PATH_OR_REPO",
        help="checkpoint folder or hub repository id; default: the embedded h1r-pico",
    )
    group.add_argument("--revision", help="branch, tag or commit of a hub repository")
    group.add_argument(
        "--dtype", choices=DTYPES, help="of the weights; default: as they are stored"
    )
    group.add_argument("--device", default="cpu", help="a torch device; default: cpu")
    group.add_argument(
        "--ops",
        choices=("torch", "reference", "triton"),
        help="operator table; default: triton on a GPU, torch elsewhere. On a CPU, triton runs "
        "slowly, through Triton's interpreter",
    )
    return group


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "sampling",
        "Defaults of temperature, top-k, top-p, min-p, repetition penalty and length come from the "
        "checkpoint's generation_config.json where it has them.",
    )
    options = {
        "--max-new-tokens": (int, f"most new tokens; default: {MAX_NEW_TOKENS}, or what fits"),
        "--temperature": (float, "0 takes the likeliest token; default: 0"),
        "--top-k": (int, "keep the k likeliest tokens; 0: off"),
        "--top-p": (float, "keep the likeliest tokens that sum to p; 1: off"),
        "--min-p": (float, "keep tokens at least p times as likely as the likeliest; 0: off"),
        "--repetition-penalty": (float, "divide logits of tokens in prompt and output; 1: off"),
        "--presence-penalty": (float, "subtract from logits of tokens in the output"),
        "--frequency-penalty": (float, "the same, times their count"),
        "--seed": (int, "of the random numbers; default: a fresh one, reported on stderr"),
        "--thinking-budget": (int, "new tokens after which an open <think> block is closed"),
    }
    for name, (kind, help_text) in options.items():
        metavar = "N" if kind is int else "X"
        group.add_argument(name, type=kind, metavar=metavar, help=help_text)
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="end before this text; may be repeated"
    )


class Request(NamedTuple):
    """A checkpoint's tokenizer and sampling defaults: all that is cheap, checked first."""

    tokenizer: Tokenizer
    params: SamplingParams
    max_new_given: bool


def prepare(args: argparse.Namespace, **options) -> Request:
    """Find the checkpoint and build the sampling parameters; no weights are read yet.

    options: further `SamplingParams` fields. A sequence ends at any end token that config.json,
    generation_config.json or the tokenizer names: released checkpoints spread them over the three.
    """
    from ..checkpoint import end_token_ids, read_generation_config, resolve
    from ..config import FalconH1Config
    from ..generation import SamplingParams
    from ..text import load_tokenizer

    folder = resolve(locate(args.model, args.revision), args.revision, weights=False)
    config, stored = FalconH1Config.from_pretrained(folder), read_generation_config(folder)
    tokenizer = load_tokenizer(folder)
    for name in _FROM_CHECKPOINT:
        value = getattr(args, name)
        value = stored.get(name) if value is None else value
        if value is not None:
            options[name] = value
    if stored.get("do_sample") is False and args.temperature is None:
        options["temperature"] = 0.0
    for name in ("presence_penalty", "frequency_penalty", "seed", "thinking_budget"):
        if (value := getattr(args, name)) is not None:
            options[name] = value
    given = args.max_new_tokens is not None
    longest = args.max_new_tokens if given else stored.get("max_new_tokens", MAX_NEW_TOKENS)
    ends = {*end_token_ids(config, stored), tokenizer.eos_token_id}
    params = SamplingParams(
        max_new_tokens=longest,
        stop=tuple(args.stop or ()),
        stop_token_ids=tuple(sorted(ends - {None})),
        **options,
    )
    return Request(tokenizer, params, given)


def locate(model: str, revision: str | None = None) -> str | Path:
    """The folder of the embedded checkpoint for its name; any other name as it is."""
    from ..checkpoint import resolve

    return resolve(model, revision) if model == DEFAULT_MODEL else model


def load_model(args: argparse.Namespace):
    """Read the weights, with a progress bar on stderr if that is a terminal."""
    if args.compile:
        _check_compile(args)
    model = _read_model(args)
    if args.fold:
        from ..checkpoint import fold_multipliers

        model = fold_multipliers(model)
    from ..cpu.onednn import unusable, use_onednn

    if args.int8:
        from ..cpu import use_int8

        return use_int8(model)
    reason = "--no-onednn was given" if args.no_onednn else unusable(model)
    if reason and args.compile:
        raise ValueError(f"--compile: its linear layers come with oneDNN's, and {reason}")
    return model if reason else use_onednn(model, stream=args.compile)


def compile_step(args: argparse.Namespace, model, rows: int) -> bool | None:
    """`graph` of `generate`: with --compile the decode step, compiled before its time counts."""
    if not args.compile:
        return None
    import torch

    from ..cpu import CompiledStep

    start = time.perf_counter()
    cache = model.new_cache(rows, 4)
    cache.lengths += 2
    CompiledStep(model, cache)(torch.zeros(rows, dtype=torch.int64))
    print(f"[decode step compiled in {time.perf_counter() - start:.1f} s]", file=sys.stderr)
    return True


def _check_compile(args: argparse.Namespace) -> None:
    """Refuse before the weights are read."""
    from ..cpu import require_compiler

    if args.int8:
        raise ValueError("--compile: torch.compile takes no int8 layers; leave out --int8")
    if args.ops not in (None, "torch"):
        raise ValueError(f"--compile: compiles the operators of torch, --ops is {args.ops}")
    require_compiler()


def _read_model(args: argparse.Namespace):
    from ..model import FalconH1ForCausalLM

    load = FalconH1ForCausalLM.from_pretrained
    options = {
        "dtype": args.dtype,
        "device": args.device,
        "revision": args.revision,
        "check": args.check,
        "ops": None if args.ops is None else operator_table(args.ops, args.device),
    }
    if not sys.stderr.isatty():
        return load(args.model, **options)
    from tqdm import tqdm

    with tqdm(desc="loading", unit="B", unit_scale=True, leave=False) as bar:

        def progress(done: int, total: int, name: str) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return load(args.model, progress=progress, **options)


def operator_table(name: str, device: str):
    """The table of an `--ops` option; kernels on a CPU are interpreted."""
    import os

    from ..ops import table

    if name == "triton" and device == "cpu":
        # Triton reads it once, when it is imported.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    return table(name)


def fit(params: SamplingParams, given: bool, prompt_tokens: int, limit: int) -> SamplingParams:
    """Shorten a default max_new_tokens to what fits behind the prompt; one that was given stays."""
    from dataclasses import replace

    room = limit - prompt_tokens
    if given or room < 1 or params.max_new_tokens <= room:
        return params
    return replace(params, max_new_tokens=room)


class Display:
    """Writes text as it comes: raw, but on a terminal thinking is dimmed and without its tags."""

    def __init__(self, out: TextIO, opened: bool):
        from ..text import ThinkSplitter

        self._out, self._tail, self._written = out, "", 0
        self._splitter = ThinkSplitter(opened) if out.isatty() else None
        self._last: str | None = None

    def write(self, text: str) -> None:
        self._written += len(text)
        if self._splitter is None:
            self._put(text)
        else:
            self._show(self._splitter.push(text))
        self._out.flush()

    def close(self, text: str) -> None:
        """Write what is missing of the whole text, and end its last line.

        An interrupted sequence has text held back: half a character, or what might have become a
        stop string.
        """
        self.write(text[self._written :])
        if self._splitter is not None:
            self._show(self._splitter.flush())
        if not self._tail.endswith("\n"):
            self._put("\n")
        self._out.flush()

    def _show(self, pieces) -> None:
        for kind, text in pieces:
            if self._last not in (None, kind):
                text = "\n\n" + text.removeprefix("\n\n")
            self._last = kind
            self._put(f"{_DIM}{text}{_NORMAL}" if kind == "thinking" else text)

    def _put(self, text: str) -> None:
        self._tail = text[-1:] or self._tail
        self._out.write(text)


def opens_thinking(prompt: str) -> bool:
    """Whether a rendered prompt leaves the model inside a think block."""
    from ..text.think import OPEN

    return prompt.rstrip().endswith(OPEN)


def speed(out, seconds: float) -> str:
    """As in `12 tokens, 34.5 tokens/s`; seconds: since the first token, the prefill's own."""
    new = out.new_tokens
    decoded = sum(max(len(sequence) - 1, 0) for sequence in out.sequences)
    rate = f", {decoded / seconds:.1f} tokens/s" if decoded and seconds > 0 else ""
    return f"{new} token{'' if new == 1 else 's'}{rate}"
