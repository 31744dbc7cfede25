"""`reasoning.openai`: chat/completions responses as records."""

import json
import math

import pytest
from reasoning.synthetic import make_pool

from falcon_h1r.reasoning import Manifest, Offline, import_responses, read_responses, replay


def entry(logprobs, token="x"):
    return {
        "token": token,
        "logprob": logprobs[0],
        "bytes": None,
        "top_logprobs": [{"token": f"t{i}", "logprob": v} for i, v in enumerate(logprobs)],
    }


def choice(rows, text, reason="stop", **more):
    return {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": reason,
        "logprobs": {"content": [entry(row) for row in rows]},
        **more,
    }


def response(*choices):
    return {"id": "1", "object": "chat.completion", "model": "served", "choices": list(choices)}


FOUR = [-0.25, -1.5, -2.25, -4.0]  # mean -2


def test_choices_become_traces(tmp_path):
    pool = make_pool(5, 6, k=4)
    choices = [
        choice(
            w.top_logprobs.double().tolist(),
            w.text,
            {"stop_string": "stop"}.get(w.reason, w.reason),
        )
        for w in pool
    ]
    documents = [response(*choices[:2]), response(*choices[2:])]
    manifest = Manifest(k=4, reference="5", question="q")
    record = import_responses(documents, tmp_path / "a", manifest)
    assert (
        record.complete and record.manifest.source == "openai" and record.manifest.k_least is None
    )
    assert record.manifest.model == "served" and record.manifest.question == "q"
    for trace, whole in zip(record.traces, pool):
        assert trace.confidence.tolist() == whole.confidence.tolist()  # in bits
        assert (
            trace.text == whole.text and trace.seed is None and set(trace.tokens.tolist()) == {-1}
        )
        assert trace.steps.tolist() == list(range(len(whole.tokens)))
    assert replay(record, Offline(window=5)).right in (True, False)


def test_what_servers_add(tmp_path):
    rows = [FOUR, [-9.0, *FOUR]]  # the second with its sampled token, in front and outside the top
    made = choice(rows, r"\boxed{7}")
    made["logprobs"]["content"][0]["token"] = "token_id:42"
    made["message"]["reasoning_content"] = "hm"
    named = choice([FOUR], "7", "stop", stop_reason="###")
    ended = choice([FOUR], "7", "length", stop_reason=None)
    by_id = choice([FOUR], "7", "stop", stop_reason=11)
    record = import_responses([response(made, named, ended, by_id)], tmp_path / "a", Manifest(k=4))
    first = record.traces[0]
    assert first.confidence.tolist() == [2.0, 2.0] and first.tokens.tolist() == [42, -1]
    assert first.text == "<think>hm</think>\n\n\\boxed{7}" and first.answer == "7"
    assert [t.reason for t in record.traces] == ["stop", "stop_string", "length", "stop"]
    assert [t.answer for t in record.traces[1:]] == [None] * 3


def test_fewer_than_k_are_used_only_if_that_is_allowed(tmp_path):
    documents = [response(choice([FOUR[:2], FOUR], "7"))]
    with pytest.raises(ValueError, match="choice 0, token 0: 2 top_logprobs, k is 4; allow fewer"):
        import_responses(documents, tmp_path / "a", Manifest(k=4))
    assert not (tmp_path / "a").exists()
    record = import_responses(documents, tmp_path / "a", Manifest(k=4), allow_fewer=True)
    assert record.traces[0].confidence.tolist() == [0.875, 2.0] and record.manifest.k_least == 2
    record = import_responses(documents, tmp_path / "b", Manifest(k=2))
    assert record.traces[0].confidence.tolist() == [0.875, 0.875]
    assert record.manifest.k_least is None


def broken(**changes):
    made = choice([FOUR, FOUR], "7")
    made.update(changes)
    return made


def with_top(top):
    made = choice([FOUR, FOUR], "7")
    made["logprobs"]["content"][1]["top_logprobs"] = top
    return made


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ("x", "choice 0: has no message"),
        (broken(message=None), "has no message"),
        (broken(logprobs=None), "ask for logprobs"),
        (broken(logprobs={"content": []}), "ask for logprobs"),
        (broken(finish_reason="tool_calls"), "finish_reason is 'tool_calls'"),
        (broken(finish_reason=None), "finish_reason is None"),
        (with_top([]), "token 1: has no top_logprobs"),
        (with_top(None), "token 1: has no top_logprobs"),
        (with_top([{"logprob": v} for v in (-1, -2, -3, -9999.0)]), "log-probability of -9999.0"),
        (with_top([{"logprob": v} for v in (-1, -2, -3, None)]), "log-probability of None"),
        (with_top([{"logprob": v} for v in (-1, -2, -3, -math.inf)]), "log-probability of -inf"),
        (with_top([{"logprob": v} for v in (0.5, -2, -3, -4)]), "log-probability of 0.5"),
        (with_top([1, 2, 3, 4]), "log-probability of None"),
    ],
)
def test_choices_that_cannot_be_used(tmp_path, made, message):
    with pytest.raises(ValueError, match=message):
        import_responses([response(made)], tmp_path / "a", Manifest(k=4))
    assert not (tmp_path / "a").exists()


def with_message(**message):
    return broken(message={"content": "7", **message})


@pytest.mark.parametrize(
    ("made", "field"),
    [
        (broken(logprobs=[1]), "logprobs"),
        (broken(logprobs="x"), "logprobs"),
        (broken(logprobs=3), "logprobs"),
        (broken(logprobs=False), "logprobs"),
        (broken(logprobs={"content": "x"}), "logprobs.content"),
        (broken(finish_reason={"a": 1}), "finish_reason"),
        (broken(finish_reason=[]), "finish_reason"),
        (broken(stop_reason=[]), "stop_reason"),
        (with_message(content=5), "content"),
        (with_message(content={}), "content"),
        (with_message(content=["x"]), "part 0 of the content"),
        (with_message(content=[{"type": "image_url"}]), "type is 'image_url'"),
        (with_message(content=[{"type": "text", "text": 5}]), "part 0 of the content, text"),
        (with_message(content="\ud800"), "no Unicode text"),
        (with_message(reasoning=["a"]), "reasoning"),
        (with_message(reasoning_content={}), "reasoning_content"),
        (with_top([{"logprob": v} for v in (10**400, -2, -3, -4)]), "log-probability of 1000"),
        (with_top([{"logprob": v} for v in (-(10**5000), -2, -3, -4)]), "too long|instance"),
        (with_top([{"logprob": v} for v in (math.nan, -2, -3, -4)]), "log-probability of nan"),
        (with_top([{"logprob": v} for v in (True, -2, -3, -4)]), "log-probability of True"),
        (broken(logprobs={"content": [entry(FOUR, 5)]}), "token 0, token: is 5"),
        (broken(logprobs={"content": [entry(FOUR, "token_id:" + "9" * 5000)]}), "no token's id"),
    ],
)
def test_a_field_of_another_kind_is_named(tmp_path, made, field):
    with pytest.raises(ValueError, match=f"response 0, choice 0.*{field}") as caught:
        import_responses([response(made)], tmp_path / "new" / "a", Manifest(k=4))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250
    assert not (tmp_path / "new").exists()


def test_content_in_parts(tmp_path):
    parts = [{"type": "text", "text": "so "}, {"type": "text", "text": r"\boxed{7}"}]
    made = with_message(content=parts, reasoning=None)
    record = import_responses([response(made)], tmp_path / "a", Manifest(k=4))
    assert record.traces[0].text == r"so \boxed{7}" and record.traces[0].answer == "7"


def test_only_line_feeds_end_a_line(tmp_path):
    text = "a\u2028b\u2029c\x85d\x0b \\boxed{7}"
    one = response(choice([FOUR], text))
    path = tmp_path / "r.jsonl"
    for end in ("\n", "\r\n"):
        line = json.dumps(one, ensure_ascii=False) + end
        path.write_bytes((line + end + line).encode())
        assert read_responses(path) == [one, one]
    record = import_responses(path, tmp_path / "a", Manifest(k=4))
    assert [trace.text for trace in record.traces] == [text] * 2


def test_a_refusal_names_the_line_and_leaves_nothing(tmp_path):
    path = tmp_path / "r.jsonl"
    good = json.dumps(response(choice([FOUR], "7")))
    for bad, message in [
        (json.dumps(response(broken(logprobs=3))), "line 3, choice 1, logprobs: is 3"),
        ("[" * 100_000, "line 3: not JSON that is read"),
        ("{", "line 3: not JSON"),
        ("5", "line 3: expected an object"),
        (json.dumps({**response(choice([FOUR], "7")), "model": []}), "line 3, model"),
    ]:
        path.write_text(f"{good}\n\n{bad}\n")
        with pytest.raises(ValueError, match=message):
            import_responses(path, tmp_path / "a", Manifest(k=4))
        assert not (tmp_path / "a").exists()


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("falcon_h1r.reasoning.recorder._append", full)
    with pytest.raises(OSError, match="No space"):
        import_responses([response(choice([FOUR], "7"))], tmp_path / "a", Manifest(k=4))
    assert not (tmp_path / "a").exists()


def test_responses_without_choices(tmp_path):
    for documents in ([], [response()], [{"choices": None}]):
        with pytest.raises(ValueError, match="choices"):
            import_responses(documents, tmp_path / "a", Manifest(k=4))


def test_files(tmp_path):
    one, path = response(choice([FOUR], "7")), tmp_path / "r.json"
    for text in (
        json.dumps(one),
        json.dumps([one]),
        json.dumps(one) + "\n\n",
        json.dumps(one, indent=2),
    ):
        path.write_text(text)
        assert read_responses(path) == [one]
    path.write_text(json.dumps(one) + "\n" + json.dumps(one) + "\n")
    assert read_responses(path) == [one, one]
    for text in ("", "[]", "{}", "[1]", "not json", '{"error": "x"}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"r\.json"):
            read_responses(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="neither JSON"):
        read_responses(path)
