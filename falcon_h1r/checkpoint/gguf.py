"""From a model to a GGUF file that llama.cpp loads: architecture "falcon-h1", float32 or bfloat16.

llama.cpp knows no multipliers for this architecture: its converter folds every one of them into the
weights, and so does this writer. Tensor names, their order of axes, which tensors stay in float32
and the metadata keys are those of llama.cpp's converter for FalconH1ForCausalLM; what is refused is
what its loader or graph has no place for (read at the commit vendored by llama-cpp-python 0.3.36).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..checks import as_dtype
from ..files import whole_file
from .errors import CheckpointError
from .fold import fold_factors
from .hub import resolve
from .layout import EMBEDDING, HEAD

if TYPE_CHECKING:
    from ..config import FalconH1Config
    from ..model import FalconH1ForCausalLM

ARCHITECTURE = "falcon-h1"
MAGIC = b"GGUF"

# llama.cpp does not read a tokenizer's splitting rule from the file but knows it by name. It names
# a tokenizer by the hash of what it makes of one text; these four are the released family's.
_PROBE = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis "
    "concatenated) ✅ 🦙🦙 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 "
    "កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= нещо на Български "
    "''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not sure "
    "I'll make it, 'D you like some tea? We'Ve a'lL"
)
_KNOWN_TOKENIZERS = {
    "a6b57017d60e6edb4d88ecc2845188e0eb333a70357e45dcc9b53964a73bbae6",  # 0.5B
    "60476e1243776c4fb1b993dbd7a5f15ac22f83c80afdf425fa5ae01c8d44ef86",  # 1B
    "3eda48b4c4dc7de733d1a8b3e3b4a85243dbbf704da2ee9d42c6beced8897896",  # 7B
    "48f8e02c0359c0bbdd82f26909171fac1c18a457bb47573ed1fe3bbb2c1cfd4b",  # 34B
}


class GGUFTensor(NamedTuple):
    """A tensor of the file: `factor` times a tensor of the model, in another shape."""

    name: str  # in the file
    source: str | None  # in the model's state_dict; None: zeros
    shape: tuple[int, ...]  # of the file's tensor, slowest axis first as in torch
    factor: float | Tensor = 1.0  # float64, broadcast against `shape`

    @property
    def is_float32(self) -> bool:
        """Whether llama.cpp takes this tensor in float32 only, also in a bfloat16 file."""
        vector = len(self.shape) == 1 or not self.name.endswith(".weight")
        return vector or self.name.endswith(("_norm.weight", "ssm_conv1d.weight"))


def save_gguf(
    model: FalconH1ForCausalLM,
    path: str | Path,
    dtype: torch.dtype | str = torch.float32,
    tokenizer_from: str | Path | None = None,
) -> None:
    """Write `model` to the GGUF file `path`, for llama.cpp.

    dtype: float32 or bfloat16, or its name, of the matrices; vectors, norms and the convolution are
        float32 in both.
    tokenizer_from: a local folder or hub repository id with the tokenizer of a released Falcon-H1
        model. None writes no vocabulary: llama.cpp then evaluates token ids but reads no text.

    Every multiplier is folded: the product is taken in float64 and rounded to float32 (and from
    there to bfloat16). So a float32 file differs from the model by one rounding of each folded
    weight; a bfloat16 file of a bfloat16 model is not that model, since its folded weights are
    rounded to bfloat16 anew. The embedding and the head get different factors, so a tied model is
    written with both. Where the model's convolution has no bias, zeros are written: llama.cpp's
    graph adds one in any case.

    Takes memory for one tensor at a time, 12 bytes a value. An existing file is replaced if it is a
    GGUF file; a failure leaves nothing behind.

    Raises `CheckpointError` (a ValueError) for a model that llama.cpp has no graph for: biases on
    attention, mamba.in_proj or mamba.out_proj, mamba_norm_before_gate with the norm, a
    time_step_limit other than 0..infinity; for a tokenizer that is none of the family's; for a path
    that cannot be written; and where the gguf package is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(
            "GGUF files are written by the gguf package: pip install 'falcon-h1r[gguf]'"
        ) from error
    dtype = as_dtype(dtype, error=CheckpointError)
    if dtype not in (torch.float32, torch.bfloat16):
        raise CheckpointError(f"GGUF: dtype is {dtype}, expected float32 or bfloat16")
    _refuse_unsupported(model)
    target = Path(os.path.realpath(os.path.expanduser(path)))
    try:
        _refuse_foreign(target)
        with whole_file(target) as new:
            _write(gguf.GGUFWriter(new, ARCHITECTURE), gguf, model, dtype, tokenizer_from)
    except OSError as error:
        raise CheckpointError(f"cannot save to {target}: {error}") from error


def _write(writer: Any, gguf: Any, model: FalconH1ForCausalLM, dtype, tokenizer_from) -> None:
    tensors = model.state_dict()
    entries = list(folded_entries(model.config))
    with contextlib.closing(writer):
        _add_metadata(writer, gguf, model.config, dtype)
        if tokenizer_from is None:
            writer.add_tokenizer_model("none")
        else:
            _add_vocabulary(writer, gguf, model.config, tokenizer_from)
        for entry in entries:
            stored = torch.float32 if entry.is_float32 else dtype
            writer.add_tensor_info(
                entry.name,
                entry.shape,
                None,  # the numpy dtype, which raw_dtype makes superfluous
                torch.Size(entry.shape).numel() * stored.itemsize,
                raw_dtype=gguf.GGMLQuantizationType[_name(stored)],
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            value = folded_value(entry, tensors)
            if not (entry.is_float32 or dtype == torch.float32):
                value = value.to(dtype).view(torch.int16)  # numpy has no bfloat16
            writer.write_tensor_data(value.numpy())


def folded_entries(config: FalconH1Config) -> Iterator[GGUFTensor]:
    """The tensors of the file in their order."""
    c = config
    table, d = (c.vocab_size, c.hidden_size), c.hidden_size
    head = EMBEDDING if c.tie_word_embeddings else HEAD
    factors = fold_factors(c)
    yield GGUFTensor("token_embd.weight", EMBEDDING, table, factors[EMBEDDING])
    yield GGUFTensor("output_norm.weight", "model.final_layernorm.weight", (d,))
    yield GGUFTensor("output.weight", head, table, factors[HEAD])
    block = [*_attention_entries(c), *_mixer_entries(c), *_mlp_entries(c)]
    for index in range(c.num_hidden_layers):
        for entry in block:
            source = entry.source and f"model.layers.{index}.{entry.source}"
            factor = factors.get(entry.source, 1.0)
            name = f"blk.{index}.{entry.name}"
            yield entry._replace(name=name, source=source, factor=factor)


def _attention_entries(c: FalconH1Config) -> Iterator[GGUFTensor]:
    d, q = c.hidden_size, c.num_attention_heads * c.head_dim
    kv = c.num_key_value_heads * c.head_dim
    yield GGUFTensor("attn_norm.weight", "input_layernorm.weight", (d,))
    yield GGUFTensor("attn_q.weight", "self_attn.q_proj.weight", (q, d))
    yield GGUFTensor("attn_k.weight", "self_attn.k_proj.weight", (kv, d))
    yield GGUFTensor("attn_v.weight", "self_attn.v_proj.weight", (kv, d))
    yield GGUFTensor("attn_output.weight", "self_attn.o_proj.weight", (d, q))


def _mixer_entries(c: FalconH1Config) -> Iterator[GGUFTensor]:
    d, inner, heads = c.hidden_size, c.d_ssm, c.mamba_n_heads
    yield GGUFTensor("ssm_in.weight", "mamba.in_proj.weight", (c.d_in_proj, d))
    yield GGUFTensor("ssm_conv1d.weight", "mamba.conv1d.weight", (c.conv_dim, c.mamba_d_conv))
    bias = "mamba.conv1d.bias" if c.mamba_conv_bias else None
    yield GGUFTensor("ssm_conv1d.bias", bias, (c.conv_dim,))
    yield GGUFTensor("ssm_dt.bias", "mamba.dt_bias", (heads,))
    yield GGUFTensor("ssm_a", "mamba.A_log", (heads, 1))  # stored as A = -exp(A_log)
    yield GGUFTensor("ssm_d", "mamba.D", (heads, 1))
    if c.mamba_rms_norm:
        groups = (c.mamba_n_groups, inner // c.mamba_n_groups)
        yield GGUFTensor("ssm_norm.weight", "mamba.norm.weight", groups)
    yield GGUFTensor("ssm_out.weight", "mamba.out_proj.weight", (d, inner))


def _mlp_entries(c: FalconH1Config) -> Iterator[GGUFTensor]:
    d, i = c.hidden_size, c.intermediate_size
    yield GGUFTensor("ffn_norm", "pre_ff_layernorm.weight", (d,))  # this one without ".weight"
    for name, shape in (("gate", (i, d)), ("up", (i, d)), ("down", (d, i))):
        source = f"feed_forward.{name}_proj"
        yield GGUFTensor(f"ffn_{name}.weight", f"{source}.weight", shape)
        if c.mlp_bias:
            yield GGUFTensor(f"ffn_{name}.bias", f"{source}.bias", shape[:1])


def folded_value(entry: GGUFTensor, tensors: dict[str, Tensor]) -> Tensor:
    """The values of `entry` from a model's state_dict, float32 on the CPU."""
    if entry.source is None:
        return torch.zeros(entry.shape)
    value = tensors[entry.source].detach().to("cpu", torch.float64, copy=True)
    if entry.source.endswith("A_log"):
        value.exp_().neg_()
    return value.reshape(entry.shape).mul_(entry.factor).float()


def _refuse_unsupported(model: FalconH1ForCausalLM) -> None:
    c = model.config
    if model.device.type == "meta":
        raise CheckpointError("GGUF: the model is on the meta device and has no weights")
    for refused, what in (
        (c.attention_bias, "attention_bias (it reads a bias of attn_output and never adds it)"),
        (c.mamba_proj_bias, "mamba_proj_bias (it has no bias on ssm_in)"),
        (c.projectors_bias, "projectors_bias (it has no bias on ssm_out)"),
        (
            c.mamba_rms_norm and c.mamba_norm_before_gate,
            "mamba_norm_before_gate (it gates first and then normalises)",
        ),
        (
            c.time_step_limit != (0.0, float("inf")),
            f"time_step_limit={c.time_step_limit} (it does not clamp dt)",
        ),
    ):
        if refused:
            raise CheckpointError(f"GGUF: llama.cpp has no {what}")


def _add_metadata(writer: Any, gguf: Any, config: FalconH1Config, dtype: torch.dtype) -> None:
    c = config
    is_float32 = dtype == torch.float32
    writer.add_type("model")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(
        gguf.LlamaFileType.ALL_F32 if is_float32 else gguf.LlamaFileType.MOSTLY_BF16
    )
    writer.add_vocab_size(c.vocab_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_ssm_conv_kernel(c.mamba_d_conv)
    writer.add_ssm_inner_size(c.d_ssm)
    writer.add_ssm_state_size(c.mamba_d_state)
    writer.add_ssm_time_step_rank(c.mamba_n_heads)  # by this name the number of heads
    writer.add_ssm_group_count(c.mamba_n_groups)


def _add_vocabulary(
    writer: Any, gguf: Any, config: FalconH1Config, tokenizer_from: str | Path
) -> None:
    from tokenizers import Tokenizer

    folder = resolve(tokenizer_from, weights=False)
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(f"tokenizer_from: {folder} holds no tokenizer.json")
    try:
        backend = Tokenizer.from_file(str(file))
        content = json.loads(file.read_text(encoding="utf-8"))
    except Exception as error:  # the tokenizers package raises plain Exception
        raise CheckpointError(f"{file}: {str(error).splitlines()[0]}") from error
    backend.no_truncation()
    backend.no_padding()
    digest = hashlib.sha256(str(backend.encode(_PROBE).ids).encode()).hexdigest()
    if digest not in _KNOWN_TOKENIZERS:
        raise CheckpointError(
            f"{file} is none of the released Falcon-H1 tokenizers, and llama.cpp knows no other by "
            "name; without tokenizer_from the file is written without a vocabulary"
        )
    added = {token["id"]: token["special"] for token in content["added_tokens"]}
    texts = {index: text for text, index in backend.get_vocab(with_added_tokens=True).items()}
    if (highest := max(texts)) >= config.vocab_size:
        raise CheckpointError(
            f"{file}: token id {highest} is outside the model's vocabulary of {config.vocab_size}"
        )
    tokens, types = [], []
    for index in range(config.vocab_size):
        tokens.append(texts.get(index, f"[PAD{index}]"))
        if index not in texts:
            types.append(gguf.TokenType.UNUSED)
        elif index not in added:
            types.append(gguf.TokenType.NORMAL)
        elif added[index] or (texts[index].startswith("<|") and texts[index].endswith("|>")):
            types.append(gguf.TokenType.CONTROL)  # by its look too, as in the converter
        else:
            types.append(gguf.TokenType.USER_DEFINED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(ARCHITECTURE)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    # Merges, ids of special tokens and the chat template.
    gguf.SpecialVocab(folder, load_merges=True, n_vocab=len(tokens)).add_to_gguf(writer)


def _name(dtype: torch.dtype) -> str:
    return "F32" if dtype == torch.float32 else "BF16"


def _refuse_foreign(path: Path) -> None:
    """Only a GGUF file may be replaced."""
    if not os.path.lexists(path):
        return
    if path.is_file():
        with open(path, "rb") as file:
            if file.read(len(MAGIC)) == MAGIC:
                return
    raise CheckpointError(f"{path} is not replaced: it is no GGUF file")
