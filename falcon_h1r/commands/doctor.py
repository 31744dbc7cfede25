"""`falcon-h1r doctor`: which known fault another implementation has."""

from __future__ import annotations

import argparse
import json

from . import common
from .parity import stored_model
from .terminal import progress


def add_to(commands) -> None:
    parser = commands.add_parser(
        "doctor",
        help="name the fault of another implementation from its tensors",
        description="Plants known faults in our model, one after another, and says which of them "
        "explains what another implementation computed. Exit status 0: no fault; 1: a fault, known "
        "or not; 2: refused.",
    )
    parser.add_argument(
        "--dump",
        action="append",
        metavar="FILE",
        help="tensors of the other implementation, .safetensors or .npz, in the format of "
        "`falcon-h1r parity --write-dump`: input_ids and any others, logits alone at the least; "
        "may be repeated, for a prefill, decode steps, padding",
    )
    parser.add_argument(
        "--gradients",
        metavar="FILE",
        help="gradients of the other implementation by parameter name, .safetensors, with "
        "input_ids: of the mean loss over all positions; a fault of its backward is named",
    )
    parser.add_argument(
        "-m",
        "--model",
        default=common.DEFAULT_MODEL,
        metavar="PATH_OR_REPO",
        help="what it computed with; default: the embedded h1r-pico",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub repository")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="that it computed in; default: what the dump says or its values show",
    )
    parser.add_argument(
        "--no-pairs", action="store_true", help="do not look for two faults at once"
    )
    parser.add_argument("--list", action="store_true", help="the known faults, and end")
    parser.add_argument(
        "--self-test", action="store_true", help="how often the doctor is right on planted faults"
    )
    parser.add_argument(
        "--pairs", type=int, default=60, metavar="N", help="pairs in the self-test; default: 60"
    )
    parser.add_argument(
        "--write-calibration", metavar="FILE", help="of the confidence, from the self-test"
    )
    common.add_force(parser)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.list:
        return _list(args)
    if args.self_test:
        return _self_test(args)
    if args.gradients is not None:
        return _gradients(args)
    if not args.dump:
        raise ValueError("--dump FILE is missing (or --list, or --self-test)")
    if args.write_calibration is not None:
        raise ValueError("--write-calibration: only with --self-test")
    import torch

    from ..config import FalconH1Config
    from ..study.doctor import diagnose
    from ..study.dump import read_dump

    config = FalconH1Config.from_pretrained(args.model, args.revision)
    dumps = [read_dump(path, config)._replace(source=path) for path in args.dump]
    model = stored_model(args.model, args.revision)
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    found = diagnose(dumps, model, dtype, pairs=not args.no_pairs, progress=progress)
    progress("")
    print(found.to_json() if args.json else found)
    return 0 if found.status == "no fault" else 1


def _gradients(args) -> int:
    from ..study.gradient_faults import diagnose_gradients, read_gradients

    for option in ("dump", "write_calibration"):
        if getattr(args, option) is not None:
            raise ValueError(f"--{option.replace('_', '-')}: not with --gradients")
    model = stored_model(args.model, args.revision)
    ids, gradients = read_gradients(args.gradients, model)
    narrow = args.dtype in ("bfloat16", "float16") or (
        args.dtype is None and any(g.dtype.itemsize < 4 for g in gradients.values())
    )
    found = diagnose_gradients(model, ids, gradients, 0.3 if narrow else 1e-3, progress)
    progress("")
    if args.json:
        print(json.dumps({**found._asdict(), "fault": found.fault}))
    else:
        print(found)
    return 0 if found.fault is None else 1


def _list(args) -> int:
    from ..study.faults_list import FAULTS

    if args.json:
        print(json.dumps([{"name": f.name, "needs": f.needs, "hint": f.hint} for f in FAULTS]))
        return 0
    for fault in FAULTS:
        print(f"{fault.name:42} {fault.needs:8} {fault.hint}")
    return 0


def _self_test(args) -> int:
    from ..study.doctor_check import as_json, self_test, summary, write_calibration

    if args.write_calibration is not None:
        common.check_target("--write-calibration", args.write_calibration, args.force)
    cases = self_test(pairs=args.pairs, progress=progress)
    progress("")
    if args.write_calibration is not None:
        write_calibration(cases, args.write_calibration)
    print(as_json(cases) if args.json else summary(cases))
    return 0
