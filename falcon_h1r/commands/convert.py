"""`falcon-h1r convert`: a model as a GGUF file for llama.cpp, or in another dtype or folded."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from .common import DTYPES, add_model_argument, locate, model_argument
from .terminal import print_json

GGUF_DTYPES = ("float32", "bfloat16")


def add_to(commands) -> None:
    parser = commands.add_parser(
        "convert",
        help="write a model as GGUF or safetensors",
        description="Write a model for llama.cpp (GGUF, multipliers folded into the weights), or "
        "as a checkpoint folder in another dtype or folded. Nothing half-written is left behind.",
    )
    add = parser.add_argument
    add_model_argument(parser, "MODEL", "checkpoint folder or hub repository id")
    add("--to", choices=("gguf", "safetensors"), required=True, help="what is written")
    add("--out", type=Path, required=True, metavar="PATH", help="the file or folder to write")
    add(
        "--dtype",
        choices=DTYPES,
        help="of the weights; default: as they are stored. GGUF: float32 or bfloat16",
    )
    add("--fold", action="store_true", help="safetensors: fold the multipliers into the weights")
    add(
        "--no-vocabulary",
        action="store_true",
        help="GGUF: leave the tokenizer out; the file then takes token ids only",
    )
    add("--force", action="store_true", help="replace what is at PATH, if it is of that kind")
    add("--json", action="store_true", help="one JSON document on stdout in place of a line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import torch

    from ..checkpoint import fold_multipliers, resolve, save, save_gguf, stored_dtype
    from ..checkpoint.errors import CheckpointError
    from ..model import FalconH1ForCausalLM

    args.model = model_argument(args)
    args.out = args.out.expanduser()
    _check(args)
    folder = resolve(locate(args.model, args.revision), args.revision)
    load = FalconH1ForCausalLM.from_pretrained
    dtype = stored_dtype(folder) if args.dtype is None else getattr(torch, args.dtype)
    if args.to == "gguf":
        name = str(dtype).removeprefix("torch.")
        if name not in GGUF_DTYPES:
            raise ValueError(f"the weights are stored as {name}: give --dtype float32 or bfloat16")
        model = load(folder)
        tokenizer = (folder / "tokenizer.json").is_file() and not args.no_vocabulary
        try:
            save_gguf(model, args.out, dtype, folder if tokenizer else None)
        except CheckpointError as error:
            text = str(error).replace("without tokenizer_from", "with --no-vocabulary")
            raise ValueError(text) from error
        notes = ["folded", "with its vocabulary" if tokenizer else "without a vocabulary"]
    else:
        model = load(folder, dtype=dtype)
        if args.fold:
            model = fold_multipliers(model)
        save(model, args.out)
        notes = ["folded"] if args.fold else []
    kind = str(dtype).removeprefix("torch.")
    size = _size(args.out)
    if args.json:
        written = {"out": str(args.out), "format": args.to, "dtype": kind, "bytes": size}
        print_json(written | {"notes": notes})
    else:
        details = ", ".join([f"{size / 1e6:,.1f} MB", kind, *notes])
        print(f"{args.model} -> {args.out}: {args.to}, {details}")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse before anything is read."""
    if args.to == "gguf":
        if args.dtype is not None and args.dtype not in GGUF_DTYPES:
            raise ValueError(
                f"--dtype is {args.dtype}, GGUF files are written as float32, bfloat16"
            )
        if args.fold:
            raise ValueError("--fold: a GGUF file is always folded")
    elif args.no_vocabulary:
        raise ValueError("--no-vocabulary: only with --to gguf")
    empty = args.out.is_dir() and not any(args.out.iterdir()) and args.to == "safetensors"
    if os.path.lexists(args.out) and not empty and not args.force:
        raise ValueError(f"{args.out} exists; --force replaces it")


def _size(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())
