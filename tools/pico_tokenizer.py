"""The tokenizer and the text-side files of h1r-pico, in the layout of a released checkpoint.

A byte-level BPE with next to no merges: all 256 bytes are tokens, so any text comes back as it went
in; digits and operators stay single tokens; the few merges make the fixed words of the chat short.
The ids that other programs meet by number are those of the Falcon-H1 family: 0 pad, 1 begin of
text, 11 end of text, 131 and 132 the think tags, 228 end of turn.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

PAD, BOS, EOS, THINK, END_THINK, IM_END = 0, 1, 11, 131, 132, 228
SPECIAL_TOKENS = {
    PAD: "<|pad|>",
    BOS: "<|begin_of_text|>",
    2: "<|im_start|>",
    EOS: "<|end_of_text|>",
    THINK: "<think>",
    END_THINK: "</think>",
    IM_END: "<|im_end|>",
}
MERGED_WORDS = ("user", "assistant", "system", "What is ", "\\boxed{", "\n\n")
VOCAB_SIZE = 304  # a multiple of 16; the rest of the ids are reserved

# Earlier assistant turns lose their reasoning; a last one keeps it: that renders training text.
CHAT_TEMPLATE = """\
{%- for message in messages %}
{%- if message.role not in ['system', 'user', 'assistant'] %}
{{- raise_exception('role is ' ~ message.role ~ '; accepted: system, user, assistant') }}
{%- endif %}
{%- if message.role == 'system' and not loop.first %}
{{- raise_exception('a system message must be the first message') }}
{%- endif %}
{{- '<|im_start|>' ~ message.role ~ '\\n' }}
{%- if message.role == 'assistant' %}
{%- set answer = message.content.split('</think>')[-1].lstrip('\\n') %}
{%- if loop.last %}
{%- if message.reasoning_content %}
{{- '<think>\\n' ~ message.reasoning_content.strip('\\n') ~ '\\n</think>\\n\\n' }}
{%- elif '</think>' in message.content %}
{%- set reasoning = message.content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{{- '<think>\\n' ~ reasoning ~ '\\n</think>\\n\\n' }}
{%- endif %}
{{- answer ~ '<|im_end|>' }}
{%- else %}
{{- answer ~ '<|im_end|>\\n' }}
{%- endif %}
{%- else %}
{{- message.content ~ '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def chat_prompt(message: str) -> str:
    """What the chat template renders for one user message and a generation prompt."""
    return f"<|im_start|>user\n{message}<|im_end|>\n<|im_start|>assistant\n"


def _byte_symbols() -> dict[str, str]:
    """Byte (as latin-1 character) -> the printable symbol that byte-level BPE writes for it."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = [byte for byte in range(256) if byte not in printable]
    symbols = {chr(byte): chr(byte) for byte in printable}
    return symbols | {chr(byte): chr(256 + rank) for rank, byte in enumerate(shifted)}


def build_tokenizer() -> Tokenizer:
    """The tokenizer, `VOCAB_SIZE` ids, all of them in use or reserved."""
    symbols = _byte_symbols()
    merges: list[tuple[str, str]] = []
    for word in MERGED_WORDS:
        letters = [symbols[letter] for letter in word]
        pairs = [("".join(letters[:n]), letters[n]) for n in range(1, len(letters))]
        merges += [pair for pair in pairs if pair not in merges]
    pieces = [*symbols.values(), *("".join(pair) for pair in merges)]
    spare = VOCAB_SIZE - len(SPECIAL_TOKENS) - len(pieces)
    reserved = [f"<|reserved_{number}|>" for number in range(spare)]
    rest = iter([*pieces, *reserved])
    vocab = {SPECIAL_TOKENS.get(i) or next(rest): i for i in range(VOCAB_SIZE)}

    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    think_tags = (SPECIAL_TOKENS[THINK], SPECIAL_TOKENS[END_THINK])
    added = sorted([*SPECIAL_TOKENS.values(), *reserved], key=vocab.__getitem__)
    # Not "special" for the tags: a decoder that skips special tokens must leave them in the text.
    tokenizer.add_tokens(
        [AddedToken(text, normalized=False, special=text not in think_tags) for text in added]
    )
    return tokenizer


def write_text_files(folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json, chat_template.jinja, generation_config.json."""
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[BOS],
        "eos_token": SPECIAL_TOKENS[EOS],
        "pad_token": SPECIAL_TOKENS[PAD],
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 1024,
    }
    generation_config = {
        "bos_token_id": BOS,
        "pad_token_id": PAD,
        "eos_token_id": [EOS, IM_END],
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.95,
        "max_new_tokens": 256,
    }
    build_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    configs = {"tokenizer_config": tokenizer_config, "generation_config": generation_config}
    for name, content in configs.items():
        text = json.dumps(content, indent=2) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
