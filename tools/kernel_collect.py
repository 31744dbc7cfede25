"""Compiles cases and gathers one row per launched kernel, in one process or in several."""

import multiprocessing
import os
import tempfile

# What is compiled when no dtype is asked for: of float16 the default, as it mostly differs from
# bfloat16 in the types of its instructions only; of float32 the default and what no other dtype
# uses. Cases of further options: the defaults in 16 bits.
DTYPES = ("bfloat16", "float16", "float32")


def plan(names, config="", dtype=""):
    """(case index, dtype, configuration names) of everything to compile.

    names: families, none for all. The empty configuration name is the launcher's own choice.
    """
    import torch
    from kernel_launches import CASES

    unknown = set(names or ()) - {case.name for case in CASES}
    if unknown:
        known = ", ".join(dict.fromkeys(case.name for case in CASES))
        raise ValueError(f"no kernel {min(unknown)!r}; there are: {known}")
    for index, case in enumerate(CASES):
        if names and case.name not in names:
            continue
        try:
            table = case.table
        except Exception:  # shows as a failed compilation
            yield index, dtype or "bfloat16", [config]
            continue
        for kind in (dtype,) if dtype else DTYPES[:2] if case.options else DTYPES:
            served = [entry for entry in table if getattr(torch, kind) in entry.dtypes]
            if case.options and not config:
                served = []
            elif not (dtype or config or kind == "bfloat16"):
                served = [entry for entry in served if torch.bfloat16 not in entry.dtypes]
            chosen = [e.name for e in served if not config or e.name == config]
            if config and not chosen:
                continue
            yield index, kind, chosen if config else ["", *chosen]


def compiled_rows(index, dtype, configs, target):
    """Rows of one case under several configurations, for one target.

    The launcher's own choice, the empty name, comes first: its kernels are the defaults, and what
    a named configuration compiles beside them is a row of that name. A binary has one row.
    """
    import torch
    from kernel_compile import compiling
    from kernel_inspect import facts
    from kernel_launches import CASES

    case, kind = CASES[index], getattr(torch, dtype)
    head = {"case": case.name, "shape": case.shape, "dtype": dtype, "target": target}
    if case.options:
        head["options"] = case.options
    rows, seen = [], set()
    for config in configs:
        with compiling(target) as launches:
            try:
                case.launch(kind, config)
            except Exception as error:  # a failed compilation is a finding, not an accident
                first = str(error).partition("\n")[0]
                text = f"{type(error).__name__}: {first}"
                rows.append(head | {"config": config, "default": config == "", "error": text})
                if config == "":
                    return rows  # the named ones would say the same
        for one in launches:
            if (one.compiled.hash, one.grid) in seen:
                continue
            seen.add((one.compiled.hash, one.grid))
            own = {
                "config": config or _name([e for e in case.table if kind in e.dtypes], one),
                "default": config == "",
                "kernel": one.kernel,
                "grid": list(one.grid),
                "meta": {name: _plain(value) for name, value in one.meta.items()},
            }
            rows.append(head | own | facts(one.compiled, target) | {"seconds": one.seconds})
    return rows


def _name(table, launched):
    """The configuration that a launch was made with: of those that agree, the most detailed."""
    metadata = launched.compiled.metadata
    agreeing = [
        entry
        for entry in table
        if entry.meta.items() <= launched.meta.items()
        and (entry.num_warps, entry.num_stages) == (metadata.num_warps, metadata.num_stages)
    ]
    return max(agreeing, key=lambda entry: len(entry.meta)).name if agreeing else "default"


def _plain(value):
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def _job(arguments):
    return compiled_rows(*arguments)


def collect(names, targets, config="", dtype="", workers=1, defaults=()):
    """Rows in the order of the cases, whatever order they were compiled in; an iterator.

    defaults: targets for which default configurations alone are compiled.
    """
    jobs = [
        (index, kind, configs[:1] if target in defaults else configs, target)
        for index, kind, configs in plan(names, config, dtype)
        for target in targets
    ]
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("TRITON_CACHE_DIR", folder)
        if workers == 1:
            for job in jobs:
                yield from compiled_rows(*job)
            return
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            for rows in pool.imap(_job, jobs):
                yield from rows
