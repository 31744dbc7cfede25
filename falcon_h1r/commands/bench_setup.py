"""What `falcon-h1r bench` was asked to measure: its options as objects, checked."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .common import DEFAULT_MODEL
from .user_code import load_object

FAMILY = "family"


def find_workloads(args: argparse.Namespace, device) -> list:
    from ..bench.registry import CPU_WORKLOADS, GPU_WORKLOADS, QUICK_WORKLOADS

    given = []
    for phase, texts in (
        ("prefill", args.prefill),
        ("resume", args.resume),
        ("decode", args.decode),
    ):
        given += [_workload(phase, text) for text in texts or ()]
    if given:
        return given
    if args.quick:
        return list(QUICK_WORKLOADS)
    return list(GPU_WORKLOADS if device.type == "cuda" else CPU_WORKLOADS)


def _workload(phase: str, text: str):
    """`BxL`, `BxL@P` or `B@N` as a workload."""
    from ..bench.registry import Workload

    form = {"prefill": "BxL", "resume": "BxL@P", "decode": "B@N"}[phase]
    rows, _, rest = text.partition("@" if phase == "decode" else "x")
    length, _, past = ("1", "", rest) if phase == "decode" else rest.partition("@")
    numbers = [rows, length] + ([] if phase == "prefill" else [past])
    if not all(number.isdecimal() for number in numbers) or (phase == "prefill" and "@" in rest):
        raise ValueError(f"--{phase} is {text!r}, expected {form}, all positive integers")
    values = [int(number) for number in numbers]
    if min(values) < 1 or (phase == "decode" and values[2] < 2):
        least = "; N is at least 2" if phase == "decode" else ""
        raise ValueError(f"--{phase} is {text!r}, expected {form}, all positive integers{least}")
    if phase == "decode":
        return Workload(phase, values[0], 1, values[2] - 1)
    return Workload(phase, *values)


def find_shapes(args: argparse.Namespace, device) -> dict[str, Any]:
    """Configs by the name that results will bear."""
    from ..bench.registry import FAMILY as FIVE
    from ..config import PRESETS, FalconH1Config

    if getattr(args, "model", None) is not None:
        if args.model_shape is not None:
            raise ValueError("--model-shape: not with --model, which has a shape of its own")
        return {args.model: FalconH1Config.from_pretrained(args.model, args.revision)}
    if getattr(args, "revision", None) is not None:
        raise ValueError("--revision: only with --model")
    on_cpu = args.bench == "generate" and device.type == "cpu"
    names = args.model_shape or ["falcon-h1-0.5b" if on_cpu else "falcon-h1r-7b"]
    names = [one for name in names for one in (FIVE if name == FAMILY else (name,))]
    found = {}
    for name in names:
        if name in PRESETS:
            found[name] = FalconH1Config.preset(name)
        elif name == DEFAULT_MODEL or Path(name).exists():
            found[name] = FalconH1Config.from_pretrained(name)
        else:
            known = ", ".join((*PRESETS, DEFAULT_MODEL, FAMILY))
            raise ValueError(f"--model-shape: {name!r} is neither a folder nor one of: {known}")
    return found


def check_memory(args: argparse.Namespace, device, shapes, workloads) -> None:
    """Refuse a model that cannot fit before minutes go by in filling memory."""
    import os

    import torch

    from ..bench.generation_bench import memory_bytes

    if device.type == "cuda":
        available = torch.cuda.get_device_properties(device).total_memory
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return
    for name, config in shapes.items():
        for dtype in args.dtype:
            needed = memory_bytes(config, workloads, getattr(torch, dtype))
            if needed > available:
                raise ValueError(
                    f"generate {name} {dtype}: weights and cache take {needed / 1e9:.1f} GB, "
                    f"{device} has {available / 1e9:.1f} GB; take a smaller --model-shape, or "
                    f"fewer rows with --prefill and --decode"
                )


def find_budget(args: argparse.Namespace):
    from ..bench.timing import FULL, QUICK

    budget = QUICK if args.quick else FULL
    for name in ("seconds", "limit"):
        if (given := getattr(args, name, None)) is None:
            continue
        if not 0 < given < float("inf"):
            raise ValueError(f"--{name} is {given}, expected a number above 0")
        budget = budget._replace(**{name: given})
    return budget


def find_dtypes(args: argparse.Namespace) -> list:
    import torch

    return [getattr(torch, name) for name in args.dtype]


def find_user_operators(args: argparse.Namespace) -> tuple:
    from ..bench.operators import OPERATORS
    from ..bench.user_operator import UserOperator

    found, known = [], ", ".join(OPERATORS)
    for text in args.impl:
        op, equals, place = text.rpartition("=")
        if not equals:
            if len(args.ops) != 1:
                raise ValueError(
                    f"--impl {text}: which operator is it? Write OP={text}; OP is one of: {known}"
                )
            op = args.ops[0]
        if op not in OPERATORS:
            raise ValueError(f"--impl {text}: no operator {op!r}; there are: {known}")
        function = load_object("--impl", place)
        if not callable(function):
            kind = type(function).__name__
            raise ValueError(f"--impl {place}: is of type {kind}, expected a function")
        found.append(UserOperator(op, place, function))
    if len({(one.op, one.name) for one in found}) < len(found):
        raise ValueError(f"--impl: the same function twice: {' '.join(args.impl)}")
    return tuple(found)


def find_cases(args: argparse.Namespace, device, own: set[str]) -> list:
    """Every case to be measured; own: operators of --impl, which alone are taken without --op."""
    from ..bench import axes, registry

    shapes, chosen = find_shapes(args, device), registry.select(args.ops)
    if own and not args.ops:
        chosen = [operator for operator in chosen if operator.name in own]
    if args.sizes:
        if args.prefill or args.resume or args.decode:
            raise ValueError("--sizes: not with --prefill, --resume or --decode")
        try:
            return [
                axes.sized(operator.name, sizes, name, config, dtype)
                for operator in chosen
                for sizes in map(axes.parse, args.sizes)
                for name, config in shapes.items()
                for dtype in find_dtypes(args)
            ]
        except ValueError as error:
            raise ValueError(f"--sizes: {error}") from None
    workloads = find_workloads(args, device)
    names = [operator.name for operator in chosen]
    found = registry.cases(list(shapes), args.ops, find_dtypes(args), workloads, shapes)
    if not (cases := [case for case in found if case.op in names]):
        those = ", ".join(sorted({w.phase for w in workloads}))
        raise ValueError(f"no case to measure: {', '.join(names)} has no {those} shapes")
    return cases
