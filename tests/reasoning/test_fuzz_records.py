"""Records and imported responses that somebody damaged or forged: read, or refused in one line."""

import hashlib
import json
import shutil

import pytest
from hostile import change_bytes, change_json, count_outcomes
from reasoning.synthetic import make_pool, run_live
from reasoning.test_openai import choice, response

from falcon_h1r.reasoning import DeepConf, Manifest, import_responses, read_record, replay
from falcon_h1r.reasoning.traces import LINES, MANIFEST, check_of, file_name

QUICK, SLOW = 60, 2_500
PARAMS = DeepConf(k=4, window=6, warmup=4, budget=10, eta=20.0, tau=0.9)


def sealed(text: str) -> bytes:
    """With the check of what it says now, where JSON can say it."""
    try:
        values = json.loads(text)
        values.pop("check")
        content = {k: v for k, v in values.items() if k not in ("format", "version")}
        return json.dumps({**values, "check": check_of(content)}).encode()
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError):
        return text.encode()


def changed(draw, raw: bytes) -> bytes:
    if draw.random() < 0.3:
        return change_bytes(draw, raw)
    return sealed(change_json(draw, json.loads(raw)))


def read(folder) -> None:
    record = read_record(folder)
    replay(record, PARAMS)


def manifest(folder):
    raw = (folder / MANIFEST).read_bytes()

    def case(draw):
        (folder / MANIFEST).write_bytes(changed(draw, raw))
        read(folder)

    return case


def lines(folder):
    raw = (folder / LINES).read_bytes().splitlines(keepends=True)

    def case(draw):
        new, at = list(raw), draw.randrange(len(raw))
        new[at] = changed(draw, raw[at]) + b"\n" * (draw.random() < 0.9)
        if draw.random() < 0.1:
            draw.shuffle(new)
        (folder / LINES).write_bytes(b"".join(new))
        read(folder)

    return case


def tensors(folder):
    """A trace's file, to which its line is made to fit."""
    raw = (folder / LINES).read_bytes().splitlines(keepends=True)
    at = next(i for i, line in enumerate(raw) if b'"trace": 2' in line)
    path, line = folder / file_name(2), json.loads(raw[at])
    content = path.read_bytes()

    def case(draw):
        length = int.from_bytes(content[:8], "little")
        made = change_bytes(draw, content, first=8 + length)
        if draw.random() < 0.5:
            header = change_json(draw, json.loads(content[8 : 8 + length])).encode()
            made = len(header).to_bytes(8, "little") + header + content[8 + length :]
        path.write_bytes(made)
        new = {k: v for k, v in line.items() if k != "check"}
        new["sha256"] = hashlib.sha256(made).hexdigest()
        new = json.dumps({**new, "check": check_of(new)}).encode() + b"\n"
        (folder / LINES).write_bytes(b"".join([*raw[:at], new, *raw[at + 1 :]]))
        read(folder)

    return case


def responses(folder):
    rows = [[-0.25, -1.5, -2.25, -4.0]] * 3
    document = response(choice(rows, r"so \boxed{5}"), choice(rows[:1], "no", "length"))
    path, out = folder / "responses.jsonl", folder / "out"

    def case(draw):
        text = change_json(draw, document)
        content = change_bytes(draw, text.encode()) if draw.random() < 0.2 else text.encode()
        path.write_bytes(json.dumps(document).encode() + b"\n" + content + b"\n")
        try:
            import_responses(path, out, Manifest(k=4))
            read_record(out)
        except (ValueError, OSError) as error:
            assert not out.exists() or not any(out.glob("*.safetensors")), "left behind"
            raise type(error)(f"{folder} {error}") from error
        finally:
            shutil.rmtree(out, ignore_errors=True)

    return case


KINDS = [manifest, lines, tensors, responses]


def check(kind, cases, tmp_path, capsys):
    run_live(make_pool(3, 10), PARAMS, tmp_path / "run", slots=3, chaos=5, reference="5")
    outcomes = count_outcomes(kind.__name__, cases, kind(tmp_path / "run"))
    assert outcomes.total() == cases and outcomes["refused"] > cases // 5
    with capsys.disabled():
        print(f"\n{kind.__name__}: {cases} cases, {outcomes['refused']} refused")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_some_records(kind, tmp_path, capsys):
    check(kind, QUICK, tmp_path, capsys)


@pytest.mark.slow  # thousands of records
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_many_records(kind, tmp_path, capsys):
    check(kind, SLOW, tmp_path, capsys)
