"""Tokens that a checkpoint names outside tokenizer.json, added to it as transformers adds them.

Three files name tokens. tokenizer_config.json names special tokens (`pad_token`, and any other key
that ends with "_token"), lists more under `extra_special_tokens` (once called
`additional_special_tokens`), and may list added tokens with all their options under
`added_tokens_decoder`. Where it does, the two older files are not read. Elsewhere
special_tokens_map.json wins over what tokenizer_config.json says of a special token, and
added_tokens.json names more tokens.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer

from ..checks import check_text

# The single special tokens that every tokenizer may have, in the order in which they are added.
SPECIAL_NAMES = tuple(
    f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)
CONFIG, SPECIAL_MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_EXTRA, _ADDITIONAL = "extra_special_tokens", "additional_special_tokens"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

Token = str | AddedToken  # a string is a special token with the options of one


def add_tokens(
    backend: Tokenizer,
    config: dict[str, Any],
    special_map: dict[str, Any],
    added: dict[str, Any],
) -> dict[str, str]:
    """Add what the three files name to `backend`; returns the special tokens by name.

    config, special_map, added: the contents of tokenizer_config.json, special_tokens_map.json and
        added_tokens.json, each {} where there is no such file.

    A token that the vocabulary has keeps its id; a new one takes the next free id, whatever number
    its file gives. Raises `ValueError`, naming file and key, for what is no token.
    """
    values = _tokens(CONFIG, config)
    if _ADDITIONAL in values and not values.get(_EXTRA):
        values[_EXTRA] = values.pop(_ADDITIONAL)
    # Names of this checkpoint alone, such as image_token.
    own = {name: values.pop(name) for name in _own_names(values) if isinstance(values[name], str)}
    if isinstance(values.get(_EXTRA), dict):
        own |= values.pop(_EXTRA)
    stored = backend.get_added_tokens_decoder()
    if "added_tokens_decoder" in config:
        listed = _decoder(config["added_tokens_decoder"])
    else:
        older = _tokens(SPECIAL_MAP, special_map)
        more = older.get(_EXTRA)
        if isinstance(more, list):
            older[_EXTRA] = (values.get(_EXTRA) or []) + more
        values |= older
        if isinstance(more, dict):
            own |= values.pop(_EXTRA)
        listed = _listed(added, _spelled(values, older)) | stored
    if _ADDITIONAL in values and _EXTRA not in values:
        values[_EXTRA] = values.pop(_ADDITIONAL)
    if backend.padding is not None:
        values.setdefault("pad_token", backend.padding["pad_token"])

    known = {str(token): token for token in listed.values()}
    given = {name: values[name] for name in SPECIAL_NAMES if values.get(name) is not None}
    special: dict[str, Token] = {n: known.get(str(token), token) for n, token in given.items()}
    special |= {name: values[name] for name in _own_names(values)} | own
    # A token that is added once more takes the options of the last.
    new: list[Token] = [listed[i] for i in sorted(listed)]
    present = {str(token) for token in [*stored.values(), *new]}
    for token in [*special.values(), *(values.get(_EXTRA) or [])]:
        if str(token) not in present and token not in new:
            new.append(token)
    texts = {str(token) for token in special.values()}
    backend.add_tokens([_as_added(token, str(token) in texts) for token in new])
    return {name: str(token) for name, token in special.items()}


def _as_added(token: Token, special: bool) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=True)
    token.special = token.special or special
    return token


def _own_names(values: dict[str, Any]) -> list[str]:
    return [
        name
        for name, value in values.items()
        if name.endswith("_token") and name not in SPECIAL_NAMES and value is not None
    ]


def _spelled(values: dict[str, Any], older: dict[str, Any]) -> set[str]:
    """The texts of special tokens that make one of added_tokens.json special.

    transformers looks for them before it has read what tokenizer_config.json writes as objects.
    """
    tokens = [values[name] for name in SPECIAL_NAMES if values.get(name) is not None]
    tokens += values.get(_EXTRA) or []
    read = [*older.values(), *(older.get(_EXTRA) or [])]
    return {
        str(token)
        for token in tokens
        if isinstance(token, str) or any(token is other for other in read)
    }


def _tokens(file: str, values: dict[str, Any]) -> dict[str, Any]:
    """What a file says of tokens: `Token` or None by name, and the keys of more of them."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        place = f"{file}: {key}"
        if key in (_EXTRA, _ADDITIONAL):
            if isinstance(value, dict) and key == _EXTRA:
                value = {name: _token(f"{place}: {name}", item) for name, item in value.items()}
            elif isinstance(value, list):
                value = [_token(place, item) for item in value]
            elif value is not None:
                raise ValueError(f"{place} is {value!r:.80}, expected a list of tokens")
            found[key] = value
        elif key in SPECIAL_NAMES or (key.endswith("_token") and isinstance(value, (str, dict))):
            # Other keys with this ending may be settings, such as add_bos_token.
            if file == SPECIAL_MAP and isinstance(value, dict):
                value = {name: item for name, item in value.items() if name != "special"}
            found[key] = None if value is None else _token(place, value)
    return found


def _listed(added: dict[str, Any], special: set[str]) -> dict[int, AddedToken]:
    listed = {}
    for text, index in added.items():
        check_text(f"{ADDED}: a key", text)
        _check_id(f"{ADDED}: {text!r}", index)
        listed[index] = AddedToken(text, normalized=text not in special, special=text in special)
    return listed


def _decoder(values: Any) -> dict[int, AddedToken]:
    if not isinstance(values, dict):
        raise ValueError(f"{CONFIG}: added_tokens_decoder is {values!r:.80}, expected an object")
    listed = {}
    for key, value in values.items():
        place = f"{CONFIG}: added_tokens_decoder: {key!r}"
        _check_id(place, int(key) if key.isascii() and key.isdecimal() and len(key) < 10 else key)
        if not isinstance(value, dict):
            raise ValueError(f"{place} is {value!r:.80}, expected an object")
        listed[int(key)] = _token(place, {"special": False} | value)
    return listed


def _token(place: str, value: Any) -> Token:
    """A token as it is written: a string, or an object with the string under "content".

    An object is a special token unless it says otherwise, or has the mark "__type" of one that
    would say so.
    """
    if isinstance(value, str):
        check_text(place, value)
        return value
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise ValueError(
            f"{place} is {value!r:.80}, expected a string or an object with one under 'content'"
        )
    check_text(place, value["content"])
    flags = {key: value[key] for key in _FLAGS if key in value}
    flags.setdefault("special", "__type" not in value)
    for key, flag in flags.items():
        if not isinstance(flag, bool):
            raise ValueError(f"{place}: {key} is {flag!r:.80}, expected true or false")
    return AddedToken(value["content"], **flags)


def _check_id(place: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{place} has the id {value!r:.80}, expected an integer >= 0")
