"""llama.cpp on the files that `save_gguf` writes, where a package brings it."""

import hashlib

import numpy as np
import pytest
import torch
from gguf_cases import CASES, case_model
from models import make_config, make_model, random_ids, relative_error, rms_error, same_weights
from tiny_text import build_backend, write_tokenizer
from tokenizers import Regex, pre_tokenizers

from falcon_h1r import FalconH1Config
from falcon_h1r.bench import llama_library, llama_peer
from falcon_h1r.checkpoint import gguf as writer

FLOAT32_BOUND = 1e-5  # as in test_parity.py
FLOAT16_CACHE_BOUND = 1e-3  # two float16 roundoffs: keys and values are rounded to it

pytestmark = pytest.mark.skipif(
    bool(llama_library.why_not()), reason=f"llama.cpp: {llama_library.why_not()}"
)


def distances(model, ids, start: int, **settings):
    """Errors of ours, llama.cpp's prefill and each row of its decode from `start` on."""
    with torch.no_grad():
        ours, exact = model(ids)[0], same_weights(model, dtype=torch.float64)(ids)[0]
    ids = ids[0].tolist()
    length = len(ids) + 1
    peer = llama_peer.LlamaPeer(model, threads=1, max_length=length, max_sequences=3, **settings)
    try:
        whole = torch.from_numpy(peer.read(ids, every=True))
        last = torch.from_numpy(peer.read(ids[:start]))
        peer.spread(3)
        steps = [peer.step([ids[i]] * 3, i) for i in range(start, len(ids))]
    finally:
        peer.close()
    assert relative_error(last[0], whole[start - 1]) < FLOAT32_BOUND
    rows = torch.from_numpy(np.stack(steps, 1))
    return (
        rms_error(ours, exact),
        rms_error(whole, exact),
        max(rms_error(row, exact[start:]) for row in rows),
    )


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_gives_our_logits(name):
    """The rule of test_parity.py, with llama.cpp as the other implementation."""
    model = case_model(name)
    ids = random_ids(model.config, 1, 60)
    exact = {"kv_dtype": torch.float32, "batch": 32, "micro_batch": 16}
    ours, prefill, decode = distances(model, ids, 45, **exact)
    assert ours < 2 * prefill and max(prefill, decode) < FLOAT32_BOUND
    for rounded in ({"flash_attention": True}, {}, {"flash_attention": True} | exact):
        ours, prefill, decode = distances(model, ids, 45, **rounded)
        # In the last case too: the graph with flash attention casts a float32 cache.
        assert 1e-5 < prefill < FLOAT16_CACHE_BOUND and decode < FLOAT16_CACHE_BOUND


def test_llama_cpp_reads_bfloat16():
    model = case_model("two_groups")
    ids = random_ids(model.config, 1, 40)
    errors = distances(model, ids, 30, dtype=torch.bfloat16, kv_dtype=torch.float32)
    assert 1e-4 < max(errors[1:]) < 10 * 2**-8


@pytest.mark.slow  # 91 million parameters in two dtypes
def test_llama_cpp_gives_our_logits_at_90m():
    config = FalconH1Config.preset("tiny-90m")
    model = make_model(config)
    ids = random_ids(config, 1, 300)
    ours, prefill, decode = distances(model, ids, 260, kv_dtype=torch.float32)
    assert ours < 2 * prefill and max(prefill, decode) < FLOAT32_BOUND


def test_refusals_of_the_peer():
    model = case_model("h1r_like")
    peer = llama_peer.LlamaPeer(model, max_length=256, max_sequences=2, threads=1)
    try:
        with pytest.raises(RuntimeError, match="does not decode 300 tokens"):
            peer.read([1] * 300)
    finally:
        peer.close()


def test_llama_cpp_splits_text_as_the_tokenizer_does(tmp_path, monkeypatch):
    llama_cpp = llama_library.library().functions
    backend = build_backend()
    words = (
        r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(f"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{words}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    folder = write_tokenizer(tmp_path / "tokenizer")
    backend.save(str(folder / "tokenizer.json"))
    digest = hashlib.sha256(str(backend.encode(writer._PROBE).ids).encode()).hexdigest()
    monkeypatch.setattr(writer, "_KNOWN_TOKENIZERS", {digest})
    model = make_model(make_config(vocab_size=backend.get_vocab_size()))
    writer.save_gguf(model, tmp_path / "m.gguf", tokenizer_from=folder)

    settings = llama_cpp.llama_model_default_params()
    settings.vocab_only = True
    loaded = llama_cpp.llama_model_load_from_file(str(tmp_path / "m.gguf").encode(), settings)
    assert loaded
    try:
        text = (
            "<|im_start|>user\nhello 12 121\n\n<think>hell’s 🦙</think><|im_end|>\n" + writer._PROBE
        )
        room = (llama_cpp.llama_token * 2000)()
        raw = text.encode()
        count = llama_cpp.llama_tokenize(
            llama_cpp.llama_model_get_vocab(loaded), raw, len(raw), room, len(room), False, True
        )
    finally:
        llama_cpp.llama_model_free(loaded)
    assert list(room)[:count] == backend.encode(text, add_special_tokens=False).ids
