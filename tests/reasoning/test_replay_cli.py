"""`falcon-h1r replay`."""

import json

import pytest
from reasoning.synthetic import edit_manifest, make_pool, pool_of, record_pool, run_live
from reasoning.test_online import WARMUP, small
from reasoning.test_openai import FOUR, choice, response
from tiny_cli import run

from falcon_h1r.commands.policy import MARGIN
from falcon_h1r.reasoning import DeepConf, Offline, read_record, replay


@pytest.fixture
def folder(tmp_path):
    record_pool(make_pool(8, 20), tmp_path / "pool", reference="5")
    return tmp_path / "pool"


def cells(line):
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_one_policy(capsys, folder):
    status, out, err = run(capsys, "replay", folder, "--window", 5)
    record = read_record(folder)
    majority = replay(record, Offline())
    assert status == 0 and err == ""
    head, row = out.splitlines()
    assert cells(head) == "policy,answer,right,tokens,of all,traces,stopped,cut,order".split(",")
    right = "yes" if majority.right else "no"
    tokens = str(majority.tokens)
    assert cells(row) == [
        "majority",
        majority.answer,
        right,
        tokens,
        "100.0 %",
        "20",
        "0",
        "0",
        "-",
    ]


def test_numbers_reach_the_policies(capsys, folder):
    argv = ["--policy", "deepconf", "--eta", 40, "--window", 5, "--tau", 0.9, "--warmup", 4]
    argv += ["--budget", 15, "--parallel", 3, "--json"]
    status, out, _ = run(capsys, "replay", folder, *argv)
    document = json.loads(out)
    params = DeepConf(k=4, eta=40.0, window=5, tau=0.9, warmup=4, budget=15, margin=MARGIN)
    expected = replay(read_record(folder), params, parallel=3)
    (row,) = document["policies"]
    (result,) = row["results"]
    assert status == 0 and row["policy"] == "deepconf, eta 40" and row["refused"] is None
    assert result["tokens"] == expected.tokens < result["all_tokens"] == expected.all_tokens
    assert result["stopped"] == expected.stopped > 0 and result["answer"] == expected.answer
    assert result["online"]["threshold"] == expected.online.threshold
    assert result["online"]["params"] == params.to_dict() and result["order"] == "simulated"
    assert result["online"]["log"] == expected.online.to_dict()["log"]
    assert document["records"][0]["rule"] == "exact" and document["records"][0]["reference"] == "5"
    status, out, _ = run(
        capsys, "replay", folder, "--policy", "tail", "--eta", 10, "--window", 7, "--json"
    )
    (result,) = json.loads(out)["policies"][0]["results"]
    expected = replay(read_record(folder), Offline(weight="tail", keep=10.0, window=7))
    assert result["candidates"] == json.loads(
        json.dumps([c._asdict() for c in expected.vote.candidates])
    )


def test_compare(capsys, folder):
    status, out, _ = run(capsys, "replay", folder, "--compare", "--window", 5)
    lines = out.splitlines()
    names = [cells(line)[0] for line in lines[1:]]
    measures = ["mean", "lowest-group", "bottom-10", "tail"]
    assert status == 0 and names == [
        "majority",
        *measures,
        *(f"{name}, eta 10" for name in measures),
        *(f"{name}, eta 90" for name in measures),
        "deepconf-low",
        "deepconf-high",
    ]
    for name, line in zip(names, lines[1:]):
        share = float(cells(line)[4].removesuffix(" %"))
        assert share < 100 if name == "deepconf-low" else share <= 100
    # A number that only some rows have does not refuse the others.
    status, out, _ = run(
        capsys, "replay", folder, "--compare", "--window", 5, "--eta", 30, "--warmup", 4
    )
    assert status == 0 and "-:" not in out and "deepconf, eta 30" in out and "tail, eta 30" in out


def test_a_folder_of_records(capsys, tmp_path):
    for i in range(3):
        record_pool(make_pool(i, 6), tmp_path / f"q{i}", reference="5")
    records = [read_record(tmp_path / f"q{i}") for i in range(3)]
    status, out, _ = run(capsys, "replay", tmp_path)
    results = [replay(record, Offline()) for record in records]
    right = sum(result.right for result in results)
    row = cells(out.splitlines()[1])
    assert status == 0 and cells(out.splitlines()[0])[1] == "answered"
    assert row[1:3] == ["3/3", f"{right}/3"] and row[3] == str(sum(r.tokens for r in results))
    assert row[5] == "18"


def test_a_recorded_run(capsys, tmp_path):
    pool = pool_of([*WARMUP, [9.0, 3.0, 2.0, 9.0], [4.0, 2.0, 8.0]], ["7", "8", "7", "8"])
    run_live(pool, small(), tmp_path / "run", reference="8.0")
    status, out, err = run(capsys, "replay", tmp_path / "run")
    row = ["recorded", "8", "yes", "12", "-", "4", "1", "0", "recorded"]
    assert (status, err) == (0, "") and cells(out.splitlines()[1]) == row
    status, out, _ = run(capsys, "replay", tmp_path / "run", "--compare")
    lines = out.splitlines()
    assert status == 0 and cells(lines[1]) == row and cells(lines[2]) == ["majority", *["-"] * 8]
    assert "-: " in lines[-2] + lines[-1] and "whose answers are not known" in out
    argv = ["replay", tmp_path / "run", "--policy", "deepconf", "--eta", 1, "--warmup", 2]
    (result,) = json.loads(run(capsys, *argv, "--json")[1])["policies"][0]["results"]
    # The run's window and as many traces as there are, where nothing else is said.
    assert result["online"]["params"]["window"] == 2 and result["online"]["params"]["budget"] == 4
    status, out, err = run(capsys, "replay", tmp_path / "run", "--policy", "majority")
    assert (status, out) == (2, "") and "whose answers are not known" in err


def test_what_a_reader_must_know_is_said(capsys, folder):
    path = folder / "traces.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    edit_manifest(folder, rule="math-verify 0.0.0")
    status, _, err = run(capsys, "replay", folder, "--rule", "exact")
    assert status == 0 and "1 of 1 records were cut short" in err
    assert "answers compared by exact; recorded by math-verify 0.0.0" in err


def test_an_import(capsys, tmp_path):
    source = tmp_path / "r.json"
    rows = [[-0.5 - 0.1 * i for i in range(20)]]
    choices = [choice(rows, f"it is {n}") for n in (7, 7, 8)]
    source.write_text(json.dumps(response(*choices)))
    argv = ["replay", tmp_path / "a", "--from-openai", source, "--extractor", "number"]
    status, out, err = run(capsys, *argv, "--reference", "7")
    assert status == 0 and err == "" and cells(out.splitlines()[1])[:3] == ["majority", "7", "yes"]
    assert cells(run(capsys, "replay", tmp_path / "a")[1].splitlines()[1])[1] == "7"
    source.write_text(json.dumps(response(choice([FOUR], r"\boxed{7}"))))
    argv = ["replay", tmp_path / "b", "--from-openai", source]
    status, out, err = run(capsys, *argv)
    assert (status, out) == (2, "") and "4 top_logprobs, k is 20" in err
    assert not (tmp_path / "b").exists()
    status, _, err = run(capsys, *argv, "--allow-fewer")
    assert status == 0 and "as few as 4 log-probabilities, not 20" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--policy", "median"], "policy 'median': known are majority"),
        (["--policy", "majority", "--tau", "0.5"], "tau: the policy majority has none"),
        (["--policy", "deepconf-low", "--eta", "5"], "eta: deepconf-low has its own"),
        (["--policy", "deepconf-low", "--budget", "9"], "budget is 9, expected at least warmup"),
        (["--policy", "deepconf-low", "--window", "5", "--budget", "99"], "holds 20 traces"),
        (["--policy", "deepconf-low", "--warmup", "21"], "holds 20 traces"),
        (["--policy", "mean", "--budget", "99"], "holds 20 traces"),
        (["--policy", "mean", "--eta", "0"], "keep is 0.0"),
        (["--policy", "mean", "--compare"], "give one of the two"),
        (["--extractor", "box"], "extractor 'box'"),
        (["--window", "0"], "0 is below 1"),
        (["--reference", "5"], "only with --from-openai"),
        (["--from-openai", "/nowhere.json"], "nowhere.json"),
    ],
)
def test_refusals(capsys, folder, argv, message):
    status, out, err = run(capsys, "replay", folder, *argv)
    assert (status, out) == (2, "")
    assert err.startswith("falcon-h1r: error: ") and message in err and err.count("\n") == 1


def test_folders_that_hold_no_records(capsys, tmp_path):
    for path, message in ((tmp_path, "neither a trace record"), (tmp_path / "x", "no such folder")):
        status, out, err = run(capsys, "replay", path)
        assert (status, out) == (2, "") and message in err and err.count("\n") == 1
    record_pool(make_pool(1, 2), tmp_path / "a")
    (tmp_path / "a" / "trace-00001.safetensors").write_bytes(b"")
    status, out, err = run(capsys, "replay", tmp_path / "a")
    assert (status, out) == (2, "") and "damaged" in err
