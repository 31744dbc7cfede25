"""A function of the user's own: gated and timed beside ours, from Python and the command line."""

import json
import sys

import pytest
import torch
from bench.tiny_bench import CEILINGS, TWO_GROUPS, FakeClock, tiny_cases, tiny_session
from tiny_cli import run

from falcon_h1r.bench import compare, comparison, machine, operator_bench, user_operator
from falcon_h1r.bench.axes import AXES, parse, sized
from falcon_h1r.bench.implementations import contestants
from falcon_h1r.bench.operators import OPERATORS
from falcon_h1r.bench.registry import Workload
from falcon_h1r.bench.user_operator import UserOperator
from falcon_h1r.ops import TORCH

SCAN = {"l": 21, "h": 4, "p": 6, "g": 2, "n": 5}


def my_scan(x, dt, A, B, C, D=None, **options):
    return TORCH.ssd_scan(x, dt, A, B, C, D, **options)


def off(*args, **options):
    y, state = my_scan(*args, **options)
    return y * 1.1, state


def raises(*args, **options):
    raise RuntimeError("no such\nkernel")


def short(*args, **options):
    y, state = my_scan(*args, **options)
    return y[:, :-1], state


def wide(*args, **options):
    y, state = my_scan(*args, **options)
    return y.double(), state


def not_a_number(*args, **options):
    y, state = my_scan(*args, **options)
    y[0, 1, 2, 3] = torch.nan
    return y, state


def without_state(*args, **options):
    return my_scan(*args, **options)[0]


def nothing(*args, **options):
    return None


def overwrites(x, *args, **options):
    out = my_scan(x, *args, **options)
    x.mul_(2)
    return out


def few(x, dt):
    return x


WRONG = {
    off: "times as far off as allowed",
    raises: "RuntimeError: no such kernel",
    short: "output 0 has shape (1, 20, 4, 6), expected (1, 21, 4, 6)",
    wide: "output 0 is torch.float64, expected torch.float32",
    not_a_number: "output 0 is not finite",
    without_state: "1 outputs, expected 2",
    nothing: "output 0 is of type NoneType, expected a tensor",
    overwrites: "ValueError: overwrites its argument x_blhp",
}


@pytest.fixture(autouse=True)
def _no_clock(monkeypatch):
    """Nothing here waits for a clock or for ceilings."""
    monkeypatch.setattr(comparison, "clock_for", lambda device: FakeClock())
    monkeypatch.setattr(comparison, "_ceilings", lambda device, dtype: CEILINGS)


def tiny(function, **options):
    options = {"model": TWO_GROUPS, "dtype": "float32", "device": "cpu"} | options
    return compare("ssd_scan", function, **({"sizes": SCAN} | options))


def test_compare_gives_values_and_prints_a_table():
    found = tiny(my_scan)
    assert list(found.seconds) == ["reference", "torch", "my_scan", "transformers"]
    assert found.seconds["my_scan"] == 0.5 and found.wrong == {}
    assert found.errors["my_scan"] == found.errors["torch"] < 1e-6
    assert found.records["my_scan"]["rounds"] == found.records["torch"]["rounds"], "in turns"
    assert found.records["my_scan"]["status"] == "timed"
    assert repr(found) == str(found) == found.text
    assert "ssd_scan a config with h=4,p=6,g=2,n=5 prefill 1x21 float32" in found.text
    assert found.text.count("needs a GPU") == 1 and "  my_scan  " in found.text


def test_several_functions_by_name():
    found = tiny({"a": my_scan, "b": off}, dtype=torch.bfloat16)
    assert "a" in found.seconds and list(found.wrong) == ["b"] and "b" not in found.seconds
    assert found.errors["b"] == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("function", WRONG, ids=lambda f: f.__name__)
def test_a_function_that_is_wrong_is_reported_and_not_timed(function):
    found = tiny(function)
    name = function.__name__
    assert list(found.wrong) == [name] and WRONG[function] in found.wrong[name]
    assert (
        name not in found.seconds and "torch" in found.seconds and "transformers" in found.seconds
    )
    assert found.errors["transformers"] < 1e-5, "its inputs were left, or put back, as they were"


def test_lists_serve_as_tuples_and_text_as_sizes():
    found = tiny(lambda *a, **o: list(my_scan(*a, **o)), sizes="l=7,h=2")
    assert found.wrong == {} and " with h=2 prefill 1x7 " in found.text


def test_what_is_updated_in_place_is_a_private_copy():
    case = next(iter(tiny_cases(["ssd_step"])))
    user = UserOperator("ssd_step", "mine", lambda state, *rest: TORCH.ssd_step(state, *rest))
    session = tiny_session(user=(user,))
    assert operator_bench.run([case], session) == 0
    (mine,) = (r for r in session.results.records if r.get("implementation") == "mine")
    assert mine["status"] == "timed"
    other = next(iter(tiny_cases(["rope"])))
    assert "mine" not in {one.name for one in contestants(other, session)}


@pytest.mark.parametrize("op", list(OPERATORS))
def test_every_operator_is_called_as_the_model_calls_it(op):
    """REFERENCE's form as a function whose own positional names are not known."""
    case = next(iter(tiny_cases([op])))
    reference = user_operator.gate.reference(case)
    user = UserOperator(case.op, "mine", lambda *args, **named: reference(*args, **named))
    session = tiny_session(user=(user,))
    user_operator.check_signature(user, case)
    assert operator_bench.run([case], session) == 0
    (mine,) = (r for r in session.results.records if r.get("implementation") == "mine")
    assert mine["status"] == "timed"


@pytest.mark.parametrize(
    ("op", "function", "options", "message"),
    [
        ("scan", my_scan, {}, "no operator 'scan'; there are: rms_norm, "),
        ("ssd_scan", few, {}, "few is called as ssd_scan(x_blhp, dt_blh, A_h, B_blgn, C_blgn, D_h"),
        ("ssd_scan", 3, {}, "int is of type int, no function"),
        ("ssd_scan", {"torch": my_scan}, {}, "'torch', which names one of"),
        ("ssd_scan", my_scan, {"sizes": {"z": 3}}, "ssd_scan has no axis 'z'; it has: b, h, p"),
        ("ssd_scan", my_scan, {"sizes": {"h": 3, "g": 2}}, "mamba_n_heads=3 is no multiple of"),
        ("ssd_scan", my_scan, {"model": "falcon-9"}, "unknown preset 'falcon-9'"),
        (
            "ssd_scan",
            my_scan,
            {"dtype": "int8"},
            "dtype is 'int8', expected one of: float64",
        ),
        ("ssd_scan", my_scan, {"device": "tpu"}, "device is 'tpu', expected cpu, cuda or cuda:N"),
        ("ssd_scan", my_scan, {"device": "cuda:99"}, "device cuda:99: torch sees "),
        ("ssd_scan", my_scan, {"sizes": "l"}, "sizes are 'l', expected AXIS=N"),
        ("ssd_scan", my_scan, {"seconds": 0}, "seconds is 0, expected a number above 0"),
        ("attention", few, {"sizes": {"l": 9, "s": 4}}, "s, the keys, are fewer than l = 9 tokens"),
        ("causal_conv1d", few, {"sizes": {"c": 2}}, "c is 2, expected 3 or more"),
        ("ssd_scan", my_scan, {"sizes": {"l": 0}}, "l is 0, expected a positive integer"),
    ],
)
def test_compare_refuses(op, function, options, message):
    with pytest.raises(ValueError) as caught:
        compare(op, function, **({"device": "cpu"} | options))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_function_without_a_signature_is_called():
    assert "failed" in str(tiny(torch.add).records["add"])


@pytest.mark.parametrize("op", list(OPERATORS))
def test_sizes_are_those_of_the_arguments(op):
    """Each axis at a size of its own: by its letter in every argument's name."""
    sizes = {"b": 2, "m": 2, "l": 3, "s": 11, "h": 6, "j": 3, "g": 2, "p": 5, "n": 7, "e": 8}
    sizes |= {"c": 26, "w": 3, "q": 4, "i": 10, "v": 13, "d": 12}
    given = {letter: sizes[letter] for letter in AXES[op]}
    case = sized(op, given, "t", TWO_GROUPS, torch.float32)
    inputs, seen = case.inputs(), set()
    for name, value in inputs.items():
        letters = name.rpartition("_")[2]
        if not isinstance(value, torch.Tensor) or len(letters) != value.ndim:
            continue
        for letter, size in zip(letters, value.shape):
            if letter in given:
                allowed = (1,) if size == 1 and letter in "bl" else ()
                assert size in (given[letter], *allowed), (name, letter)
                seen.add(letter)
    unnamed = {"swiglu": {"b", "l", "i"}, "rms_norm": {"b", "l"}, "rms_norm_residual": {"b", "l"}}
    scalars = {"ssd_scan": {"q"}, "gated_rms_norm": {"g"}, "conv_ssd_step": {"g"}}
    assert seen | unnamed.get(op, set()) | scalars.get(op, set()) == set(given)
    if op in unnamed:
        shape = inputs["gate" if op == "swiglu" else "x"].shape
        assert shape == (2, 3, given.get("i", given.get("d")))
    assert case.call(user_operator.gate.torch_form(case), inputs)


def test_sizes_that_are_not_given():
    plain = sized("ssd_scan", {}, "t", TWO_GROUPS, torch.float32)
    assert plain.workload == Workload("prefill", 1, 512) and plain.model == "t"
    assert plain.config is not None and plain.config == TWO_GROUPS
    behind = sized("attention", {"l": 4, "s": 9}, "t", TWO_GROUPS, torch.float32)
    assert behind.workload == Workload("resume", 1, 4, 5)
    step = sized("decode_attention", {"b": 3}, "t", TWO_GROUPS, torch.float32)
    assert step.workload == Workload("decode", 3, 1, 2047)
    assert set(AXES) == set(OPERATORS)


@pytest.mark.parametrize("text", ["", "l", "l=", "l=0", "l=-1", "l=x", "l=1,l=2", "=3", "l=1,"])
def test_sizes_as_text_are_refused(text):
    with pytest.raises(ValueError, match="expected AXIS=N,AXIS=N"):
        parse(text)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of the user's in the current folder, and the options of a short run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(machine, "CPU_SIZES", (2**12,))
    monkeypatch.setattr(machine, "CPU_MATRIX", 16)
    (tmp_path / "own_scan_of_a_test.py").write_text(
        "from falcon_h1r.ops import TORCH\n"
        "def mine(*args, **named): return TORCH.ssd_scan(*args, **named)\n"
        "def off(*args, **named): y, s = mine(*args, **named); return y * 1.1, s\n"
        "def few(x): return x\n"
        "class table: scan = mine\n"
        "number = 3\n"
    )
    (tmp_path / "own_crash_of_a_test.py").write_text("1 / 0")
    (tmp_path / "own_exit_of_a_test.py").write_text("raise SystemExit('bye')")
    (tmp_path / "own_import_of_a_test.py").write_text("import not_there_at_all")
    return "own_scan_of_a_test"


SHORT = ["bench", "ops", "--model-shape", "h1r-pico", "--seconds", "0.001", "--dtype", "float32"]


def test_the_command_measures_a_function_of_the_current_folder(capsys, module, tmp_path):
    argv = [*SHORT, "--out", "o.jsonl", "--sizes", "l=9,h=2,p=4,n=6"]
    status, out, err = run(capsys, *argv, "--impl", f"ssd_scan={module}:mine")
    records = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    results = [r for r in records if r["record"] == "result"]
    assert (status, err) == (0, "")
    assert [r["implementation"] for r in results if r["status"] == "timed"] == [
        "reference",
        "torch",
        f"{module}:mine",
        "transformers",
    ]
    assert {r["op"] for r in results} == {"ssd_scan"}, "without --op only the function's operator"
    assert {(r["batch"], r["length"]) for r in results} == {(1, 9)}
    assert "ssd_scan h1r-pico with h=2,p=4,n=6 prefill 1x9 float32" in out
    lines = [line for line in out.splitlines() if line.endswith(" ceiling") or " us " in line]
    assert len({line.find("]") for line in lines if "]" in line and ":" in line}) <= 1


def test_a_wrong_function_is_exit_status_1(capsys, module):
    argv = [*SHORT, "--out", "o.jsonl", "--op", "ssd_scan", "--sizes", "l=9", "--json"]
    names = [f"{module}:off", f"{module}:mine", f"{module}:table.scan"]
    status, out, err = run(capsys, *argv, "--impl", *names)
    document = json.loads(out)
    assert status == 1 and document["wrong"] == 1
    found = {r.get("implementation"): r.get("status") for r in document["records"]}
    assert [found[name] for name in names] == ["wrong", "timed", "timed"]
    assert "times as far off" in err and "1 results did not pass" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["%:mine"], "--impl %:mine: which operator is it? Write OP=%:mine; OP is one of: "),
        (["scan=%:mine"], "--impl scan=%:mine: no operator 'scan'; there are: rms_norm"),
        (["ssd_scan=%"], "--impl is '%', expected MODULE:NAME"),
        (["ssd_scan=%:"], "--impl is '%:', expected MODULE:NAME"),
        (["ssd_scan=%:theirs"], "--impl %:theirs: % has no 'theirs'"),
        (["ssd_scan=%:number"], "--impl %:number: is of type int, expected a function"),
        (["ssd_scan=no_such_mod:f"], "--impl no_such_mod:f: no module 'no_such_mod' in "),
        (["ssd_scan=%:few"], "--impl %:few is called as ssd_scan(x_blhp, dt_blh, A_h"),
        (["ssd_scan=own_crash_of_a_test:f"], "raised ZeroDivisionError: division by zero"),
        (["ssd_scan=own_exit_of_a_test:f"], "raised SystemExit: bye"),
        (["ssd_scan=own_import_of_a_test:f"], "raised ModuleNotFoundError: No module named 'not_"),
        (["ssd_scan=%:mine", "ssd_scan=%:mine"], "--impl: the same function twice"),
        (["ssd_scan=%:mine", "--op", "rope"], "no case of ssd_scan is among what is measured"),
        (["ssd_scan=%:mine", "--decode", "1@9"], "no case to measure: ssd_scan has no decode"),
        (["ssd_scan=%:mine", "--tune", "--op", "ssd_scan"], "--tune: not with --impl"),
        (["ssd_scan=%:mine", "--sizes", "z=3"], "--sizes: ssd_scan has no axis 'z'; it has: b"),
        (["ssd_scan=%:mine", "--sizes", "l"], "--sizes: sizes are 'l', expected AXIS=N"),
        (["ssd_scan=%:mine", "--sizes", "l=3", "--prefill", "1x3"], "--sizes: not with --prefi"),
    ],
)
def test_the_command_refuses(capsys, module, tmp_path, argv, message):
    before = set(tmp_path.glob("*.*"))
    argv = [text.replace("%", module) for text in argv]
    status, out, err = run(capsys, *SHORT, "--impl", *argv)
    assert (status, out) == (2, "") and message.replace("%", module) in err
    assert err.startswith("falcon-h1r: error: ") and err.count("\n") == 1
    assert set(tmp_path.glob("*.*")) == before, "nothing is left behind"
