"""What the commands share: options, the device, loading with a progress bar, sampling defaults."""

from __future__ import annotations

import argparse
import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..checks import check_text
from ..table_names import CPU_ONLY, NAMES
from .terminal import can_rewrite

if TYPE_CHECKING:
    from ..generation import SamplingParams
    from ..text import Tokenizer

DEFAULT_MODEL = "h1r-pico"
INTERRUPTED = 130  # exit status after Ctrl-C
DTYPES = ("float32", "bfloat16", "float16", "float64")
# Without a word from the user or the checkpoint: enough for a short trace, cut to what fits.
MAX_NEW_TOKENS = 1024
# Prompt tokens per forward: bounds the memory of a long prompt, a shorter one is read in one piece.
PREFILL_CHUNK = 4096
# Sampling options that are fields of SamplingParams, under the same names.
_SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "max_new_tokens",
    "seed",
    "thinking_budget",
)
COMPILING = "compiling the decode step, which takes some seconds or a minute"


def counting(text: str) -> int:
    """An integer >= 1, as an argparse type."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    if value >= 2**63:
        raise argparse.ArgumentTypeError(f"{text[:20]}... is beyond 64 bits")
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
    add_model_name(group)
    group.add_argument(
        "--dtype", choices=DTYPES, help="of the weights; default: as they are stored"
    )
    group.add_argument(
        "--device",
        help="a torch device, such as cpu or cuda:1; default: cuda where torch sees a GPU and the "
        "operator table and the other options run there, else cpu",
    )
    group.add_argument(
        "--ops",
        choices=NAMES,
        help="operator table; default: triton on a GPU, torch elsewhere. On a CPU, triton runs "
        "slowly, through Triton's interpreter",
    )
    return group


def add_model_name(parser) -> None:
    """--model and --revision, which `locate` reads."""
    parser.add_argument(
        "-m",
        "--model",
        default=DEFAULT_MODEL,
        metavar="PATH_OR_REPO",
        help=f"checkpoint folder or hub repository id; default: the embedded {DEFAULT_MODEL}",
    )
    add_revision(parser)


def add_revision(parser) -> None:
    parser.add_argument(
        "--revision", metavar="NAME", help="branch, tag or commit of a hub repository"
    )


def add_model_argument(parser, metavar: str, kinds: str) -> None:
    """The model as an argument or with -m, and --revision; `model_argument` reads the first two."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "model", nargs="?", metavar=metavar, help=f"{kinds}; default: the embedded {DEFAULT_MODEL}"
    )
    group.add_argument(
        "-m", "--model", dest="model_option", metavar=metavar, help="the same as the argument"
    )
    add_revision(parser)


def add_force(parser) -> None:
    parser.add_argument("--force", action="store_true", help="replace a file that is there")


def check_target(option: str, path: str | Path, force: bool) -> None:
    """Refuse a file that cannot be written, or is there and is not to be replaced, before work."""
    target = Path(path).expanduser()
    if target.is_dir():
        raise ValueError(f"{option}: {target} is a folder, expected a file")
    if not target.absolute().parent.is_dir():
        raise ValueError(f"{option}: {target.parent} is no folder")
    if os.path.lexists(target) and not force:
        raise ValueError(f"{option}: {target} exists; --force replaces it")


def model_argument(args: argparse.Namespace) -> str:
    return args.model or args.model_option or DEFAULT_MODEL


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "sampling",
        "Defaults of temperature, top-k, top-p, min-p, repetition penalty and length come from the "
        "checkpoint's generation_config.json where it has them.",
    )
    group.add_argument(
        "-n",
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"most new tokens; default: {MAX_NEW_TOKENS}, or what fits",
    )
    options = {
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

    options: further `SamplingParams` fields, where neither the checkpoint nor the user says
    otherwise. A sequence ends at any end token that config.json,
    generation_config.json or the tokenizer names: released checkpoints spread them over the three.
    """
    from ..checkpoint import end_token_ids, read_generation_config, resolve
    from ..checkpoint.hub import GENERATION_CONFIG
    from ..config import FalconH1Config
    from ..generation import SamplingParams
    from ..text import load_tokenizer

    for text in args.stop or ():
        check_text("--stop", text)
    folder = resolve(locate(args.model, args.revision), args.revision, weights=False)
    config, stored = FalconH1Config.from_pretrained(folder), read_generation_config(folder)
    tokenizer, place = load_tokenizer(folder), folder / GENERATION_CONFIG
    given = {name: value for name in _SAMPLING if (value := getattr(args, name)) is not None}
    ends = {*end_token_ids(config, stored, place), tokenizer.eos_token_id}
    params = SamplingParams(
        **{
            "max_new_tokens": MAX_NEW_TOKENS,
            **options,
            **_stored_defaults(stored, place, given),
            **given,
        },
        stop=tuple(args.stop or ()),
        stop_token_ids=tuple(sorted(ends - {None})),
    )
    return Request(tokenizer, params, "max_new_tokens" in given)


def _stored_defaults(stored: dict, place: Path, given: dict) -> dict:
    """The checkpoint's sampling for what was not given; errors name the file."""
    from ..checkpoint import sampling_defaults
    from ..generation import SamplingParams

    found = sampling_defaults(stored, place)
    found = {name: value for name, value in found.items() if name not in given}
    try:
        SamplingParams(**found)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    return found


def locate(model: str, revision: str | None = None) -> str | Path:
    """The folder of the embedded checkpoint for its name; any other name as it is."""
    from ..checkpoint import resolve

    return resolve(model, revision) if model == DEFAULT_MODEL else model


def settle_device(args: argparse.Namespace) -> None:
    """Put the default of --device in its place: cuda where that can be used, else cpu."""
    if args.device is None:
        import torch

        usable = torch.cuda.is_available() and not _bound_to_cpu(args)
        args.device = "cuda" if usable else "cpu"


def _bound_to_cpu(args: argparse.Namespace) -> str:
    """Why a GPU cannot serve what was asked for, or ""."""
    for option in ("compile", "int8"):
        if getattr(args, option, False):
            return f"--{option} is for a CPU"
    if args.ops in CPU_ONLY:
        return f"--ops {args.ops} is for a CPU"
    if args.ops is None and args.dtype != "float64" and find_spec("triton") is None:
        return "Triton is not installed; --device cuda --ops torch needs none"
    return ""


def describe(args: argparse.Namespace, model) -> str:
    """What runs where, as in `h1r-pico on cpu: float32, torch operators`."""
    import torch

    from ..ops import TORCH

    table = args.ops or ("torch" if model.ops is TORCH else "triton")
    dtype = str(model.dtype).removeprefix("torch.")
    text = f"{args.model} on {args.device}: {dtype}, {table} operators"
    if table == "triton" and os.environ.get("TRITON_INTERPRET"):
        text += ", interpreted and slow"
    if args.device == "cpu" and torch.cuda.is_available() and (reason := _bound_to_cpu(args)):
        text += f"; {reason}"
    return text


def load_model(args: argparse.Namespace):
    """Read the weights, with a progress bar on stderr if that is a terminal."""
    settle_device(args)
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

    print(f"[{COMPILING}]", file=sys.stderr, flush=True)
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
    if not can_rewrite(sys.stderr):
        return load(args.model, **options)
    from tqdm import tqdm

    with tqdm(desc="loading", unit="B", unit_scale=True, leave=False) as bar:

        def progress(done: int, total: int, name: str) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return load(args.model, progress=progress, **options)


def operator_table(name: str, device: str):
    """The table of an `--ops` option; kernels on a CPU are interpreted."""
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


def speed(out, seconds: float) -> str:
    """As in `12 tokens, 34.5 tokens/s`; seconds: since the first token, the prefill's own."""
    new = out.new_tokens
    decoded = sum(max(len(sequence) - 1, 0) for sequence in out.sequences)
    rate = f", {decoded / seconds:.1f} tokens/s" if decoded and seconds > 0 else ""
    return f"{new} token{'' if new == 1 else 's'}{rate}"
