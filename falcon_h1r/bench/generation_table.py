"""The Markdown table of `bench generate`: the best of ours at each work, beside the peers."""

from __future__ import annotations

from typing import Any

from .contestants import INT8, PEERS
from .report import shown

_CASE = ("model", "dtype", "phase", "batch", "length", "past")
_COLUMNS = ("ours", "tokens/s", *(c for peer in PEERS for c in (peer, "ratio")), "of the ceiling")


def markdown(records: list[dict[str, Any]]) -> str:
    """One table per model and dtype, a row per case in the records' order; "" without a result.

    A ratio is the peer's time over ours, round by round: median [p20, p80]. The last column is the
    least time that the machine allows over ours: by the ceilings measured before, or, where steps
    took turns with reading memory, by what reading as many bytes took in the same rounds.
    """
    cases: dict[tuple, dict[str, dict[str, Any]]] = {}
    for record in records:
        if record.get("bench") == "generate":
            case = tuple(record[key] for key in _CASE)
            people = cases.setdefault(case, {})
            if record["record"] == "result":
                people[record["implementation"]] = record
    lines, last = [], None
    for case, people in cases.items():
        if case[:2] != last:
            last = case[:2]
            lines += ["", f"{last[0]}, {last[1]}:", "", _row(("", *_COLUMNS))]
            lines.append(_row(("---", *["---:"] * len(_COLUMNS))))
        lines.append(_row((work(*case[2:]), *_cells(people))))
    return "\n".join(lines).strip()


def work(phase: str, batch: int, length: int, past: int) -> str:
    """A workload in words."""
    rows = f"{batch} x " if batch > 1 else ""
    if phase == "decode":
        return f"decode {rows}1 behind {past:,}"
    return f"prefill {rows}{length:,}" + (f" behind {past:,}" if past else "")


def _cells(people: dict[str, dict[str, Any]]) -> list[str]:
    timed = {name: part for name, part in people.items() if "seconds" in part}
    own = [part for name, part in timed.items() if name not in (INT8, *PEERS)]
    if not own:
        return ["not run", *[""] * (len(_COLUMNS) - 1)]
    best = min(own, key=lambda part: part["seconds"]["p50"])
    cells = [f"{shown(best['seconds']['p50'])} ({best['implementation']})"]
    cells.append(f"{best['tokens_per_second']:,.1f}")
    for peer in PEERS:
        if peer in timed:
            s = best["speed_over"][peer]
            cells.append(shown(timed[peer]["seconds"]["p50"]))
            cells.append(f"**{s['p50']:.2f}** [{s['p20']:.2f}, {s['p80']:.2f}]")
        else:
            cells += ["not run", ""]
    reading = best.get("percent_of_reading")
    share = best["percent_of_ceiling"] if reading is None else reading["p50"]
    return [*cells, f"{share:.0f} %"]


def _row(cells) -> str:
    return f"| {' | '.join(cells)} |"
