"""Chat templates: compiled and rendered within limits, and the mend for the released one."""

from __future__ import annotations

import functools
import re
import reprlib
from typing import Any

import jinja2

from ..checks import check_text
from .meter import METER, MOST_CHARACTERS, Meter, TooMuch
from .sandbox import Sandbox

MOST_SOURCE = 100_000  # characters of a template
_MOST_REASON = 300  # characters of what an error says


class ChatTemplateError(ValueError):
    """A chat template that is missing, does not compile, refuses the messages it is given, fails
    with any error, or costs more than rendering may."""


@functools.cache
def _sandbox() -> Sandbox:
    return Sandbox()


def compile_template(source: str) -> jinja2.Template:
    """Compile a chat template in the environment transformers gives it; see `Sandbox`.

    Raises `ChatTemplateError` for what is no string, has more than MOST_SOURCE characters or does
    not compile, with the line of a syntax error.
    """
    if not isinstance(source, str):
        raise ChatTemplateError(f"chat template is {reprlib.repr(source)}, expected a string")
    if len(source) > MOST_SOURCE:
        raise ChatTemplateError(
            f"chat template has {len(source)} characters, expected at most {MOST_SOURCE}"
        )
    try:
        return _sandbox().compile_metered(source)
    except jinja2.TemplateSyntaxError as error:
        raise ChatTemplateError(
            f"chat template, line {error.lineno}: {_reason(error.message)}"
        ) from error
    except Exception as error:  # a program of others: anything may come out of it
        raise _failed(error) from error


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

    Raises `ChatTemplateError` for what is not a conversation, for every error in the template, for
    an output that is no Unicode text, and beyond the limits of `meter`: 5 seconds, 10,000,000
    characters of output, and 256 MiB of values on the way.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ChatTemplateError("messages: expected a list with at least one message")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ChatTemplateError(
                f"messages[{number}]: expected a dict with a 'role', found {reprlib.repr(message)}"
            )
        for key, value in message.items():
            if isinstance(value, str):
                check_text(f"messages[{number}][{key!r}]", value, ChatTemplateError)
    for name, value in (("tools", tools), ("documents", variables.get("documents"))):
        of_dicts = isinstance(value, (list, tuple)) and all(isinstance(v, dict) for v in value)
        if value is not None and not of_dicts:
            raise ChatTemplateError(
                f"{name}: expected a list of JSON objects as dicts, found {reprlib.repr(value)}"
            )
    plain = [{key: value for key, value in m.items() if value is not None} for m in messages]
    names = {
        "documents": None,
        **variables,
        "messages": plain,
        "tools": tools,
        "add_generation_prompt": add_generation_prompt,
    }
    before = METER.set(Meter())
    try:
        text = _joined(template.generate(names))
    except Exception as error:  # a program of others: anything may come out of it
        raise _failed(error) from error
    finally:
        METER.reset(before)
    check_text("chat template: its output", text, ChatTemplateError)
    return text


def _joined(pieces) -> str:
    kept, size = [], 0
    for piece in pieces:
        kept.append(piece)
        size += len(piece)
        if size > MOST_CHARACTERS:
            raise TooMuch(f"its output has more than {MOST_CHARACTERS} characters")
    return "".join(kept)


def _failed(error: Exception) -> ChatTemplateError:
    try:
        words = _reason(str(error))
    except Exception:  # such as a key that is a long integer
        words = ""
    if not isinstance(error, (jinja2.TemplateError, TooMuch)):
        words = f"{type(error).__name__}: {words}".removesuffix(": ")
    return ChatTemplateError(f"chat template: {words}")


def _reason(text: str) -> str:
    """In one line of text that can be printed."""
    line = " ".join(text[: 10 * _MOST_REASON].split())[:_MOST_REASON]
    return line.encode("utf-8", "backslashreplace").decode()


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
    if not isinstance(source, str):
        raise ChatTemplateError(f"chat template is {reprlib.repr(source)}, expected a string")
    if source.count(_COMPARISON) != 1 or not _LOOP.search(source):
        raise ChatTemplateError(
            "mend_chat_template: this template does not have the fault of the Falcon-H1R template"
        )
    skipped = "(messages|length - remaining_messages|length)"
    mended = source.replace(_COMPARISON, f"loop.index0 + {skipped} > ns.last_query_index")
    return _NEIGHBOUR.sub(r"remaining_messages[loop.index0 \1 1]", mended)
