"""Where results go: JSON lines in a file, a table or one JSON document on stdout.

Every line is one object with "record": "machine" (the card), "ceilings", "result" (one
implementation at one case, timed or not, with its "status"), "absent" (an implementation that takes
part in no case, with the reason), "skipped" (a whole case), "best" (of a tuning) or "end" (the
machine's state afterwards). Seconds, bytes and FLOPs are in base units.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .machine import Ceilings, checkout, short_name

FORMAT = 2  # 1 repeated in every case who is away
_COLUMNS = f"{'median':>11}  {'[p20, p80]':<21}{'GB/s':>8}{'GFLOP/s':>10}{'ceiling':>9}"
_NAME = 24  # the least width of the column of names


class Results:
    """Collects records; writes each to `path` as it comes, and text through `say`."""

    def __init__(self, path: Path | None, say: Callable[[str], None]):
        self.path, self.say, self.records = path, say, []
        self._file = None

    def __enter__(self) -> Results:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a", encoding="utf-8")
        return self

    def __exit__(self, *_) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        if self._file is not None:
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()

    def head(self, card: dict[str, Any], ceilings: Ceilings, conditions: dict[str, Any]) -> None:
        """The first two records: the machine, with the run's conditions, and its ceilings."""
        self.add({"record": "machine", "format": FORMAT, **card, "conditions": conditions})
        self.add({"record": "ceilings", **ceilings.to_json()})
        for key, value in card.items():
            if isinstance(value, dict):
                value = ", ".join(f"{name} {found}" for name, found in value.items())
            self.say(f"{key}: {value}")
        for key, value in conditions.items():
            self.say(f"{key}: {value}")
        for b in ceilings.bandwidths:
            self.say(
                f"measured ceiling, {b.size / 2**20:.0f} MiB: read {b.read / 1e9:.1f} GB/s, "
                f"copy {b.copy / 1e9:.1f} GB/s"
            )
        for dtype, rate in ceilings.matmul.items():
            name = str(dtype).removeprefix("torch.")
            self.say(f"measured ceiling, matrix product {name}: {rate / 1e9:,.0f} GFLOP/s")

    def absent(self, reasons: dict[str, str]) -> None:
        """Who takes part in no case, and why: names and reasons. Each is written once in a run."""
        said = {(r["implementation"], r["reason"]) for r in self.records if r["record"] == "absent"}
        groups: dict[str, list[str]] = {}
        for name, reason in reasons.items():
            if (name, reason) not in said:
                self.add({"record": "absent", "implementation": name, "reason": reason})
                groups.setdefault(reason, []).append(name)
        for reason, names in groups.items():
            self.say(f"not run: {', '.join(names)}: {reason}")

    def table(self, title: str, shared: dict[str, Any], parts: dict[str, dict[str, Any]]) -> None:
        """All implementations of one case: a record and a line of the table each."""
        self.say(f"\n{title}")
        width = max(_NAME, *(len(name) + 2 for name in parts))
        if any("percent_of_ceiling" in part for part in parts.values()):
            self.say(f"  {'':{width}}{_COLUMNS}")
        base = parts.get("torch", {}).get("seconds", {}).get("p50")
        for name, part in parts.items():
            if base and "seconds" in part:
                part["times_torch"] = base / part["seconds"]["p50"]
            self.add({"record": "result", **shared, "implementation": name, **part})
            self.say(line(name, part, width))

    def skipped(self, title: str, shared: dict[str, Any], reason: str) -> None:
        self.add({"record": "skipped", **shared, "reason": reason})
        self.say(f"\n{title}\n  skipped: {reason}")


def line(name: str, part: dict[str, Any], width: int = _NAME) -> str:
    """One implementation's line of the table."""
    if "seconds" not in part:
        status = {"absent": "not run", "wrong": "WRONG, not timed", "failed": "FAILED"}
        return f"  {name:{width}}{status[part['status']]}: {part['reason']}"
    s = part["seconds"]
    spread = f"[{shown(s['p20'])}, {shown(s['p80'])}]"
    text = f"  {name:{width}}{shown(s['p50']):>11}  {spread:<21}"
    if "percent_of_ceiling" in part:
        text += f"{three(part['bytes_per_second'] / 1e9):>8}"
        text += f"{three(part['flops_per_second'] / 1e9):>10}"
        text += f"{part['percent_of_ceiling']:>7.1f} %"
    if "times_torch" in part and name != "torch":
        text += f"  {part['times_torch']:.2f}x torch"
    if "tokens_per_second" in part:
        text += f"  {part['tokens_per_second']:,.1f} tokens/s"
    if "percent_of_reading" in part:
        text += f"  {part['percent_of_reading']['p50']:.0f} % of reading memory"
    for peer, s in part.get("speed_over", {}).items():
        text += f"  {s['p50']:.2f}x {peer} [{s['p20']:.2f}, {s['p80']:.2f}]"
    if "settings" in part:
        text += f"  ({part['settings']})"
    if "host_seconds" in part:
        text += f"  (launch {shown(part['host_seconds'])})"
    return text


def three(value: float) -> str:
    """A positive number with about three digits and no exponent."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:,.{digits}f}"


def shown(seconds: float) -> str:
    """Seconds with a unit."""
    for factor, unit in ((1e6, "us"), (1e3, "ms")):
        if seconds * factor < 1000:
            return f"{three(seconds * factor)} {unit}"
    return f"{three(seconds)} s"


def amount(value: float, unit: str) -> str:
    """A count with a decimal prefix: 25.2 MB, 137 GFLOP."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{three(value / factor)} {prefix}{unit}"
    return f"{three(value / 1e3)} k{unit}"


def default_path(card: dict[str, Any]) -> Path:
    """benchmarks/results/ of a checkout, otherwise the current folder."""
    root = checkout()
    folder = Path.cwd() if root is None else root / "benchmarks" / "results"
    return folder / f"{card['date'][:10]}-{short_name(card)}.jsonl"
