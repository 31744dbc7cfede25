import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_text import PLAIN_TEMPLATE, SPECIAL, VOCAB_SIZE, build_backend, write_tokenizer
from tokenizers import processors
from transformers import AutoTokenizer

from falcon_h1r.checkpoint import CheckpointError
from falcon_h1r.text import ChatTemplateError, Tokenizer, load_tokenizer

TOKENIZER = Tokenizer(build_backend())


@given(st.text())
def test_any_text_comes_back_as_it_was(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_decoding_takes_tensors_skips_special_tokens_on_request_and_ignores_unused_ids():
    ids = TOKENIZER.encode("<|im_start|>hello<think>")
    assert TOKENIZER.decode(ids) == "<|im_start|>hello<think>"
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "hello<think>"
    assert TOKENIZER.decode([*ids, VOCAB_SIZE + 7]) == "<|im_start|>hello<think>"
    torch = pytest.importorskip("torch")
    assert TOKENIZER.decode(torch.tensor(ids)) == TOKENIZER.decode(ids)


def test_special_ids_come_from_the_config(tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 3, 0)
    assert tokenizer.vocab_size == VOCAB_SIZE
    assert tokenizer.token_to_id("</think>") == 6 and tokenizer.token_to_id("nothing") is None
    bare = Tokenizer(build_backend())
    assert (bare.bos_token_id, bare.eos_token_id, bare.pad_token_id) == (None, None, None)


def test_special_tokens_may_be_objects(tmp_path):
    write_tokenizer(tmp_path, eos_token={"content": SPECIAL[4], "lstrip": False})
    assert load_tokenizer(tmp_path).eos_token_id == 4


BOS, EOS = (SPECIAL[1], 1), (SPECIAL[3], 3)
POST_PROCESSORS = {
    "none": None,
    "offsets_only": processors.ByteLevel(trim_offsets=False),
    "bos": processors.TemplateProcessing(single=[BOS[0], "$A"], special_tokens=[BOS]),
    "both": processors.TemplateProcessing(single=[BOS[0], "$A", EOS[0]], special_tokens=[BOS, EOS]),
}


@pytest.mark.parametrize("flag", [None, True, False])
@pytest.mark.parametrize("added", POST_PROCESSORS)
def test_encoding_and_special_tokens_are_transformers(tmp_path, added, flag):
    write_tokenizer(tmp_path, **({} if flag is None else {"add_bos_token": flag}))
    if POST_PROCESSORS[added] is not None:
        backend = build_backend()
        backend.post_processor = POST_PROCESSORS[added]
        backend.save(str(tmp_path / "tokenizer.json"))
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("hello 12", "", "é€😀 <think>x</think>\n\n", "<|im_start|>user\nhello"):
        assert ours.encode(text) == theirs.encode(text)
        plain = ours.encode(text, add_special_tokens=False)
        assert plain == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(plain) == theirs.decode(plain)
    assert len(ours.encode("a")) == 1 + {"bos": 1, "both": 2}.get(added, 0)


def test_truncation_and_padding_stored_in_the_file_are_off(tmp_path):
    write_tokenizer(tmp_path)
    backend = build_backend()
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(load_tokenizer(tmp_path).encode("abcd")) == 4


def test_templates_are_found_where_released_checkpoints_have_them(tmp_path):
    hello = [{"role": "user", "content": "hello"}]

    def rendered(folder):
        return load_tokenizer(folder).apply_chat_template(hello)

    folder = write_tokenizer(tmp_path / "string", None, chat_template="S{{ messages|length }}")
    assert rendered(folder) == "S1"
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    folder = write_tokenizer(tmp_path / "named", None, chat_template=named)
    assert rendered(folder) == "D"
    assert load_tokenizer(folder).apply_chat_template(hello, tools=[{"name": "f"}]) == "T"
    folder = write_tokenizer(tmp_path / "both", "F", chat_template="S")
    assert rendered(folder) == "F", "the file wins"
    extra = tmp_path / "extra"
    write_tokenizer(extra, "F")
    (extra / "additional_chat_templates").mkdir()
    (extra / "additional_chat_templates" / "tool_use.jinja").write_text("X")
    assert load_tokenizer(extra).chat_templates == {"default": "F", "tool_use": "X"}
    assert load_tokenizer(write_tokenizer(tmp_path / "none", None)).chat_templates == {}


def test_without_a_template_the_error_says_so(tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, None))
    with pytest.raises(ChatTemplateError, match=r"no chat template named 'default'.*has: none"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])
    only_tools = Tokenizer(build_backend(), chat_templates={"tool_use": "T"})
    with pytest.raises(ChatTemplateError, match="has: tool_use"):
        only_tools.apply_chat_template([{"role": "user", "content": "x"}])


def test_encode_chat_adds_no_token_to_the_rendered_text(tmp_path):
    write_tokenizer(tmp_path)
    backend = build_backend()
    backend.post_processor = POST_PROCESSORS["both"]
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    messages = [{"role": "user", "content": "hello"}]
    text = tokenizer.apply_chat_template(messages)
    assert text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.encode_chat(messages)
    assert tokenizer.decode(ids) == text and ids[0] == 2
    shorter = tokenizer.encode_chat(messages, add_generation_prompt=False)
    assert ids[: len(shorter)] == shorter and len(shorter) < len(ids)


def test_a_pointer_in_place_of_the_file_is_called_so(tmp_path):
    folder = write_tokenizer(tmp_path / "t", None)
    (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"tokenizer\.json is a git-lfs pointer"):
        load_tokenizer(folder)


def test_a_length_beyond_64_bits_is_read(tmp_path):
    """transformers writes it where a tokenizer has no limit."""
    folder = write_tokenizer(tmp_path / "t", None)
    (folder / "tokenizer_config.json").write_text(f'{{"model_max_length": {int(1e30)}}}')
    load_tokenizer(folder)


def test_missing_and_broken_files_are_refused_by_name(tmp_path):
    with pytest.raises(CheckpointError, match="no-such-folder"):
        load_tokenizer(tmp_path / "no-such-folder")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"there is no tokenizer\.json"):
        load_tokenizer(tmp_path / "empty")
    broken = write_tokenizer(tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: "):
        load_tokenizer(broken)
    for content, message in (
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object, found list"),
        ('{"chat_template": [1]}', "neither a string nor a list"),
    ):
        folder = write_tokenizer(tmp_path / "config", None)
        (folder / "tokenizer_config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            load_tokenizer(folder)


def test_special_tokens_given_from_python_are_in_the_vocabulary():
    with pytest.raises(ValueError, match="eos_token '<none>' is not in the vocabulary"):
        Tokenizer(build_backend(), special_tokens={"eos_token": "<none>"})


def test_only_strings_are_encoded():
    with pytest.raises(ValueError, match="expected a string, found list"):
        TOKENIZER.encode(["a"])
    with pytest.raises(ValueError, match=r"encode: the text is no UTF-8 text: .*U\+D800"):
        TOKENIZER.encode("a\ud800")


def test_a_plain_template_is_the_default_of_the_helpers(tmp_path):
    assert load_tokenizer(write_tokenizer(tmp_path)).chat_templates == {"default": PLAIN_TEMPLATE}
