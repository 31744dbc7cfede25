"""The command line on a tiny checkpoint: what goes to stdout, to stderr, exit statuses."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_cli import Terminal, expected_text, interrupting, run, tiny_model, write_checkpoint

from falcon_h1r import FalconH1Config, FalconH1ForCausalLM
from falcon_h1r.cli import build_parser
from falcon_h1r.commands import common, generate
from falcon_h1r.commands.terminal import Display
from falcon_h1r.text import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


def test_help_names_every_command_and_option(capsys):
    status, out, err = run(capsys, "--help")
    assert status == 0 and err == ""
    options = {"generate": "--thinking-budget", "chat": "--system", "info": "--traces"}
    for command, option in options.items():
        assert command in out
        status, own, _ = run(capsys, command, "--help")
        assert status == 0 and option in own


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: COMMAND"),
        (["dance"], "invalid choice: 'dance'"),
        (["generate", "x", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["generate", "x", "--ops", "cuda"], "invalid choice: 'cuda'"),
        (["generate", "x", "--temp", "1"], "unknown option --temp; did you mean --temperature?"),
        (["generate", "x", "--temperature", "warm"], "invalid float value: 'warm'"),
        (["generate", "x", "--temperature", "-1"], "temperature is -1.0"),
        (["generate", "x", "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["generate", "x", "--top-p", "0"], "top_p is 0.0"),
        (["generate", "x", "--n", "0"], "n is 0"),
        (["generate", "x", "--seed", "-3"], "seed is -3"),
        (["generate", "x", "--stop", ""], "stop is ('',)"),
        (["generate", "x", "--max-new-tokens", "200"], "more than max_position_embeddings 160"),
        (["generate", ""], "the prompt is empty"),
        (["generate", " \n"], "the prompt is empty"),
        (["generate", "x", "--logprobs", "2"], "--logprobs: only with --json"),
        (["generate", "x", "--raw", "--system", "y"], "--system: not with --raw"),
        (["generate", "x", "--device", "nowhere"], "nowhere"),
        (["generate", "x", "--revision", "main"], "revision"),
        (["chat", "--min-p", "2"], "min_p is 2.0"),
        (["info", "--context", "0"], "0 is below 1"),
        (["info", "falcon-h1r-7b", "--bandwidth", "0"], "--bandwidth is 0.0"),
        (
            ["info", "falcon-h9"],
            "'falcon-h9' is neither a folder nor a preset; did you mean falcon-h1",
        ),
    ],
)
def test_refusals_are_one_line_on_stderr_and_status_2(capsys, checkpoint, argv, message):
    if argv[:1] in (["generate"], ["chat"]):
        argv = [*argv, "--model", checkpoint]
    status, out, err = run(capsys, *argv)
    assert (status, out) == (2, "")
    assert err.startswith("falcon-h1r: error: ") and message in err and err.count("\n") == 1


@pytest.mark.parametrize("command", [["generate", "x", "--model"], ["chat", "--model"], ["info"]])
def test_an_unknown_model_is_refused(capsys, tmp_path, command):
    status, out, err = run(capsys, *command, tmp_path / "missing")
    assert (status, out) == (2, "") and "missing" in err and err.count("\n") == 1


def test_text_goes_to_stdout_and_everything_else_to_stderr(capsys, checkpoint):
    argv = ["generate", "hello", "--model", checkpoint, "--max-new-tokens", "20"]
    status, out, err = run(capsys, *argv)
    assert status == 0 and out == expected_text(checkpoint, "hello", 20) + "\n"
    header, speed = err.splitlines()
    assert header == f"[{checkpoint} on cpu: float32, torch operators]"
    assert speed.startswith("[20 tokens, ") and "tokens/s" in speed and "seed" in speed


def test_raw_continues_the_text_itself(capsys, checkpoint):
    argv = ["generate", "hello", "--model", checkpoint, "--max-new-tokens", "9", "--raw"]
    _, out, _ = run(capsys, *argv)
    assert out == expected_text(checkpoint, "hello", 9, raw=True) + "\n"


def test_a_checkpoint_without_a_template_is_raw_and_takes_no_system_message(
    capsys, checkpoint, tmp_path
):
    folder = write_checkpoint(tmp_path / "bare", template=None)
    argv = ["generate", "hello", "--model", folder, "--max-new-tokens", "9"]
    assert run(capsys, *argv)[1] == expected_text(checkpoint, "hello", 9, raw=True) + "\n"
    status, _, err = run(capsys, *argv, "--system", "x")
    assert status == 2 and "no chat template" in err
    status, _, err = run(capsys, "chat", "--model", folder)
    assert status == 2 and "no chat template" in err


@pytest.mark.parametrize("argument", [[], ["-"]])
def test_the_prompt_may_come_from_stdin(capsys, checkpoint, monkeypatch, argument):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    argv = ["generate", *argument, "--model", checkpoint, "--max-new-tokens", "9"]
    assert run(capsys, *argv)[1] == expected_text(checkpoint, "hello", 9) + "\n"


def test_no_prompt_on_a_terminal_is_an_error_not_a_wait(capsys, checkpoint, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Terminal())
    status, _, err = run(capsys, "generate", "--model", checkpoint)
    assert status == 2 and "no prompt" in err


def test_json_is_one_document_and_nothing_else(capsys, checkpoint):
    argv = ["generate", "hello é", "--model", checkpoint, "--system", "S", "--max-new-tokens", "6"]
    argv += ["--json", "--n", "2", "--temperature", "1", "--seed", "5", "--logprobs", "3"]
    status, out, _ = run(capsys, *argv, "--stop", "a", "--stop", "b")
    document = json.loads(out)
    assert status == 0 and out.count("\n") == 1
    assert document["prompt"].startswith("<|im_start|>system\nS<|im_end|>")
    assert document["prompt_tokens"] == len(
        load_tokenizer(checkpoint).encode(document["prompt"], add_special_tokens=False)
    )
    assert document["params"]["seed"] == 5 and document["params"]["stop"] == ["a", "b"]
    assert [entry["seed"] for entry in document["outputs"]] == [5, 6]
    for entry in document["outputs"]:
        assert len(entry["tokens"]) == len(entry["logprobs"]) == len(entry["top_logprobs"]) <= 6
        for top in entry["top_logprobs"]:
            assert len(top) == 3 and set(top[0]) == {"token", "logprob"}
        assert entry["finish_reason"] in ("length", "stop", "stop_string")
        assert entry["answer"] in entry["text"] and entry["thinking"] is None
    assert set(document["timing"]) == {"prefill_s", "decode_s"}
    again = json.loads(run(capsys, *argv)[1])["outputs"]
    alone = json.loads(run(capsys, *(a for a in argv if a not in ("--n", "2")))[1])["outputs"]
    assert alone[0]["tokens"] == again[0]["tokens"]


def test_several_samples_are_shown_one_after_the_other(capsys, checkpoint):
    argv = ["generate", "hello", "--model", checkpoint, "--max-new-tokens", "5", "--n", "2"]
    _, out, _ = run(capsys, *argv, "--seed", "3")
    text = expected_text(checkpoint, "hello", 5)
    assert out == (
        f"=== 1 of 2, seed 3, length ===\n{text}\n=== 2 of 2, seed 4, length ===\n{text}\n"
    )


def test_a_fresh_seed_is_reported_and_repeats_the_run(capsys, checkpoint):
    argv = ["generate", "hello", "--model", checkpoint, "--max-new-tokens", "8"]
    argv += ["--temperature", "1.5"]
    _, out, err = run(capsys, *argv)
    seed = err.split("seed ")[1].split(";")[0]
    assert run(capsys, *argv, "--seed", seed)[1] == out
    assert run(capsys, *argv)[1] != out


OPTIONS = {
    "--temperature": "3",
    "--top-k": "1",
    "--top-p": "0.01",
    "--min-p": "1",
    "--repetition-penalty": "9",
    "--presence-penalty": "9",
    "--frequency-penalty": "9",
    "--seed": "12",
    "--max-new-tokens": "9",
    "--thinking-budget": "0",
    "--dtype": "float16",
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_reaches_the_model(capsys, checkpoint, option, monkeypatch):
    monkeypatch.setattr(generate, "opens_thinking", lambda prompt: False)
    base = {"--temperature": "1", "--seed": "11", "--max-new-tokens": "30", "--dtype": "float32"}
    prompt = "<think>" if option == "--thinking-budget" else "hello"

    def document(options):
        flat = [text for pair in options.items() for text in pair]
        _, out, _ = run(capsys, "generate", prompt, "--raw", "--json", "--logprobs", "0",
                        "--model", checkpoint, *flat)  # fmt: skip
        return json.loads(out)["outputs"][0]

    before, after = document(base), document({**base, option: OPTIONS[option]})
    assert before["logprobs"] != after["logprobs"]


def test_the_reference_operators_give_the_same_text(capsys, checkpoint):
    argv = ["generate", "hello", "--model", checkpoint, "--max-new-tokens", "9", "--ops"]
    assert run(capsys, *argv, "reference")[1] == run(capsys, *argv, "torch")[1]


def test_folded_multipliers_give_the_same_text(capsys, checkpoint):
    argv = ["generate", "hello", "--model", checkpoint, "--max-new-tokens", "9"]
    assert run(capsys, *argv, "--fold")[1] == run(capsys, *argv)[1]
    for extra, one in (((), False), (("--fold",), True)):
        args = build_parser().parse_args([*map(str, argv), *extra])
        assert (common.load_model(args).config.ssm_in_multiplier == 1) == one


def test_defaults_come_from_generation_config(checkpoint, tmp_path):
    folder = write_checkpoint(tmp_path / "configured")

    def prepared(stored, *argv):
        (folder / "generation_config.json").write_text(json.dumps(stored))
        args = build_parser().parse_args(["generate", "x", "--model", str(folder), *argv])
        return common.prepare(args).params

    stored = {"temperature": 0.6, "top_p": 0.95, "top_k": 50, "max_new_tokens": 77}
    found = prepared({**stored, "eos_token_id": [4, 9]})
    assert {name: getattr(found, name) for name in stored} == stored
    # End tokens of config.json (4), generation_config.json (4, 9) and the tokenizer (3).
    assert found.stop_token_ids == (3, 4, 9)
    assert prepared(stored, "--temperature", "0", "--top-k", "0").top_k == 0
    assert prepared({**stored, "do_sample": False}).temperature == 0
    assert prepared({**stored, "do_sample": False}, "--temperature", "1").temperature == 1
    assert prepared({"temperature": None}).temperature == 0
    assert prepared({"eos_token_id": 9}).stop_token_ids == (3, 4, 9)
    assert prepared({}).max_new_tokens == common.MAX_NEW_TOKENS
    assert prepared({"temperature": "hot"}, "--temperature", "1").temperature == 1
    for wrong, words in (
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"top_p": 0}, "top_p is 0"),
        ({"max_new_tokens": -2}, "max_new_tokens is -2"),
        ({"do_sample": "yes"}, "do_sample is 'yes', expected true or false"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            prepared(wrong)
        assert str(folder / "generation_config.json") in str(caught.value)


def test_what_generation_config_leaves_open(checkpoint, tmp_path):
    """null and -1 are no values, and sampling without a temperature has temperature 1."""
    folder = write_checkpoint(tmp_path / "configured")

    def prepared(**stored):
        (folder / "generation_config.json").write_text(json.dumps(stored))
        args = build_parser().parse_args(["generate", "x", "--model", str(folder)])
        return common.prepare(args).params

    plain = prepared()
    names = "temperature top_k top_p min_p repetition_penalty max_new_tokens do_sample eos_token_id"
    for name in names.split():
        for value in (None, -1, -1.0):
            assert prepared(**{name: value}) == plain, (name, value)
    assert prepared(do_sample=True).temperature == 1.0
    assert prepared(do_sample=True, temperature=None, top_k=-1).temperature == 1.0
    assert prepared(do_sample=True, temperature=0.6).temperature == 0.6
    assert prepared(do_sample=None, temperature=0.6).temperature == 0.6
    assert prepared(do_sample=False, temperature=0.6).temperature == 0.0


def test_a_default_length_is_cut_to_what_fits(capsys, checkpoint):
    status, out, _ = run(capsys, "generate", "hello", "--model", checkpoint, "--json")
    document = json.loads(out)
    assert status == 0 and document["params"]["max_new_tokens"] == 160 - document["prompt_tokens"]


def parsed(folder):
    return build_parser().parse_args(["generate", "x", "--model", str(folder)])


def test_weights_are_read_in_the_dtype_they_are_stored_in(checkpoint, tmp_path):
    narrow = tmp_path / "narrow"
    tiny_model(torch.bfloat16).save_pretrained(narrow)
    for folder, expected in ((checkpoint, torch.float32), (narrow, torch.bfloat16)):
        assert common.load_model(parsed(folder)).dtype == expected


def test_loading_shows_a_bar_on_a_terminal_only(checkpoint, monkeypatch):
    for screen, shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", screen)
        common.load_model(parsed(checkpoint))
        assert ("loading" in screen.getvalue()) == shown


def test_bad_options_are_found_before_weights_are_read(capsys, checkpoint, monkeypatch):
    def no_weights(args):
        raise AssertionError("weights were read")

    monkeypatch.setattr(common, "load_model", no_weights)
    assert run(capsys, "generate", "x", "--model", checkpoint, "--top-p", "2")[0] == 2


def test_thinking_is_dimmed_on_a_terminal_and_raw_elsewhere():
    text = "<think>\nwhy\n</think>\n\nanswer<think>so</think>end"
    screen, file = Terminal(), io.StringIO()
    for out in (screen, file):
        display = Display(out, opened=False)
        for character in text:
            display.write(character)
        display.close(text)
    assert file.getvalue() == text + "\n"
    plain = screen.getvalue().replace("\x1b[2m", "").replace("\x1b[0m", "")
    assert plain == "why\n\nanswer\n\nso\n\nend\n"
    assert "\x1b[2mw\x1b[0m" in screen.getvalue() and screen.getvalue().endswith("end\n")


def test_an_interrupt_keeps_what_there_is(capsys, checkpoint, monkeypatch):
    interrupting(monkeypatch, after=6)
    argv = ["generate", "hello", "--model", checkpoint, "--max-new-tokens", "20"]
    status, out, err = run(capsys, *argv)
    assert status == 130 and out == expected_text(checkpoint, "hello", 5) + "\n"
    assert "interrupted" in err and "Traceback" not in err


@pytest.mark.parametrize("after", [1, 4])
def test_an_interrupt_leaves_valid_json(capsys, checkpoint, monkeypatch, after):
    interrupting(monkeypatch, after)
    argv = ["generate", "hello", "--model", checkpoint, "--json", "--logprobs", "2"]
    status, out, _ = run(capsys, *argv)
    entry = json.loads(out)["outputs"][0]
    assert status == 130 and entry["finish_reason"] == "interrupted"
    assert len(entry["tokens"]) == len(entry["logprobs"]) == after - 1


def process(*argv):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "falcon_h1r", *map(str, argv)],
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A background job of a script starts with SIGINT ignored, and hands that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_the_module_is_the_program_and_stdin_is_a_prompt(checkpoint):
    child = process("generate", "--model", checkpoint, "--max-new-tokens", "9")
    out, err = child.communicate("hello\n", timeout=120)
    assert child.returncode == 0, err
    assert out == expected_text(checkpoint, "hello", 9) + "\n"


def test_ctrl_c_and_a_closed_pipe_end_the_program_quietly(checkpoint, tmp_path):
    # Room for more tokens than a busy machine makes before the signal arrives.
    folder = shutil.copytree(checkpoint, tmp_path / "long")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 9000}))
    argv = ["generate", "hello", "--model", folder, "--max-new-tokens", "8000"]
    argv += ["--ops", "reference"]
    child = process(*argv)
    child.stdout.read(1)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=120)
    assert child.returncode == 130 and "Traceback" not in err and "interrupted" in err

    child = process(*argv)
    child.stdout.read(1)
    child.stdout.close()
    assert child.wait(timeout=120) == 141
    assert "Traceback" not in child.stderr.read()
    child.stderr.close()
    child.stdin.close()


def test_info_prints_a_sheet_or_json(capsys, checkpoint):
    status, out, err = run(capsys, "info", "falcon-h1r-7b")
    assert status == 0 and "7,585,648,736" in out and err == ""
    argv = ["--json", "--context", "10", "20", "--traces", "3", "--dtype", "float32"]
    status, out, _ = run(capsys, "info", checkpoint, *argv)
    document = json.loads(out)
    assert status == 0 and document["dtype"] == "float32"
    assert [row["context"] for row in document["decode"]] == [10, 20]
    _, out, _ = run(capsys, "info", checkpoint, "--json", "--traces", "3", "--bandwidth", "100")
    row = json.loads(out)["decode"][0]
    assert row["steps_per_second"] == pytest.approx(100e9 / row["moved_bytes"]["total"])
    assert run(capsys, "info", "falcon-h1r-7b", "--revision", "main")[0] == 2
    assert "without effect" not in out


def test_info_lists_keys_without_effect(capsys, tmp_path):
    values = FalconH1Config.preset("tiny-90m").to_dict()
    values |= {"unsloth_version": "1", "sliding_window": None}
    (tmp_path / "config.json").write_text(json.dumps(values))
    status, out, _ = run(capsys, "info", tmp_path)
    assert status == 0
    assert out.endswith("of config.json without effect here: 'sliding_window', 'unsloth_version'\n")
    _, out, _ = run(capsys, "info", tmp_path, "--json")
    assert json.loads(out)["ignored_keys"] == ["sliding_window", "unsloth_version"]


def test_check_refuses_weights_that_are_not_finite(capsys, tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint")
    model = FalconH1ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.model["layers"][1].mamba.out_proj.weight[2, 3] = torch.nan
    model.save_pretrained(folder)
    argv = ["generate", "hello", "--model", folder, "--max-new-tokens", "2"]
    status, out, err = run(capsys, *argv, "--check")
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert "model.layers.1.mamba.out_proj.weight" in err and "nan" in err
