"""A tiny checkpoint on disk and the means to run the command line on it."""

import functools
import io

import torch
from models import make_config, make_model
from tiny_text import VOCAB_SIZE, write_tokenizer

from falcon_h1r.cli import main
from falcon_h1r.generation import SamplingParams, generate
from falcon_h1r.text import load_tokenizer


@functools.cache
def tiny_model(dtype=torch.float32):
    config = make_config(vocab_size=VOCAB_SIZE, eos_token_id=4, max_position_embeddings=160)
    return make_model(config, dtype=dtype)


def write_checkpoint(folder, **options):
    """Model and tokenizer, no generation_config.json; options: of `write_tokenizer`."""
    tiny_model().save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    return write_tokenizer(folder, **options)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(capsys, *argv) -> tuple[int, str, str]:
    try:
        status = main([str(argument) for argument in argv])
    except SystemExit as error:
        status = error.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def expected_text(checkpoint, prompt: str, new: int, raw: bool = False) -> str:
    tokenizer = load_tokenizer(checkpoint)
    messages = [{"role": "user", "content": prompt}]
    ids = tokenizer.encode(prompt) if raw else tokenizer.encode_chat(messages)
    params = SamplingParams(max_new_tokens=new, stop_token_ids=(3, 4))
    return generate(tiny_model(), [ids], params, tokenizer=tokenizer).texts[0]


def interrupting(monkeypatch, after: int):
    """Ctrl-C during forward number `after`, counted from 1."""
    from falcon_h1r.model import FalconH1ForCausalLM

    embed, calls = FalconH1ForCausalLM.embed, []

    def wrapped(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == after:
            raise KeyboardInterrupt
        return embed(self, *args, **kwargs)

    monkeypatch.setattr(FalconH1ForCausalLM, "embed", wrapped)
