"""The embedded checkpoint by its name, and the text it gives."""

from pathlib import Path

import pytest
import torch

import falcon_h1r
from falcon_h1r import (
    CheckpointError,
    FalconH1Config,
    FalconH1ForCausalLM,
    SamplingParams,
    generate,
    load_tokenizer,
)
from falcon_h1r.checkpoint import resolve, stored_dtype

FOLDER = Path(falcon_h1r.__file__).parent / "assets" / "h1r-pico"


def test_it_is_found_by_its_name():
    assert resolve("h1r-pico").samefile(FOLDER)
    assert FalconH1Config.from_pretrained("h1r-pico") == FalconH1Config.from_pretrained(FOLDER)
    assert load_tokenizer("h1r-pico").vocab_size == load_tokenizer(FOLDER).vocab_size


def test_its_weights_come_as_they_are_stored():
    model = FalconH1ForCausalLM.from_pretrained("h1r-pico")
    assert model.dtype == stored_dtype("h1r-pico") == torch.float32
    assert model.source.samefile(FOLDER) and not model.training


@pytest.mark.parametrize(
    "read", [FalconH1Config.from_pretrained, FalconH1ForCausalLM.from_pretrained, load_tokenizer]
)
def test_it_has_no_revisions(read):
    with pytest.raises(CheckpointError, match="revision='main': the embedded h1r-pico has none"):
        read("h1r-pico", revision="main")


def test_a_folder_of_its_name_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "h1r-pico").mkdir()
    assert resolve("h1r-pico") == Path("h1r-pico")


def test_text_comes_out():
    model, tokenizer = FalconH1ForCausalLM.from_pretrained("h1r-pico"), load_tokenizer("h1r-pico")
    ids = tokenizer.encode_chat([{"role": "user", "content": "What is 2+3?"}])
    params = SamplingParams(max_new_tokens=64)
    out = generate(model, torch.tensor([ids]), params, tokenizer=tokenizer)
    assert "\\boxed{5}" in out.texts[0]
    first = f"  0: {len(out.sequences[0])} tokens, stop: {out.texts[0]!r}"
    assert repr(out) == f"GenerateOutput of 1 sequence\n{first}"


def test_many_long_outputs_stay_readable():
    model = FalconH1ForCausalLM.from_pretrained("h1r-pico")
    params = SamplingParams(max_new_tokens=80, n=20, temperature=5.0, seed=1, stop_token_ids=())
    lines = repr(generate(model, [[1, 2, 3]], params)).splitlines()
    assert lines[0] == "GenerateOutput of 20 sequences" and lines[-1] == "  and 12 more"
    assert len(lines) == 10 and all(len(line) < 200 for line in lines)
    assert lines[1].startswith("  0: 80 tokens, length: [") and " ... " in lines[1]


def test_a_tokenizer_says_what_it_is():
    shown = repr(load_tokenizer("h1r-pico"))
    assert shown.startswith("Tokenizer(") and "eos_token '<|end_of_text|>' = " in shown
    assert f"{load_tokenizer('h1r-pico').vocab_size} tokens" in shown
    assert "chat template" in shown and "0x" not in shown
