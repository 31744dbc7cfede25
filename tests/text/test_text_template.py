from datetime import datetime

import pytest
from tiny_text import FAULTY_TEMPLATE, PLAIN_TEMPLATE, build_backend, write_tokenizer
from transformers import AutoTokenizer

from falcon_h1r.text import ChatTemplateError, Tokenizer, load_tokenizer, mend_chat_template

USER = {"role": "user", "content": "1+1?"}
SYSTEM = {"role": "system", "content": "Be brief."}
THOUGHT = {"role": "assistant", "content": "2", "reasoning_content": "one and one"}
CALL = {
    "role": "assistant",
    "content": "",
    "reasoning_content": "ask",
    "tool_calls": [{"function": {"name": "add", "arguments": {"a": "é<1>"}}}],
}
TOOL = {"role": "tool", "content": "2"}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "<sum> of 'ünï' & co"}}]

CONVERSATIONS = {
    "user": [USER],
    "system": [SYSTEM, USER],
    "turns": [USER, THOUGHT, {"role": "user", "content": " more\n"}],
    "answered": [USER, THOUGHT],
    "system_answered": [SYSTEM, USER, THOUGHT],
    "tools": [SYSTEM, USER, CALL, TOOL, TOOL],
    "none_values": [USER, {"role": "assistant", "content": "x", "reasoning_content": None}],
}
TEMPLATES = {
    "faulty": FAULTY_TEMPLATE,
    "mended": mend_chat_template(FAULTY_TEMPLATE),
    "plain": PLAIN_TEMPLATE,
    "tokens": "{{ bos_token }}{{ messages[0]['content'] | trim }}{{ eos_token }}{{ unk_token }}",
    "tojson": "{% for m in messages %}{{ [m.role, m.content] | tojson(indent=2) }}{% endfor %}",
    "loopcontrols": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
    "{{ m.role }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}\n"
    "{% endfor %}",
    "whitespace": "  {% if true %}\n  a\n  {%- endif %}\n   {# note #}\nb\n{% set x = 1 %}\n\n c",
    "tools": "{% if tools %}{{ tools | tojson }}{% else %}none{% endif %}{{ documents }}",
    "presence": "{% for m in messages %}{{ 'reasoning_content' in m }}{% endfor %}",
    "variable": "{{ thinking_mode | default('unset') }}",
}


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_rendering_is_transformers(tmp_path, template, conversation):
    write_tokenizer(tmp_path, TEMPLATES[template])
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for options in (
        {},
        {"add_generation_prompt": False},
        {"tools": TOOLS},
        {"thinking_mode": "on", "bos_token": "override"},
    ):
        options = {"add_generation_prompt": True, **options}
        expected = theirs.apply_chat_template(
            CONVERSATIONS[conversation], tokenize=False, **options
        )
        assert ours.apply_chat_template(CONVERSATIONS[conversation], **options) == expected


def render(source, messages, **options):
    options = {"add_generation_prompt": False, **options}
    return Tokenizer(build_backend(), chat_templates={"default": source}).apply_chat_template(
        messages, **options
    )


def test_the_released_templates_fault_and_its_mend():
    reasoning = "<think>\none and one\n</think>\n\n2<|im_end|>"
    assert render(FAULTY_TEMPLATE, [USER, THOUGHT]).endswith(reasoning)
    assert "one and one" not in render(FAULTY_TEMPLATE, [SYSTEM, USER, THOUGHT])
    mended = mend_chat_template(FAULTY_TEMPLATE)
    assert render(mended, [SYSTEM, USER, THOUGHT]).endswith(reasoning)
    # Earlier turns still lose theirs.
    assert "one and one" not in render(mended, [SYSTEM, USER, THOUGHT, USER])


def test_the_mend_changes_nothing_without_a_system_message_or_before_an_answer():
    mended = mend_chat_template(FAULTY_TEMPLATE)
    for messages in CONVERSATIONS.values():
        without = [m for m in messages if m["role"] != "system"]
        assert render(mended, without) == render(FAULTY_TEMPLATE, without)
        asking = [*messages, USER]
        assert not any(m["role"] == "tool" for m in messages) or len(asking) > 2
        if not any(m["role"] == "tool" for m in messages):
            assert render(mended, asking) == render(FAULTY_TEMPLATE, asking)


def test_the_mend_groups_neighbouring_tool_results_behind_a_system_message():
    messages = [SYSTEM, USER, CALL, TOOL, TOOL]
    block = "\n<tool_response>\n2\n</tool_response>"
    mended = render(mend_chat_template(FAULTY_TEMPLATE), messages)
    assert mended.endswith(f"<|im_start|>user{block}{block}<|im_end|>\n")
    assert render(FAULTY_TEMPLATE, messages) != mended


def test_the_mend_refuses_templates_without_the_fault():
    for source in (PLAIN_TEMPLATE, "", mend_chat_template(FAULTY_TEMPLATE)):
        with pytest.raises(ChatTemplateError, match="does not have the fault"):
            mend_chat_template(source)


def test_templates_can_refuse_and_ask_for_the_date():
    with pytest.raises(ChatTemplateError, match="chat template: roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}", [USER])
    year = str(datetime.now().year)
    assert render("{{ strftime_now('%Y') }}", [USER]) == year


def test_a_syntax_error_names_its_line():
    with pytest.raises(ChatTemplateError, match="line 2: "):
        render("a\n{% if %}", [USER])


@pytest.mark.parametrize(
    "source",
    ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}",
     "{{ messages[0].update(role='x') }}"],
)  # fmt: skip
def test_templates_run_in_a_sandbox(source):
    with pytest.raises(ChatTemplateError, match="chat template: "):
        render(source, [USER])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        ("hello", "at least one message"),
        ([{"content": "x"}], r"messages\[0\]: expected a dict with a 'role'"),
        ([USER, "x"], r"messages\[1\]"),
    ],
)
def test_what_is_no_conversation_is_refused(messages, message):
    with pytest.raises(ChatTemplateError, match=message):
        render(PLAIN_TEMPLATE, messages)


def test_tools_are_schemas_not_functions():
    with pytest.raises(ChatTemplateError, match="tools: expected a list of JSON objects as dicts"):
        render(PLAIN_TEMPLATE, [USER], tools=[print])


def test_a_missing_content_is_an_error_not_a_traceback():
    with pytest.raises(ChatTemplateError, match="chat template: "):
        render("{{ 'a' + messages[0].content }}", [{"role": "user"}])


def test_messages_are_not_changed():
    message = {"role": "user", "content": "x", "name": None}
    render(PLAIN_TEMPLATE, [message])
    assert message == {"role": "user", "content": "x", "name": None}
