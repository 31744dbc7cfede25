"""Tokens named outside tokenizer.json: every file and key, beside transformers."""

import json
import random

import pytest
from tiny_text import SPECIAL, VOCAB_SIZE, build_backend, write_tokenizer
from tokenizers import AddedToken, normalizers
from transformers import AutoTokenizer

from falcon_h1r.text import load_tokenizer

TEXTS = ["hello", "hell", "l", "12", "éé", "<a>", "<b>", "  <c> ", "[X]", "<think>", *SPECIAL[:4:3]]
NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask", "image")


def same(folder, texts) -> None:
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in texts:
        ids = ours.encode(text)
        assert ids == theirs.encode(text), text
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.special_tokens == theirs.special_tokens_map
    assert ours.vocab_size == len(theirs)
    for name in ("bos", "eos", "pad"):
        assert getattr(ours, f"{name}_token_id") == getattr(theirs, f"{name}_token_id")


CASES = {
    "added_tokens.json": {"added_tokens.json": {"<a>": 300, "hello": 301}},
    "decoder": {
        "tokenizer_config.json": {
            "added_tokens_decoder": {
                "300": {"content": "<a>", "special": True},
                "7": {"content": "<b>", "lstrip": True, "normalized": False, "special": False},
            }
        },
        "added_tokens.json": {"[X]": 302},
        "special_tokens_map.json": {"eos_token": "<not read>"},
    },
    "extra": {"tokenizer_config.json": {"extra_special_tokens": ["<a>", "[X]"]}},
    "extra, named": {"tokenizer_config.json": {"extra_special_tokens": {"image_token": "<a>"}}},
    "additional": {"tokenizer_config.json": {"additional_special_tokens": ["<a>", "[X]"]}},
    "additional in the map": {"special_tokens_map.json": {"additional_special_tokens": ["<a>"]}},
    "not in the vocabulary": {
        "tokenizer_config.json": {"pad_token": "<a>", "unk_token": "<b>", "bos_token": "[X]"}
    },
    "the map wins": {
        "tokenizer_config.json": {"eos_token": SPECIAL[4], "unk_token": SPECIAL[0]},
        "special_tokens_map.json": {"eos_token": {"content": SPECIAL[2], "lstrip": True}},
    },
    "own name": {"tokenizer_config.json": {"image_token": "<a>", "add_bos_token": True}},
    "null": {"tokenizer_config.json": {"pad_token": None, "unk_token": ""}},
    "split": {"tokenizer_config.json": {"split_special_tokens": True, "unk_token": "<a>"}},
}


@pytest.mark.parametrize("case", CASES)
def test_every_file_and_key_is_read_as_transformers_reads_it(tmp_path, case):
    write_tokenizer(tmp_path)
    for name, content in CASES[case].items():
        old = tmp_path / name
        values = json.loads(old.read_text()) if old.exists() else {}
        old.write_text(json.dumps({**values, **content}))
    same(tmp_path, [f"{a}{b} hello <a>[X]<b>" for a in TEXTS for b in TEXTS])


def test_a_new_token_takes_the_next_id(tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, pad_token="<new>", unk_token="<two>"))
    assert (tokenizer.token_to_id("<two>"), tokenizer.pad_token_id) == (VOCAB_SIZE, VOCAB_SIZE + 1)
    assert tokenizer.encode("a<new>")[-1] == VOCAB_SIZE + 1


def write_random(r: random.Random, folder) -> None:
    """The files of a tokenizer that name tokens at random, in every way they can be written."""

    def flags(names="single_word lstrip rstrip normalized special"):
        return {name: r.random() < 0.4 for name in names.split() if r.random() < 0.8}

    def token(of=("", "", "AddedToken")):
        text, kind = r.choice(TEXTS), r.choice(of)
        return {"__type": kind, "content": text, **flags()} if kind else text

    def many(item):
        return [item() for _ in range(r.randrange(3))]

    def older(names="single_word lstrip rstrip normalized special"):
        text = r.choice(TEXTS)
        return text if r.random() < 0.5 else {"content": text, **flags(names)}

    folder.mkdir(parents=True)
    backend = build_backend(tags=r.random() < 0.7)
    if r.random() < 0.4:
        backend.normalizer = normalizers.Lowercase()
    if r.random() < 0.2:
        backend.enable_padding(pad_token=r.choice([SPECIAL[0], "[PAD]"]))
    if r.random() < 0.3:
        backend.add_tokens([AddedToken(r.choice(TEXTS), **flags())])
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name in NAMES:
        if r.random() < 0.3:
            config[f"{name}_token"] = None if r.random() < 0.1 else token()
    if r.random() < 0.3:
        config["added_tokens_decoder"] = {
            str(r.randrange(400)): {"content": r.choice(TEXTS), **flags()}
            for _ in range(r.randrange(4))
        }
    if r.random() < 0.3:
        named = {f"x{i}_token": r.choice(TEXTS) for i in range(2)}
        config["extra_special_tokens"] = many(token) if r.random() < 0.6 else named
    if r.random() < 0.3:
        config["additional_special_tokens"] = many(token)
    if r.random() < 0.1:
        config["split_special_tokens"] = r.random() < 0.5
    special_map = {f"{name}_token": older() for name in NAMES if r.random() < 0.3}
    if r.random() < 0.3:
        special_map["additional_special_tokens"] = [r.choice(TEXTS) for _ in range(2)]
    if r.random() < 0.2:
        names = "single_word lstrip rstrip normalized"
        special_map["extra_special_tokens"] = many(lambda: older(names))
    added = {r.choice(TEXTS): r.randrange(400) for _ in range(r.randrange(3))}
    files = {"tokenizer_config.json": (0.9, config), "special_tokens_map.json": (0.4, special_map)}
    for name, (share, content) in {**files, "added_tokens.json": (0.3, added)}.items():
        if r.random() < share:
            (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
    "seeds", [range(60), pytest.param(range(60, 2000), marks=pytest.mark.slow)]
)
def test_random_tokenizers_encode_as_transformers_do(tmp_path, seeds):
    for seed in seeds:
        r, folder = random.Random(seed), tmp_path / str(seed)
        write_random(r, folder)
        pieces = [*TEXTS, " ", "a", "Hello", "<A>"]
        same(folder, ["".join(r.choices(pieces, k=12)) for _ in range(6)])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", {"eos_token": 5}, "eos_token is 5, expected a string"),
        ("tokenizer_config.json", {"eos_token": {"x": "y"}}, r"eos_token is \{'x': 'y'\}"),
        ("tokenizer_config.json", {"eos_token": "\ud800"}, "lone surrogate"),
        ("tokenizer_config.json", {"extra_special_tokens": 5}, "extra_special_tokens is 5"),
        ("tokenizer_config.json", {"extra_special_tokens": [5]}, "extra_special_tokens is 5"),
        ("tokenizer_config.json", {"additional_special_tokens": {}}, "expected a list"),
        ("tokenizer_config.json", {"added_tokens_decoder": []}, r"added_tokens_decoder is \[\]"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}, "has the id 'x'"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": {}}}, "'1' is"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"1": {"content": "a", "lstrip": 3}}},
            "lstrip is 3, expected true or false",
        ),
        ("tokenizer_config.json", {"split_special_tokens": "yes"}, "split_special_tokens is 'yes'"),
        ("special_tokens_map.json", {"pad_token": [1]}, r"pad_token is \[1\]"),
        ("added_tokens.json", {"<a>": "1"}, "'<a>' has the id '1', expected an integer >= 0"),
        ("added_tokens.json", {"<a>": -1}, "has the id -1"),
        ("added_tokens.json", {"\udfff": 1}, "lone surrogate"),
    ],
)
def test_what_is_no_token_is_refused_by_file_and_key(tmp_path, file, content, message):
    write_tokenizer(tmp_path)
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{tmp_path}.*{file}.*{message}") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)
