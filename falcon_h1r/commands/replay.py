"""`falcon-h1r replay`: policies applied to recorded traces, without a model."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace as changed

from ..tables import aligned
from .common import check_target, counting
from .policy import MARGIN, add_policy_options, given_options
from .terminal import print_json
from .think_view import few_voters, short


def add_to(commands) -> None:
    parser = commands.add_parser(
        "replay",
        help="apply voting and stopping policies to recorded traces",
        description="Apply policies to recorded traces, without a model: what each would have "
        "answered, and how many tokens it would have spent. A folder of records is one table over "
        "all of them.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="a trace record, or a folder of them")
    parser.add_argument(
        "--policy",
        action="append",
        metavar="NAME",
        help="majority, a vote weighted by mean, lowest-group, bottom-10 or tail, deepconf-low, "
        "deepconf-high, one of these with -authors, which no consensus ends, or deepconf with "
        "--eta; may be repeated; default: the recorded run's own, "
        "or majority",
    )
    parser.add_argument("--compare", action="store_true", help="all policies, one row each")
    numbers = parser.add_argument_group("numbers of the policies, as `think` has them")
    add_policy_options(
        numbers,
        budget="as many as there are",
        window="the recorded run's, or 2048",
        k="the record's, and no other",
    )
    numbers.add_argument(
        "--parallel",
        type=counting,
        metavar="N",
        help="traces that run side by side where a run is simulated; default: all",
    )
    answers = parser.add_argument_group("answers")
    answers.add_argument(
        "--rule", choices=("auto", "exact", "math-verify"), help="default: the record's own"
    )
    answers.add_argument(
        "--extractor",
        metavar="SPEC",
        help="read the answers anew: boxed, number, choice, line, several with commas, or "
        "re:PATTERN; default: as recorded",
    )
    source = parser.add_argument_group("traces from elsewhere")
    source.add_argument(
        "--from-openai",
        metavar="FILE",
        help="first make FOLDER from chat/completions responses with logprobs and top_logprobs 20",
    )
    source.add_argument("--reference", metavar="TEXT", help="the right answer, for --from-openai")
    source.add_argument(
        "--allow-fewer",
        action="store_true",
        help="with --from-openai: use what there is where a token has fewer than 20",
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument(
        "--plot",
        metavar="FILE",
        help="picture of one record's confidences under the policy; with --compare, of the "
        "accuracy of all policies against their tokens",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..reasoning import find_records, read_record

    if args.plot is not None:
        from ..reasoning.plot import check_picture

        check_picture(args.plot)
        check_target("--plot", args.plot, force=True)
    _import(args)
    folders = find_records(args.folder)
    records = [read_record(folder, tensors=False) for folder in folders]
    for record in records:
        for note in record.notes:
            print(f"[{note}]", file=sys.stderr)
    if args.plot is not None:
        _check_plot(args, records)
    equalities = [_equality(record, args.rule) for record in records]
    _remark(records, equalities)
    table = []
    for name, eta in _names(args, records):
        table.append(_row(args, name, eta, records, equalities))
        for result in table[-1]["results"]:
            if result.done == "consensus" and (text := few_voters(_voters(result))):
                print(f"[{table[-1]['policy']}: {text}]", file=sys.stderr)
    if args.json:
        print_json(_document(args, records, equalities, table))
    else:
        print(_render(table, records))
    if args.plot is not None:
        _plot(args, table, records, equalities)
    return 0


def _check_plot(args: argparse.Namespace, records) -> None:
    if args.compare:
        if any(record.manifest.reference is None for record in records):
            raise ValueError("--plot: accuracy needs a reference in every record")
    elif len(records) > 1 or len(args.policy or ()) > 1:
        raise ValueError("--plot: of one record and one policy, or with --compare")


def _plot(args: argparse.Namespace, table: list[dict], records, equalities) -> None:
    from ..reasoning import Offline, make_extractor
    from ..reasoning.plot import FIRST, Point, plot_accuracy, plot_confidence

    if not args.compare:
        (record,), (result,) = records, table[0]["results"]
        if args.extractor is not None:
            extract = make_extractor(args.extractor)
            traces = [
                changed(t, answer=extract(t.text) if t.whole else None) for t in record.traces
            ]
            record = changed(record, traces=traces)
        policy = _policy(args, *_names(args, records)[0], record)
        plot_confidence(
            record,
            args.plot,
            window=policy.window,
            result=result.online,
            answer=result.answer,
            equality=equalities[0],
        )
        return
    table = [row for row in table if not row["refused"]]
    first = Offline(budget=1)
    if table and all(record.traces and record.traces[0].whole for record in records):
        results = [_replay(args, first, r, e) for r, e in zip(records, equalities)]
        table = [{"policy": FIRST, "results": results}, *table]
    points = [
        Point(
            row["policy"],
            sum(result.right for result in row["results"]),
            len(records),
            sum(result.tokens for result in row["results"]),
        )
        for row in table
    ]
    plot_accuracy(points, args.plot, f"{len(records)} questions")


def _import(args: argparse.Namespace) -> None:
    if args.from_openai is None:
        if args.reference is not None or args.allow_fewer:
            raise ValueError("--reference, --allow-fewer: only with --from-openai")
        return
    from ..reasoning import Equality, Manifest, import_responses

    manifest = Manifest(
        reference=args.reference,
        extractor=args.extractor or "boxed",
        rule=Equality(args.rule or "auto").rule,
    )
    record = import_responses(args.from_openai, args.folder, manifest, allow_fewer=args.allow_fewer)
    if (least := record.manifest.k_least) is not None:
        print(
            f"[{args.folder}: confidences of as few as {least} log-probabilities, not "
            f"{record.manifest.k}: not comparable with others]",
            file=sys.stderr,
        )


def _equality(record, rule: str | None):
    from ..reasoning import Equality

    return Equality(record.manifest.rule if rule is None else rule)


def _voters(result) -> int:
    """How many traces had voted when the run was over."""
    return sum(len(candidate.traces) for candidate in result.vote.candidates)


def _remark(records, equalities) -> None:
    """What a reader of the table must know."""
    open_ended = sum(not record.complete for record in records)
    if open_ended:
        print(f"[{open_ended} of {len(records)} records were cut short]", file=sys.stderr)
    pairs = {(r.manifest.rule, e.rule) for r, e in zip(records, equalities)}
    for recorded, used in sorted(pairs):
        if recorded != used:
            print(f"[answers compared by {used}; recorded by {recorded}]", file=sys.stderr)


def _names(args: argparse.Namespace, records) -> list[tuple[str | None, float | None]]:
    """(policy, eta) of each row; a policy of None is the recorded run's own."""
    from ..reasoning import MEASURES, DeepConf, recorded_policy

    if args.compare:
        if args.policy:
            raise ValueError("--compare: has all policies, --policy one; give one of the two")
        etas = (10.0, 90.0) if args.eta is None else (args.eta,)
        rows = [("majority", None), *((name, None) for name in MEASURES)]
        rows += [(name, eta) for eta in etas for name in MEASURES]
        if args.eta is not None:
            rows.append(("deepconf", args.eta))
        else:
            rows += [("deepconf-low", None), ("deepconf-high", None)]
        if all(isinstance(recorded_policy(record), DeepConf) for record in records):
            rows.insert(0, (None, None))  # a plain run is one of the rows below
        return rows
    if args.policy:
        return [(name, args.eta) for name in args.policy]
    own = all(record.manifest.policy is not None for record in records)
    if own and args.eta is None:
        return [(None, None)]
    return [("majority", args.eta)]


def _row(args, name: str | None, eta: float | None, records, equalities) -> dict:
    """A policy over all records; with --compare what refuses is a row that says why."""
    row = {"policy": "recorded" if name is None else name, "eta": eta, "results": []}
    for record, equality in zip(records, equalities):
        try:
            policy = _policy(args, name, eta, record)
            result = _replay(args, policy, record, equality)
        except ValueError as error:
            if not args.compare:
                raise
            return {**row, "policy": _label(row), "results": [], "refused": str(error)}
        row["results"].append(result)
    return {**row, "policy": _label(row), "refused": None}


def _label(row: dict) -> str:
    return row["policy"] if row["eta"] is None else f"{row['policy']}, eta {row['eta']:g}"


def _policy(args, name: str | None, eta: float | None, record):
    from ..reasoning import DeepConf, make_policy, recorded_policy

    own, given = recorded_policy(record), given_options(args)
    if given.pop("k", record.manifest.k) != record.manifest.k:
        raise ValueError(f"--k: the record has confidences of k {record.manifest.k} alone")
    if name is None and isinstance(own, DeepConf):
        return changed(own, **given)
    if name is None:
        keep = {"keep": given.pop("eta")} if "eta" in given else {}
        _refuse_online(given, own.weight)
        return changed(own, **given, **keep)
    if own is not None and args.window is None:
        given["window"] = own.window
    given.pop("eta", None)
    if eta is not None:
        given["eta"] = eta
    if not name.startswith("deepconf"):
        if args.compare:
            # A row of the comparison has what it has; the other rows take the rest.
            given = {key: given[key] for key in ("window", "tail", "budget", "eta") if key in given}
        elif args.no_consensus:
            raise ValueError(f"--no-consensus: the policy {name} has none, the online ones have")
        return make_policy(name, **given)
    policy = changed(make_policy(name, **{"margin": MARGIN, **given}), k=record.manifest.k)
    if args.no_consensus:
        policy = changed(policy, tau=None)
    if args.budget is None and len(record.traces) >= policy.warmup:
        # As many as there are; too few for the warm-up are refused by the replay.
        policy = changed(policy, budget=min(policy.budget, len(record.traces)))
    return policy


def _refuse_online(given: dict, name: str) -> None:
    for option in given:
        if option not in ("window", "tail", "budget"):
            raise ValueError(f"{option}: the policy {name} has none, the online ones have")


def _replay(args, policy, record, equality):
    from ..reasoning import replay

    return replay(
        record, policy, parallel=args.parallel, equality=equality, extractor=args.extractor
    )


def _total(results, name: str) -> int | None:
    values = [getattr(result, name) for result in results]
    return None if not values or None in values else sum(values)


def _render(table: list[dict], records) -> str:
    one = len(records) == 1
    head = ["policy", "answer" if one else "answered", "right", "tokens", "of all", "traces"]
    lines = [[*head, "stopped", "cut", "order"]]
    for row in table:
        results = row["results"]
        if row["refused"]:
            lines.append([row["policy"], *["-"] * 8])
            continue
        tokens, all_tokens = _total(results, "tokens"), _total(results, "all_tokens")
        answer = results[0].answer
        answered = f"{sum(r.answer is not None for r in results)}/{len(results)}"
        lines.append(
            [
                row["policy"],
                short(answer, "none") if one else answered,
                _right(results, one),
                str(tokens),
                f"{100 * tokens / all_tokens:.1f} %" if all_tokens else "-",
                *(str(_total(results, name)) for name in ("traces", "stopped", "cut")),
                "/".join(sorted({result.order or "-" for result in results})),
            ]
        )
    reasons = dict.fromkeys(row["refused"] for row in table if row["refused"])
    return "\n".join([*aligned(lines), *(f"-: {reason}" for reason in reasons)])


def _right(results, one: bool) -> str:
    known = [result.right for result in results if result.right is not None]
    if not known:
        return "-"
    return ("yes" if known[0] else "no") if one else f"{sum(known)}/{len(known)}"


def _document(args, records, equalities, table: list[dict]) -> dict:
    about = [
        {
            "folder": str(record.folder),
            "question": record.manifest.question,
            "reference": record.manifest.reference,
            "traces": len(record.traces),
            "tokens": record.tokens,
            "complete": record.complete,
            "rule": equality.rule,
            "recorded_rule": record.manifest.rule,
        }
        for record, equality in zip(records, equalities)
    ]
    policies = [{**row, "results": [_result(r) for r in row["results"]]} for row in table]
    return {"folder": args.folder, "records": about, "policies": policies}


def _result(result) -> dict:
    values = {
        name: getattr(result, name)
        for name in "answer right tokens all_tokens traces stopped cut done order".split()
    }
    values["share"] = result.vote.share
    values["voters"] = _voters(result)
    values["candidates"] = [candidate._asdict() for candidate in result.vote.candidates]
    values["online"] = None if result.online is None else result.online.to_dict()
    return values
