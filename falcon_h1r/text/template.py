"""Chat templates: the jinja environment they are written for, and the mend for the released one."""

from __future__ import annotations

import json
import re
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


class ChatTemplateError(ValueError):
    """A chat template that is missing, does not compile, or refuses the messages it is given."""


class _GenerationBlock(Extension):
    """Accepts `{% generation %} ... {% endgeneration %}`, trainers' marks of assistant text."""

    tags = frozenset({"generation"})

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # jinja's own filter escapes <, >, & and ', which models were not trained on.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def compile_template(source: str) -> jinja2.Template:
    """Compile a chat template in the environment transformers gives it.

    Sandboxed, with trimmed blocks, loop controls, `{% generation %}`, `tojson` without HTML
    escapes, `raise_exception` and `strftime_now`. Raises `ChatTemplateError` with the line of a
    syntax error.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ChatTemplateError(f"chat template, line {error.lineno}: {error.message}") from error


def render_template(
    template: jinja2.Template,
    messages: list[dict[str, Any]],
    *,
    add_generation_prompt: bool,
    tools: list[dict[str, Any]] | None,
    variables: dict[str, Any],
) -> str:
    """Render messages; keys whose value is None are dropped, since templates test for a key's
    presence.

    Raises `ChatTemplateError` for what is not a conversation and for everything the template
    refuses.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ChatTemplateError("messages: expected a list with at least one message")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ChatTemplateError(
                f"messages[{number}]: expected a dict with a 'role', found {message!r:.80}"
            )
    if tools is not None and not all(isinstance(tool, dict) for tool in tools):
        raise ChatTemplateError("tools: expected a list of JSON schemas as dicts")
    plain = [{key: value for key, value in m.items() if value is not None} for m in messages]
    try:
        return template.render(
            messages=plain,
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **variables,
        )
    except (jinja2.TemplateError, TypeError) as error:
        raise ChatTemplateError(f"chat template: {error}") from error


_LOOP = re.compile(r"for\s+message\s+in\s+remaining_messages\b")
_COMPARISON = "loop.index0 > ns.last_query_index"
_NEIGHBOUR = re.compile(r"(?<![\w.])messages\[loop\.index0 ([+-]) 1\]")


def mend_chat_template(source: str) -> str:
    """Mend the index fault of the Falcon-H1R template; returns the mended source.

    The released template looks for the last user query in all messages, but its loop counts without
    the system message. With an explicit system message the index is one too high: the last
    assistant turn counts as an earlier one and loses its reasoning, and neighbouring tool results
    are looked up one place off. Without a system message nothing is wrong, and the mend changes
    nothing.

    Prompts that end with a user message render the same either way, so generation may use the
    template as it was released. Mend it where the last assistant turn matters: supervised
    fine-tuning with system messages, and tool calls in the middle of a reasoning turn.

    Raises `ChatTemplateError` if `source` does not have the fault.
    """
    if source.count(_COMPARISON) != 1 or not _LOOP.search(source):
        raise ChatTemplateError(
            "mend_chat_template: this template does not have the fault of the Falcon-H1R template"
        )
    skipped = "(messages|length - remaining_messages|length)"
    mended = source.replace(_COMPARISON, f"loop.index0 + {skipped} > ns.last_query_index")
    return _NEIGHBOUR.sub(r"remaining_messages[loop.index0 \1 1]", mended)
