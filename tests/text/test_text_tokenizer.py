import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_text import PLAIN_TEMPLATE, SPECIAL, VOCAB_SIZE, build_backend, write_tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import models, processors
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


@pytest.mark.parametrize("where", ["config, list", "config, object", "files"])
def test_named_templates_are_chosen_as_in_transformers(tmp_path, where):
    named = {"default": "D{{ tools }}", "tool_use": "T{{ tools }}", "rag": "R"}
    listed = [{"name": name, "template": text} for name, text in named.items()]
    config = {"config, list": {"chat_template": listed}, "config, object": {"chat_template": named}}
    write_tokenizer(tmp_path, None, **config.get(where, {}))
    if where == "files":
        (tmp_path / "chat_template.jinja").write_text(named["default"])
        (tmp_path / "additional_chat_templates").mkdir()
        for name in ("tool_use", "rag"):
            (tmp_path / "additional_chat_templates" / f"{name}.jinja").write_text(named[name])
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    hello = [{"role": "user", "content": "hello"}]
    for tools in (None, [], [{"name": "f"}]):
        expected = theirs.apply_chat_template(hello, tools=tools, tokenize=False)
        assert ours.apply_chat_template(hello, tools=tools, add_generation_prompt=False) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("chat_template.jinja", b"a\xff", "no UTF-8 text: byte 0xff at offset 1"),
        ("chat_template.jinja", b"a" * 400_001, "has 400001 bytes, expected at most 100000"),
        ("chat_template.jinja", None, "is not a regular file"),
        ("tokenizer_config.json", b'{"chat_template": 5}', "neither a string nor a list"),
        ("tokenizer_config.json", b'{"chat_template": {"default": 5}}', "neither a string"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "a"}]}', "neither a string"),
        ("tokenizer_config.json", b"[" * 100_000, "not valid JSON"),
    ],
)
def test_a_template_that_cannot_be_read_is_refused_by_file(tmp_path, name, content, message):
    write_tokenizer(tmp_path, None)
    if content is None:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{tmp_path / name}.*{message}"):
        load_tokenizer(tmp_path)


def test_without_a_template_the_error_says_so(tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, None))
    with pytest.raises(ChatTemplateError, match=r"no chat template named 'default'.*has: none"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])
    only_tools = Tokenizer(build_backend(), chat_templates={"tool_use": "T"})
    with pytest.raises(ChatTemplateError, match="has: tool_use"):
        only_tools.apply_chat_template([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenize": True}, "encode_chat gives token ids"),
        ({"tokenize": True, "return_tensors": "pt"}, "encode_chat gives token ids"),
        ({"return_tensors": "pt"}, "takes no return_tensors"),
        ({"return_dict": True}, "takes no return_dict"),
        ({"padding": "longest"}, "takes no padding"),
        ({"max_length": 5}, "takes no max_length"),
        ({"continue_final_message": True}, "takes no continue_final_message"),
        ({"chat_template": "tool_use"}, "takes no chat_template"),
        ({"documents": "x"}, "documents: expected a list"),
        ({"documents": [1]}, "documents: expected a list"),
    ],
)
def test_options_that_text_cannot_follow_are_refused(tmp_path, options, message):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path))
    hello = [{"role": "user", "content": "hello"}]
    for render in (tokenizer.apply_chat_template, tokenizer.encode_chat):
        with pytest.raises(ChatTemplateError, match=message):
            render(hello, **options)
    assert tokenizer.apply_chat_template(hello, tokenize=False, return_tensors=None)


def test_documents_reach_the_template(tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, "{{ documents[0].title }}"))
    hello = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(hello, documents=[{"title": "A"}]) == "A"


def test_templates_are_given_by_name():
    with pytest.raises(ValueError, match="chat_templates is 'x', expected a dict"):
        Tokenizer(build_backend(), chat_templates="x")


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


def test_what_the_vocabulary_lacks_is_refused():
    tokenizer = Tokenizer(Backend(models.WordLevel({"a": 0}, unk_token="x")))
    with pytest.raises(ValueError, match=r"encode: .*Missing \[UNK\]"):
        tokenizer.encode("b")


@pytest.mark.parametrize("ids", [[-1], [2**70], [1.5], ["a"], [None], [[1]], 5, None, "ab"])
def test_only_ids_are_decoded(ids):
    with pytest.raises(ValueError, match=r"decode: ids is .* expected token ids"):
        TOKENIZER.decode(ids)


def test_a_plain_template_is_the_default_of_the_helpers(tmp_path):
    assert load_tokenizer(write_tokenizer(tmp_path)).chat_templates == {"default": PLAIN_TEMPLATE}
