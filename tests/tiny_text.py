"""A byte-level tokenizer, a template like the released one, and a model that follows a script."""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

SPECIAL = ("<|pad|>", "<|begin_of_text|>", "<|im_start|>", "<|im_end|>", "<|end_of_text|>")
TAGS = ("<think>", "</think>")
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ċ", "Ċ"), ("1", "2")]

# An index over all messages, a loop over those after the system message: the structure, and with it
# the index fault, of the released Falcon-H1R template. The words are this project's own.
FAULTY_TEMPLATE = """\
{%- if messages and messages[0]['role'] == 'system' %}
{%- set system_msg = messages[0]['content'] %}
{%- set remaining_messages = messages[1:] %}
{%- else %}
{%- set system_msg = "Think first, then answer." %}
{%- set remaining_messages = messages %}
{%- endif %}
{{- '<|im_start|>system\\n' + system_msg }}
{%- if tools %}
{{- '\\nTools:' }}
{%- for tool in tools %}
{{- '\\n' }}{{ tool | tojson }}
{%- endfor %}
{%- endif %}
{{- '\\n<|im_end|>' }}
{%- set ns = namespace(open=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
  {%- set index = (messages|length - 1) - loop.index0 %}
  {%- if ns.open and message.role == 'user' %}
    {%- set ns.open = false %}
    {%- set ns.last_query_index = index %}
  {%- endif %}
{%- endfor %}
{%- for message in remaining_messages %}
  {%- if message.role == 'user' %}
    {{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
  {%- elif message.role == 'assistant' %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if loop.index0 > ns.last_query_index and message.reasoning_content is string %}
      {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' + message.content }}
    {%- else %}
      {{- message.content + '\\n' }}
    {%- endif %}
    {{- '<|im_end|>' if loop.last else '<|im_end|>\\n' }}
  {%- elif message.role == 'tool' %}
    {%- if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}
      {{- '<|im_start|>user' }}
    {%- endif %}
    {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
    {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
      {{- '<|im_end|>\\n' }}
    {%- endif %}
  {%- endif %}
  {%- if loop.last and add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
  {%- endif %}
{%- endfor %}"""

PLAIN_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def build_backend(tags: bool = True) -> Tokenizer:
    """All bytes, a few merges, special tokens at ids 0-4; tags: `<think>`, `</think>` are 5, 6."""
    added = SPECIAL + (TAGS if tags else ())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*added, *alphabet, *("".join(pair) for pair in MERGES)]
    tokenizer = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=t in SPECIAL) for t in added])
    return tokenizer


VOCAB_SIZE = build_backend().get_vocab_size()


def write_tokenizer(folder: Path, template=PLAIN_TEMPLATE, tags: bool = True, **config) -> Path:
    """The tokenizer files of a checkpoint; template None leaves it out; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    build_backend(tags).save(str(folder / "tokenizer.json"))
    names = {"pad_token": SPECIAL[0], "bos_token": SPECIAL[1], "eos_token": SPECIAL[3]}
    content = {"tokenizer_class": "PreTrainedTokenizerFast", **names, **config}
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


class ScriptedCache:
    """Which script each row follows, and how far it is."""

    def __init__(self, scripts: list[int], lengths: Tensor, max_length: int):
        self.scripts, self.lengths, self.max_length = scripts, lengths, max_length

    def select(self, rows) -> "ScriptedCache":
        rows = torch.as_tensor(rows).tolist()
        return ScriptedCache([self.scripts[r] for r in rows], self.lengths[rows], self.max_length)

    def expand(self, n: int) -> "ScriptedCache":
        return self.select([r for r in range(len(self.scripts)) for _ in range(n)])


class ScriptedModel:
    """Greedy generation from the prompt [k, ...] gives scripts[k]; `calls` records every forward.

    The next token depends on the number of tokens seen, so a wrong number shows.
    """

    device = torch.device("cpu")

    def __init__(self, scripts: list[list[int]], vocab_size: int = VOCAB_SIZE, eos=(3,)):
        self.config = SimpleNamespace(vocab_size=vocab_size, max_position_embeddings=4096)
        self.eos_token_ids = eos
        self.scripts, self.calls, self.prompt_lengths = scripts, [], {}

    def new_cache(self, batch_size: int, max_length: int) -> ScriptedCache:
        return ScriptedCache([-1] * batch_size, torch.zeros(batch_size).long(), max_length)

    def __call__(self, input_ids, attention_mask=None, cache=None, logits_to_keep=0):
        self.calls.append(tuple(input_ids.shape))
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        logits = torch.zeros(len(input_ids), 1, self.config.vocab_size)
        for row in range(len(input_ids)):
            real = input_ids[row][mask[row].bool()]
            if cache.scripts[row] < 0 and len(real):
                cache.scripts[row] = int(real[0])
            cache.lengths[row] += len(real)
            if cache.scripts[row] >= 0:
                script = self.scripts[cache.scripts[row]]
                done = int(cache.lengths[row]) - self.prompt_lengths.get(cache.scripts[row], 1)
                if 0 <= done < len(script):
                    logits[row, 0, script[done]] = 9.0
        return logits
