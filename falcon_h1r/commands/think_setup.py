"""What `falcon-h1r think` is asked for, checked before any weights are read."""

from __future__ import annotations

import argparse
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..checks import check_text
from . import common
from .policy import MARGIN, given_options
from .prompt import check_system, has_prompt, read_prompt, render
from .questions import Entry, read_questions, with_suffix

if TYPE_CHECKING:
    from ..generation import SamplingParams
    from ..reasoning import DeepConf, Equality, Manifest, Offline
    from ..text import Tokenizer

# Where neither the user nor the checkpoint says otherwise: the paper's, of most of its models.
TEMPERATURE, TOP_P = 0.6, 0.95
SAMPLES = 64  # of plain sampling
_UNITS = {"": 1, **{f"{p}B": 1000**i for i, p in enumerate(["", "k", "M", "G", "T"])}}
_UNITS.update({f"{p}iB": 1024**i for i, p in enumerate(["K", "M", "G", "T"], start=1)})


class Asked(NamedTuple):
    """A question with its prompt. name: "" of a single one. seed: of its first trace. id: of the
    data set."""

    name: str
    text: str
    reference: str | None
    prompt: str
    ids: list[int]
    seed: int
    folder: Path | None
    id: str | None = None


class Setup(NamedTuple):
    """notes: what the user should know before it starts."""

    tokenizer: Tokenizer
    sampling: SamplingParams
    params: DeepConf | Offline
    k: int
    equality: Equality
    questions: list[Asked]
    notes: list[str]

    def manifest(self, args: argparse.Namespace, asked: Asked) -> Manifest:
        from ..reasoning import Manifest

        sampling = asdict(self.sampling)
        for name in ("n", "seed", "logprobs", "stop_token_ids"):  # stands elsewhere, or is k
            del sampling[name]
        return Manifest(
            k=self.k,
            question=asked.text,
            prompt=asked.prompt,
            prompt_tokens=len(asked.ids),
            reference=asked.reference,
            model=args.model,
            sampling=sampling,
            seed=asked.seed,
            stop_token_ids=list(self.sampling.stop_token_ids),
            extractor=args.extractor,
            rule=self.equality.rule,
            policy=self.params.to_dict(),
        )

    def policy(self, args: argparse.Namespace, asked: Asked):
        from ..reasoning import DeepConf, OnlinePolicy, PlainPolicy

        options = {
            "seed": asked.seed,
            "equality": self.equality,
            "extractor": args.extractor,
            "stop_token_ids": self.sampling.stop_token_ids,
        }
        if isinstance(self.params, DeepConf):
            return OnlinePolicy(self.params, **options)
        return PlainPolicy(self.params, k=self.k, **options)


def memory_size(text: str) -> int:
    """Bytes, as an argparse type: `8GiB`, `512 MB`, `1000000`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not match or match[2] not in _UNITS:
        units = ", ".join(unit for unit in _UNITS if unit)
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number and one of {units}")
    return int(float(match[1]) * _UNITS[match[2]])


def prepare(args: argparse.Namespace) -> Setup:
    """Raises ValueError for whatever can be known to be wrong without the weights."""
    from ..config import FalconH1Config
    from ..generation import derive_seeds
    from ..reasoning import DeepConf, Equality, make_extractor

    texts = _texts(args)
    make_extractor(args.extractor)
    equality = Equality(args.rule)
    _check_files(args)
    check_system(args)
    request = common.prepare(args, temperature=TEMPERATURE, top_p=TOP_P)
    config = FalconH1Config.from_pretrained(args.model, args.revision)
    tokenizer, sampling = request.tokenizer, request.params
    if sampling.temperature == 0 and args.temperature is None:
        sampling = replace(sampling, temperature=TEMPERATURE)  # of a checkpoint that is greedy
    rendered = [render(tokenizer, text, args.raw, args.system) for _, (text, _, _) in texts]
    longest = max(len(ids) for _, ids in rendered)
    limit = config.max_position_embeddings
    sampling = common.fit(sampling, request.max_new_given, longest, limit)
    for (name, _), (_, ids) in zip(texts, rendered):
        _check_length(name, len(ids), sampling.max_new_tokens, limit)
    params, k, notes = _policy(args, sampling.max_new_tokens)
    if k > config.vocab_size:
        raise ValueError(f"k is {k}, the vocabulary has {config.vocab_size} tokens")
    if args.record_top is not None and not 0 <= args.record_top <= k:
        raise ValueError(f"--record-top is {args.record_top}, expected 0 .. {k}, which is k")
    if sampling.temperature == 0 and params.budget > 1:
        raise ValueError("temperature is 0: all traces would be the same; a vote needs one above 0")
    if args.questions is not None and args.seed is None:
        sampling = replace(sampling, seed=0)  # a run that is taken up again must have the same
    # As a batch of prompts has them in `generate`, so that no two traces of a run share one.
    seeds = derive_seeds(replace(sampling, n=params.budget), len(texts))[:: params.budget]
    questions = [
        Asked(name, entry.text, entry.reference, prompt, ids, seed, _folder(args, name), entry.id)
        for (name, entry), (prompt, ids), seed in zip(texts, rendered, seeds)
    ]
    if isinstance(params, DeepConf) and params.window >= sampling.max_new_tokens:
        notes.append(
            f"window {params.window}: no trace fills it before its last token, number "
            f"{sampling.max_new_tokens}, so none is ever stopped"
        )
    return Setup(tokenizer, sampling, params, k, equality, questions, notes)


def _texts(args: argparse.Namespace) -> list[tuple[str, Entry]]:
    """The name and the entry of each question."""
    if args.prompt_suffix is not None:
        check_text("--prompt-suffix", args.prompt_suffix)
    if args.questions is None:
        text = with_suffix(read_prompt(args, "question"), args.prompt_suffix)
        return [("", Entry(text, args.reference))]
    if has_prompt(args, "question"):
        raise ValueError("a question: not with --questions")
    for name in ("reference", "plot"):  # of one question
        if getattr(args, name) is not None:
            raise ValueError(f"--{name}: not with --questions")
    entries = read_questions(args.questions, args.prompt_suffix)
    return [(f"q{number:05}", entry) for number, entry in entries.items()]


def _check_files(args: argparse.Namespace) -> None:
    from ..reasoning.plot import check_picture
    from ..reasoning.traces import LINES, MANIFEST

    if args.plot is not None:
        check_picture(args.plot)
        common.check_target("--plot", args.plot, force=True)
    if args.record is None:
        if args.record_top is not None:
            raise ValueError("--record-top: only with --record")
        return
    folder = Path(args.record)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--record: {folder} is no folder")
    if (folder / MANIFEST).exists() or (folder / LINES).exists():
        raise ValueError(f"--record: {folder} already holds a trace record")


def _folder(args: argparse.Namespace, name: str) -> Path | None:
    return None if args.record is None else Path(args.record) / name


def _check_length(name: str, prompt: int, new: int, limit: int) -> None:
    if prompt + new > limit:
        raise ValueError(
            f"{name or 'the question'}: {prompt} tokens with its template, and {new} new ones, "
            f"are more than max_position_embeddings {limit}"
        )


def _policy(args: argparse.Namespace, longest: int) -> tuple[DeepConf | Offline, int, list[str]]:
    """The policy, its k, and what is to be said of them."""
    from ..reasoning import MEASURES, PRESETS, DeepConf, Offline, fitting_window
    from ..reasoning.confidence import TOP_K, WINDOW
    from ..reasoning.deepconf import MAJORITY

    given = given_options(args)
    notes = []
    if "window" not in given and (window := fitting_window(longest)) != WINDOW:
        given["window"] = window
        notes.append(
            f"window {window}: a group of {WINDOW} is for traces of up to 64 Ki tokens; "
            f"these have at most {longest}"
        )
    plain = args.policy in (MAJORITY, *MEASURES)
    if not plain:
        if args.policy is not None and args.preset is not None:
            raise ValueError("--policy, --preset: give one of the two")
        named = args.preset or (args.policy or "deepconf-low").removeprefix("deepconf").strip("-")
        base = PRESETS[named] if named else DeepConf()
        params = replace(base, **{"margin": MARGIN, **given})
        if params.margin == 0:
            notes.append(
                "margin 0: the rounding of a confidence may decide which traces stop, and it "
                "differs between numbers of rows and pieces of a prompt"
            )
        return params, params.k, notes
    if args.preset is not None:
        raise ValueError(f"--preset: of DeepConf, the policy is {args.policy}")
    k = given.pop("k", TOP_K)
    keep = given.pop("eta", None)
    budget = given.pop("budget", SAMPLES)
    offline = {name: given.pop(name) for name in ("window", "tail") if name in given}
    if given:
        option = next(iter(given)).replace("_", "-")
        raise ValueError(f"--{option}: the policy {args.policy} has none, the online ones have")
    keep_by = "lowest-group" if args.policy == MAJORITY and keep is not None else None
    params = Offline(weight=args.policy, keep=keep, keep_by=keep_by, budget=budget, **offline)
    if keep is None and args.policy == MAJORITY:
        notes = []  # no measure counts
    return params, k, notes
