"""The options of a policy, the same for `think` and `replay`."""

from __future__ import annotations

import argparse
from typing import Any

from .common import counting

# Nats. A warm-up trace lies at the threshold itself, so that the rounding of batches of other
# widths (some 1e-6 in float32) decides about what is equal to it. A margin moves the edge away.
MARGIN = 1e-4
_OPTIONS = {
    "budget": (counting, "N", "most traces; default: {budget}"),
    "warmup": (counting, "N", "traces that run to their end first; 16"),
    "window": (counting, "N", "tokens in a group; default: {window}"),
    "tail": (counting, "N", "tokens in the tail; default: as the window"),
    "eta": (
        float,
        "P",
        "percentage of the warm-up at or above the threshold; low 10, high 90. Without DeepConf: "
        "of the traces that vote",
    ),
    "percentile": (float, "P", "where in the warm-up the threshold lies; default: 100 - eta"),
    "percentile_method": (str, "NAME", "between two traces, as in numpy; linear"),
    "margin": (
        float,
        "X",
        f"nats that a group must be below the threshold by; {MARGIN:g}, beyond what confidences "
        "differ by between batches",
    ),
    "tau": (float, "X", "share of a consensus; 0.95"),
    "min_voters": (counting, "N", "fewest voters of a consensus; 1"),
    "weight": (str, "NAME", "of a vote: a measure, or majority; lowest-group"),
    "k": (counting, "N", "likeliest tokens in a token's confidence; {k}"),
}
_FLAGS = {
    "no_consensus": ("tau", None, "go on to the end of the budget"),
    "no_filter": ("filter", False, "traces below the threshold vote too"),
    "no_filter_warmup": ("filter_warmup", False, "those of the warm-up do"),
}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_policy_options(group, **defaults: str) -> None:
    """defaults: what budget, window and k are where none is given."""
    for name, (kind, metavar, text) in _OPTIONS.items():
        group.add_argument(_flag(name), type=kind, metavar=metavar, help=text.format(**defaults))
    for name, (_, _, text) in _FLAGS.items():
        group.add_argument(_flag(name), action="store_true", help=text)


def given_options(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a `DeepConf` that the command line gives."""
    given = {name: getattr(args, name) for name in _OPTIONS}
    given = {name: value for name, value in given.items() if value is not None}
    for flag, (name, value, _) in _FLAGS.items():
        if getattr(args, flag):
            if name in given:
                raise ValueError(f"{_flag(flag)}: not with {_flag(name)}")
            given[name] = value
    return given
