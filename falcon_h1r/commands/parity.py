"""`falcon-h1r parity`: every tensor beside float64 and another implementation."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from . import common
from .terminal import progress

DTYPES = ("float32", "bfloat16", "float16")


def add_to(commands) -> None:
    parser = commands.add_parser(
        "parity",
        help="errors of every tensor, beside float64 and another implementation",
        description="The relative error of every tensor to a float64 forward of the same weights, "
        "ours and another implementation's. Operators of your own (--ops MODULE:TABLE) are judged "
        "first, one by one, on small adversarial models and on this one. Exit status 0: ours is "
        "within its error budget at every tensor; 1: it is not, or an operator of your own is "
        "wrong; 2: refused.",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "-m",
        "--model",
        default=common.DEFAULT_MODEL,
        metavar="PATH_OR_REPO",
        help="checkpoint folder or hub repository id; default: the embedded h1r-pico",
    )
    source.add_argument(
        "--model-shape", metavar="PRESET", help="random weights in the shape of a released model"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub repository")
    parser.add_argument(
        "--against",
        metavar="WHAT",
        help="transformers, llama.cpp, or a dump FILE.safetensors or FILE.npz of another engine; "
        "default: transformers if it is installed",
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument(
        "--ops",
        nargs="+",
        default=["torch"],
        metavar="TABLE",
        help="operator tables: reference, torch, triton, or MODULE:TABLE of your own, from the "
        "current folder or an installed package; default: torch",
    )
    parser.add_argument(
        "--paths", nargs="+", choices=("prefill", "chunked", "decode", "padded"), default=None
    )
    parser.add_argument("--layers", nargs="+", type=int, metavar="N", help="default: all")
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="its tokens instead of random ones")
    parser.add_argument("--budget", metavar="FILE", help="a budget written before")
    parser.add_argument("--write-budget", metavar="FILE", help="measure the budget, write it, end")
    parser.add_argument(
        "--write-dump",
        metavar="FILE",
        help="write our tensors in the first of --dtype, --ops and --paths, and end",
    )
    parser.add_argument(
        "--out", metavar="FILE", help="the whole report: .md, .json, .html, .png, .svg or .pdf"
    )
    parser.add_argument(
        "--gradients",
        action="store_true",
        help="of each parameter instead: the error of its gradient of the mean loss of the text",
    )
    common.add_force(parser)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..study.parity_files import check_suffix, write_report
    from ..study.parity_render import as_json, as_text

    if args.out is not None:
        check_suffix(args.out)
    for option in ("out", "write_dump", "write_budget"):
        if (path := getattr(args, option)) is not None:
            common.check_target(f"--{option.replace('_', '-')}", path, args.force)
    tables = _tables(args)
    _quiet_transformers()
    model = _model(args)
    if args.gradients:
        return _gradients(args, model, tables)
    if args.write_dump is not None:
        return _write_dump(args, model, tables)
    if args.write_budget is not None:
        _budget(args, model, _inputs(args, model), tables).write(args.write_budget)
        return 0
    from ..study.parity import compare

    peer, inputs = _peer_and_inputs(args, model)
    checks = _checks(model, tables, args.dtype)
    if not args.json:
        for name, found in checks.items():
            print(f"{name}: {found!r}\n")
    for name, found in checks.items():
        if not found.runs:
            print(
                f"{name}: an operator raised or gave what cannot be compared; the model is not run "
                "under this table",
                file=sys.stderr,
            )
            del tables[name]
    if not tables:
        if args.json:
            print(json.dumps({"operators": _found(checks)}))
        return 1
    budget = _budget(args, model, inputs, tables)
    report = compare(
        model, inputs, args.dtype, tables, budget, peer, args.layers, progress=progress
    )
    progress("")
    facts = _facts(args, model, report, inputs, budget)
    in_json = facts
    if checks:
        facts = facts | {"operators": ", ".join(map(_line, checks, checks.values()))}
        in_json = facts | {"operators": _found(checks)}
    if args.out is not None:
        write_report(report, in_json if Path(args.out).suffix == ".json" else facts, args.out)
    print(as_json(report, in_json) if args.json else as_text(report, facts))
    return 1 if report.beyond or not all(checks.values()) else 0


def _gradients(args, model, tables) -> int:
    import torch

    from ..study.parity import make_inputs
    from ..study.parity_gradients import compare_gradients

    for option in ("paths", "layers", "budget", "write_budget", "write_dump", "out"):
        if getattr(args, option) is not None:
            raise ValueError(f"--{option.replace('_', '-')}: not with --gradients")
    if args.against not in (None, "transformers"):
        raise ValueError(f"--against {args.against}: gradients are compared with transformers'")
    if args.prompt is None:
        ids = make_inputs(model.config, "prefill", None).ids
    else:
        args.paths = ["prefill"]
        ids = _inputs(args, model)["prefill"].ids
    peer = args.against is not None or _has_transformers()
    found = [
        compare_gradients(model, ids, getattr(torch, dtype), tables, peer) for dtype in args.dtype
    ]
    if args.json:
        rows = [{**errors._asdict(), "beyond": errors.beyond} for errors in found]
        print(json.dumps({"input_ids": list(ids.shape), "gradients": rows}))
    else:
        b, l = ids.shape
        print(f"{args.model_shape or args.model}, {b} x {l} tokens; relative rms error to float64")
        for errors in found:
            print(f"\n{errors}")
    return 1 if any(errors.beyond for errors in found) else 0


def _has_transformers() -> bool:
    from importlib.util import find_spec

    return find_spec("transformers") is not None


def _found(checks: dict) -> dict:
    return {name: found.to_dict() for name, found in checks.items()}


def _line(name: str, found) -> str:
    return f"{name}: " + (f"{', '.join(found.wrong_calls)} wrong" if not found else "right")


def _checks(model, tables: dict, dtypes) -> dict:
    """The judgement of each table of the user's own, by its name."""
    from ..study import check

    own = {name: table for name, table in tables.items() if ":" in name}
    return {
        name: check(table, model, dtypes=dtypes, progress=progress) for name, table in own.items()
    }


def _quiet_transformers() -> None:
    """Its path without kernels, which is the one compared, comes with a warning per kernel."""
    import contextlib

    with contextlib.suppress(ImportError):
        from transformers.utils import logging

        logging.set_verbosity_error()


def stored_model(name: str, revision: str | None):
    """A checkpoint in the dtype in which it is stored."""
    from ..model import FalconH1ForCausalLM
    from ..ops import TORCH

    return FalconH1ForCausalLM.from_pretrained(name, ops=TORCH, revision=revision)


def _model(args):
    import torch

    from ..config import FalconH1Config
    from ..model import FalconH1ForCausalLM

    if args.model_shape is None:
        return stored_model(args.model, args.revision)
    if args.revision is not None:
        raise ValueError("--revision: not with --model-shape")
    from ..bench.weights import excite

    config = FalconH1Config.preset(args.model_shape)
    torch.manual_seed(0)
    model = FalconH1ForCausalLM(config).eval()
    ids = torch.arange(32)[None] % config.vocab_size
    excite(model, 0, lambda: model(ids))
    return model


def _tables(args) -> dict:
    return {name: _table(name) for name in dict.fromkeys(args.ops)}


def _table(name: str):
    if ":" in name:
        from ..study.operator_check import as_table
        from .user_code import load_object

        return as_table(load_object("--ops", name), f"--ops {name}")
    try:
        return common.operator_table(name, "cpu")
    except ValueError as error:
        raise ValueError(f"--ops: {error}; or MODULE:TABLE of your own") from error


def _paths(args) -> list[str]:
    return list(dict.fromkeys(args.paths or ("prefill", "chunked", "decode", "padded")))


def _inputs(args, model) -> dict:
    import torch

    from ..study.parity import make_inputs

    ids = None
    if args.prompt is not None:
        from ..text import load_tokenizer

        if args.model_shape is not None:
            raise ValueError("--prompt: a --model-shape has no tokenizer")
        tokenizer = load_tokenizer(model.source)
        ids = torch.tensor([tokenizer.encode(args.prompt)])
        if ids.numel() == 0:
            raise ValueError("--prompt is empty")
    return {path: make_inputs(model.config, path, ids) for path in _paths(args)}


def _peer_and_inputs(args, model):
    from ..study.doctor_evidence import values_dtype
    from ..study.dump import read_dump
    from ..study.parity import of_dump, transformers_peer

    what = args.against
    if what is None:
        try:
            return transformers_peer(), _inputs(args, model)
        except ValueError:
            return None, _inputs(args, model)
    if what == "transformers":
        return transformers_peer(), _inputs(args, model)
    if what == "llama.cpp":
        from ..study.peers_llama import llama_peer

        if args.paths is not None and set(args.paths) - {"prefill", "decode"}:
            raise ValueError("--against llama.cpp: its paths are prefill and decode")
        args.paths = args.paths or ["prefill", "decode"]
        return llama_peer(), _inputs(args, model)
    if not _is_dump(what):
        raise ValueError(
            f"--against {what}: expected transformers, llama.cpp or a file .safetensors or .npz"
        )
    if args.paths is not None or args.prompt is not None:
        raise ValueError("--against FILE: the dump says what was read; no --paths, no --prompt")
    dump = read_dump(what, model.config)
    values = list(dump.tensors.values())
    args.dtype = [str(dump.dtype or values_dtype(values)).removeprefix("torch.")]
    path = "prefill" if dump.inputs.mask is None else "padded"
    if dump.inputs.pieces is not None:
        path = "decode" if 1 in dump.inputs.pieces[1:] else "chunked"
    return of_dump(dump, Path(what).name), {path: dump.inputs}


def _is_dump(what: str | None) -> bool:
    return what is not None and Path(what).suffix in (".safetensors", ".npz")


def _budget(args, model, inputs, tables):
    from ..study.budget import make_budget, read_budget, shipped_budget
    from ..study.dump import compared_names

    if args.budget is not None:
        budget = read_budget(args.budget)
        if not budget.covers(args.dtype, inputs):
            raise ValueError(f"--budget {args.budget}: it lacks a dtype or path that is asked for")
        return budget
    plain = args.prompt is None and args.model_shape is None
    if plain and args.write_budget is None and not _is_dump(args.against):
        budget = shipped_budget(model)
        if budget is not None and budget.covers(args.dtype, inputs):
            return budget
    names = compared_names(model.config, args.layers)
    made_for = args.model_shape or args.model
    return make_budget(model, inputs, args.dtype, tables, made_for, names)


def _facts(args, model, report, inputs, budget) -> dict:
    import torch

    shapes = {tuple(given.ids.shape) for given in inputs.values()}
    measured = budget.made_for if budget.entries else ""
    return {
        "model": args.model_shape or args.model,
        "against": report.peer or "nothing",
        "torch": torch.__version__,
        "input_ids": ", ".join(f"{b} x {l}" for b, l in sorted(shapes)),
        "budget": f"twice what REFERENCE in the same dtype is off by, measured for {measured}",
    }


def _write_dump(args, model, tables) -> int:
    import torch

    from ..study.budget import rounded
    from ..study.dump import take_dump, write_dump
    from ..study.faults import Patient
    from ..taps import full_names

    path, dtype = _paths(args)[0], getattr(torch, args.dtype[0])
    table = tables[args.ops[0]]
    narrow = rounded(model, dtype)
    args.paths = [path]
    names = None if args.layers is None else full_names(model.config, None, args.layers)
    inputs = _inputs(args, model)[path]
    dump = take_dump(Patient(narrow, ops=table), narrow, inputs, names)
    write_dump(args.write_dump, dump)
    return 0
