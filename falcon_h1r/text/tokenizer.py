"""Text to token ids and back, read from a checkpoint's tokenizer.json; chats by its template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from ..checks import check_text
from ..files import foreign_kind, open_file
from ..json_file import read_json
from .added_tokens import ADDED, CONFIG, SPECIAL_MAP, add_tokens
from .template import MOST_SOURCE, ChatTemplateError, compile_template, render_template

# Options of transformers' `apply_chat_template`, which are no variables of a template.
NOT_TAKEN = (
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "padding",
    "truncation",
    "max_length",
    "chat_template",
    "continue_final_message",
    "tokenizer_kwargs",
)


class Tokenizer:
    """A `tokenizers.Tokenizer` with the checkpoint's special tokens and chat templates.

    backend: the tokenizer; its own truncation and padding are switched off.
    chat_templates: jinja sources by name; "default" is used, and "tool_use" where there is one and
        tools are given.
    special_tokens: name such as "eos_token" -> text; each must be in the vocabulary or "".

    Raises `ValueError` for a special token that is not in the vocabulary.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        chat_templates: dict[str, str] | None = None,
        special_tokens: dict[str, str] | None = None,
    ):
        self.backend = backend
        if not isinstance(chat_templates, dict | None):
            raise ValueError(
                f"chat_templates is {chat_templates!r:.80}, expected a dict of sources by name"
            )
        self.chat_templates = dict(chat_templates or {})
        self.special_tokens = dict(special_tokens or {})
        self._compiled: dict[str, Any] = {}
        backend.no_truncation()
        backend.no_padding()
        for name, text in self.special_tokens.items():
            if text and backend.token_to_id(text) is None:
                raise ValueError(f"tokenizer: {name} {text!r} is not in the vocabulary")

    def __repr__(self) -> str:
        parts = [f"{self.vocab_size} tokens"]
        for name, text in self.special_tokens.items():
            parts.append(f"{name} {text!r} = {self.token_to_id(text)}")
        if self.chat_templates:
            names = ", ".join(sorted(self.chat_templates))
            plural = "" if len(self.chat_templates) == 1 else "s"
            parts.append(f"chat template{plural}: {names}")
        else:
            parts.append("no chat template")
        return f"Tokenizer({'; '.join(parts)})"

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; a model's vocabulary may be padded beyond it."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def bos_token_id(self) -> int | None:
        return self._special_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._special_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._special_id("pad_token")

    def _special_id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self.backend.token_to_id(text)

    def token_to_id(self, token: str) -> int | None:
        """Id of a token as it stands in the vocabulary, None if it is not there."""
        return self.backend.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written out in it are recognised.

        add_special_tokens: also add what tokenizer.json's post-processor puts around a text, such
        as a begin-of-text token. Leave it off for rendered chats, which hold all of theirs.
        Raises `ValueError` for what is no string, holds half of a surrogate pair, or holds what
        the vocabulary has no token for.
        """
        if not isinstance(text, str):
            raise ValueError(f"encode: expected a string, found {type(text).__name__}")
        check_text("encode: the text", text)
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except Exception as error:  # the wheel raises bare Exception, as for a missing unk token
            raise ValueError(f"encode: {error}") from error

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of `ids` (any sequence of ints, a 1-D tensor included); U+FFFD for broken UTF-8.

        Ids between the tokenizer's and the model's vocabulary size, which training never uses,
        decode to nothing. Raises `ValueError` for what are no ids.
        """
        try:
            ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
            return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)
        except (TypeError, OverflowError) as error:
            raise ValueError(
                f"decode: ids is {ids!r:.80}, expected token ids in one dimension: {error}"
            ) from error

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """Render a conversation as the text the model was trained on.

        messages: dicts with "role" and "content", and "reasoning_content" or "tool_calls" where the
            template knows them.
        add_generation_prompt: end with the header of the assistant's turn.
        tools: JSON schemas; given, they choose the template "tool_use" where there is one.
        variables: further names the template reads, such as `documents`, a list of dicts; they win
            over the special tokens' names. The result is always text: transformers' options of
            `apply_chat_template` that would change that are refused.

        Raises `ChatTemplateError` when there is no template, it fails, or its cost is beyond the
        limits that `render_template` states: 5 seconds, 10,000,000 characters, 256 MiB of values.
        """
        if variables.pop("tokenize", False):
            raise ChatTemplateError(
                "tokenize is true, but apply_chat_template gives text; encode_chat gives token ids"
            )
        for option in NOT_TAKEN:
            if variables.pop(option, None):
                raise ChatTemplateError(f"apply_chat_template takes no {option}")
        name = "tool_use" if tools is not None and "tool_use" in self.chat_templates else "default"
        if name not in self.chat_templates:
            have = ", ".join(sorted(self.chat_templates)) or "none"
            raise ChatTemplateError(f"no chat template named {name!r}; the checkpoint has: {have}")
        if name not in self._compiled:
            self._compiled[name] = compile_template(self.chat_templates[name])
        return render_template(
            self._compiled[name],
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            variables={**self.special_tokens, **variables},
        )

    def encode_chat(self, messages: list[dict[str, Any]], **options: Any) -> list[int]:
        """Token ids of a rendered conversation; takes what `apply_chat_template` takes."""
        text = self.apply_chat_template(messages, **options)
        return self.encode(text, add_special_tokens=False)


def load_tokenizer(path_or_repo_id: str | Path, revision: str | None = None) -> Tokenizer:
    """Read the tokenizer of a local checkpoint folder, a hub repository or "h1r-pico".

    Files: tokenizer.json (required). tokenizer_config.json, special_tokens_map.json and
    added_tokens.json name further tokens, which are added as transformers adds them; see
    `added_tokens`. Templates stand under `chat_template` in tokenizer_config.json (a string, or a
    list of named templates), or in chat_template.jinja and additional_chat_templates/*.jinja, which
    win. `add_bos_token` and `add_eos_token` have no effect beside a tokenizer.json, as in
    transformers: its post-processor says what is added.

    Raises `CheckpointError` when the folder or repository cannot be had, `ValueError` when a file
    is missing or unreadable.
    """
    from ..checkpoint.hub import resolve

    folder = resolve(path_or_repo_id, revision=revision, weights=False)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{folder}: there is no tokenizer.json")
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the wheel raises bare Exception for every fault of the file
        with open_file(path) as file:
            kind = foreign_kind(file.read(64))
        raise ValueError(f"{path} is {kind}" if kind else f"{path}: {error}") from error
    config, special_map, added = (
        _read_json(folder / name) for name in (CONFIG, SPECIAL_MAP, ADDED)
    )
    try:
        special = add_tokens(backend, config, special_map, added)
        backend.encode_special_tokens = _flag(config, "split_special_tokens")
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    return Tokenizer(
        backend,
        chat_templates=_chat_templates(folder, config.get("chat_template")),
        special_tokens=special,
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    values = read_json(path, extended=True)  # model_max_length is often an integer near 1e30
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def _flag(config: dict[str, Any], key: str) -> bool:
    value = config.get(key)
    if not isinstance(value, bool | None):
        raise ValueError(f"{CONFIG}: {key} is {value!r:.80}, expected true or false")
    return bool(value)


def _chat_templates(folder: Path, in_config: Any) -> dict[str, str]:
    from ..checkpoint.hub import CHAT_TEMPLATES

    files = {"default": folder / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((folder / CHAT_TEMPLATES).glob("*.jinja"))}
    read = {name: _read_template(path) for name, path in files.items() if path.exists()}
    if read:
        return read
    if isinstance(in_config, list) and all(isinstance(entry, dict) for entry in in_config):
        in_config = {entry.get("name"): entry.get("template") for entry in in_config}
    named = {"default": in_config} if isinstance(in_config, str) else in_config or {}
    if not isinstance(named, dict) or not all(
        isinstance(text, str) for entry in named.items() for text in entry
    ):
        raise ChatTemplateError(
            f"{folder / CONFIG}: chat_template is neither a string nor a list of named templates"
        )
    return named


def _read_template(path: Path) -> str:
    if not path.is_file():
        raise ChatTemplateError(f"{path} is not a regular file, expected one or none")
    if (size := path.stat().st_size) > 4 * MOST_SOURCE:
        raise ChatTemplateError(
            f"{path} has {size} bytes, expected at most {MOST_SOURCE} characters"
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ChatTemplateError(
            f"{path} is no UTF-8 text: byte 0x{error.object[error.start]:02x} at offset "
            f"{error.start}"
        ) from error
