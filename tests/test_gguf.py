"""GGUF files: every value against the float64 product, and a forward of the file alone.

`forward` below knows what a falcon-h1 GGUF file means and nothing of the package: sizes from the
file's metadata, no multiplier anywhere. llama.cpp itself is asked in test_llama_cpp.py.
"""

import hashlib
import math
import sys

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gguf_cases import CASES, case_model
from models import make_config, make_model, random_ids, relative_error, same_weights
from tiny_text import MERGES, SPECIAL, TAGS, build_backend, write_tokenizer

from falcon_h1r.checkpoint import CheckpointError
from falcon_h1r.checkpoint import gguf as writer

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def tensors_of(path) -> dict[str, torch.Tensor]:
    """The file's tensors in the dtype they are stored in."""
    out = {}
    for tensor in gguf.GGUFReader(path).tensors:
        value = torch.from_numpy(tensor.data.copy())
        if tensor.tensor_type.name == "BF16":
            value = value.view(torch.bfloat16)
        assert list(value.shape) == list(reversed(tensor.shape.tolist())), tensor.name
        assert tensor.tensor_type.name == DTYPES[value.dtype]
        out[tensor.name] = value
    return out


def metadata_of(path) -> dict:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def folded(model) -> dict[str, torch.Tensor]:
    """What the file must hold, in float64."""
    c, held = model.config, {k: v.double() for k, v in model.state_dict().items()}
    embedding = held["model.embed_tokens.weight"]
    head = embedding if c.tie_word_embeddings else held["lm_head.weight"]
    out = {
        "token_embd.weight": embedding * c.embedding_multiplier,
        "output.weight": head * c.lm_head_multiplier,
        "output_norm.weight": held["model.final_layernorm.weight"],
    }
    for n in range(c.num_hidden_layers):
        w = {k.removeprefix(f"model.layers.{n}."): v for k, v in held.items()}
        z, x, B, C, dt = w["mamba.in_proj.weight"].split(
            [c.d_ssm, c.d_ssm, *[c.mamba_n_groups * c.mamba_d_state] * 2, c.mamba_n_heads]
        )
        s, m = c.ssm_multipliers, c.ssm_in_multiplier
        block = {
            "attn_norm.weight": w["input_layernorm.weight"],
            "attn_q.weight": w["self_attn.q_proj.weight"] * c.attention_in_multiplier,
            "attn_k.weight": w["self_attn.k_proj.weight"]
            * (c.attention_in_multiplier * c.key_multiplier),
            "attn_v.weight": w["self_attn.v_proj.weight"] * c.attention_in_multiplier,
            "attn_output.weight": w["self_attn.o_proj.weight"] * c.attention_out_multiplier,
            "ssm_in.weight": torch.cat(
                [z * (m * s[0]), x * (m * s[1]), B * (m * s[2]), C * (m * s[3]), dt * (m * s[4])]
            ),
            "ssm_conv1d.weight": w["mamba.conv1d.weight"][:, 0],
            "ssm_conv1d.bias": w.get("mamba.conv1d.bias", torch.zeros(c.conv_dim).double()),
            "ssm_dt.bias": w["mamba.dt_bias"],
            "ssm_a": -torch.exp(w["mamba.A_log"])[:, None],
            "ssm_d": w["mamba.D"][:, None],
            "ssm_out.weight": w["mamba.out_proj.weight"] * c.ssm_out_multiplier,
            "ffn_norm": w["pre_ff_layernorm.weight"],
            "ffn_gate.weight": w["feed_forward.gate_proj.weight"] * c.mlp_multipliers[0],
            "ffn_up.weight": w["feed_forward.up_proj.weight"],
            "ffn_down.weight": w["feed_forward.down_proj.weight"] * c.mlp_multipliers[1],
        }
        if c.mamba_rms_norm:
            block["ssm_norm.weight"] = w["mamba.norm.weight"].view(c.mamba_n_groups, -1)
        if c.mlp_bias:
            block["ffn_gate.bias"] = w["feed_forward.gate_proj.bias"] * c.mlp_multipliers[0]
            block["ffn_up.bias"] = w["feed_forward.up_proj.bias"]
            block["ffn_down.bias"] = w["feed_forward.down_proj.bias"] * c.mlp_multipliers[1]
        out |= {f"blk.{n}.{name}": value for name, value in block.items()}
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_every_tensor_is_the_float64_product_rounded_once(tmp_path, name, dtype):
    model = case_model(name)
    writer.save_gguf(model, tmp_path / "m.gguf", dtype=dtype)
    found, expected = tensors_of(tmp_path / "m.gguf"), folded(model)
    assert set(found) == set(expected)
    for key, value in expected.items():
        matrix = value.dim() == 2 and key.endswith(".weight")
        wide = not matrix or key.endswith(("ssm_norm.weight", "ssm_conv1d.weight"))
        stored = value.float() if wide or dtype == torch.float32 else value.float().to(dtype)
        assert found[key].dtype == stored.dtype, key
        assert torch.equal(found[key], stored), key


def test_a_bfloat16_model_is_folded_in_wider_numbers(tmp_path):
    model = same_weights(case_model("two_groups"), dtype=torch.bfloat16)
    writer.save_gguf(model, tmp_path / "m.gguf")
    found, expected = tensors_of(tmp_path / "m.gguf"), folded(model)
    assert all(torch.equal(found[key], value.float()) for key, value in expected.items())


def test_the_model_stays_as_it_is(tmp_path):
    model = same_weights(case_model("two_groups"), dtype=torch.float64)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    writer.save_gguf(model, tmp_path / "m.gguf")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    found, expected = tensors_of(tmp_path / "m.gguf"), folded(model)
    assert all(torch.equal(found[key], value.float()) for key, value in expected.items())


def forward(path, ids) -> torch.Tensor:
    """Logits (length, vocab) of one sequence, in float64, token after token in the mixer."""
    meta, w = metadata_of(path), {k: v.double() for k, v in tensors_of(path).items()}
    a = {k.removeprefix("falcon-h1."): v for k, v in meta.items()}
    length, e, theta = len(ids), a["attention.key_length"], a["rope.freq_base"]
    heads, kv_heads = a["attention.head_count"], a["attention.head_count_kv"]
    inner, h, n = a["ssm.inner_size"], a["ssm.time_step_rank"], a["ssm.state_size"]
    g, taps = a["ssm.group_count"], a["ssm.conv_kernel"]

    def norm(x, weight):
        eps = a["attention.layer_norm_rms_epsilon"]
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight

    angle = torch.arange(length)[:, None] * theta ** (-torch.arange(0, e, 2).double() / e)

    def rotate(x):  # (length, heads, e)
        u, v = x.chunk(2, -1)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        return torch.cat([u * cos - v * sin, v * cos + u * sin], -1)

    def attention(b, x):
        q = rotate((x @ b["attn_q.weight"].T).view(length, heads, e))
        k = rotate((x @ b["attn_k.weight"].T).view(length, kv_heads, e))
        v = (x @ b["attn_v.weight"].T).view(length, kv_heads, e)
        k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
        scores = torch.einsum("ihe,jhe->hij", q, k) / math.sqrt(e)
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        o = torch.einsum("hij,jhe->ihe", scores.softmax(-1), v)
        return o.flatten(1) @ b["attn_output.weight"].T

    def mixer(b, x):
        z, xBC, dt = (x @ b["ssm_in.weight"].T).split([inner, inner + 2 * g * n, h], -1)
        rows = torch.cat([torch.zeros(taps - 1, xBC.shape[1]).double(), xBC])
        xBC = sum(rows[i : i + length] * b["ssm_conv1d.weight"][:, i] for i in range(taps))
        x, B, C = F.silu(xBC + b["ssm_conv1d.bias"]).split([inner, g * n, g * n], -1)
        dt = torch.log1p(torch.exp(dt + b["ssm_dt.bias"]))
        state, y = torch.zeros(h, inner // h, n).double(), []
        for t in range(length):
            B_t, C_t = (m[t].view(g, n).repeat_interleave(h // g, 0) for m in (B, C))
            x_t = x[t].view(h, -1)
            state = state * torch.exp(dt[t, :, None, None] * b["ssm_a"][..., None])
            state = state + torch.einsum("h,hp,hn->hpn", dt[t], x_t, B_t)
            y.append(torch.einsum("hpn,hn->hp", state, C_t) + b["ssm_d"] * x_t)
        y = torch.stack(y).flatten(1) * F.silu(z)
        if "ssm_norm.weight" in b:
            y = norm(y.view(length, g, -1), b["ssm_norm.weight"]).flatten(1)
        return y @ b["ssm_out.weight"].T

    def mlp(b, x):
        gate, up = (
            x @ b[f"ffn_{name}.weight"].T + b.get(f"ffn_{name}.bias", 0) for name in ("gate", "up")
        )
        return (F.silu(gate) * up) @ b["ffn_down.weight"].T + b.get("ffn_down.bias", 0)

    x = w["token_embd.weight"][ids]
    for index in range(a["block_count"]):
        b = {k.removeprefix(f"blk.{index}."): v for k, v in w.items()}
        normed = norm(x, b["attn_norm.weight"])
        x = x + attention(b, normed) + mixer(b, normed)
        x = x + mlp(b, norm(x, b["ffn_norm"]))
    return norm(x, w["output_norm.weight"]) @ w["output.weight"].T


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_the_file_alone_gives_the_models_logits(tmp_path, name):
    model = case_model(name)
    ids = random_ids(model.config, 1, 19)
    writer.save_gguf(model, tmp_path / "m.gguf")
    exact = same_weights(model, dtype=torch.float64)(ids)[0]
    # The roundings of the folded weights, of eps and of rope's base are all there is between them.
    assert relative_error(forward(tmp_path / "m.gguf", ids[0]), exact) < 1e-6


def test_metadata(tmp_path):
    config = make_config("h1r_like", rms_norm_eps=2e-5)
    for dtype, file_type in ((torch.float32, 0), ("bfloat16", 32)):
        writer.save_gguf(make_model(config), tmp_path / "m.gguf", dtype=dtype)
        found = metadata_of(tmp_path / "m.gguf")
        expected = {
            "general.architecture": "falcon-h1",
            "general.type": "model",
            "general.file_type": file_type,
            "general.quantization_version": 2,
            "tokenizer.ggml.model": "none",
        } | {
            f"falcon-h1.{key}": value
            for key, value in {
                "vocab_size": 97,
                "block_count": 3,
                "context_length": 512,
                "embedding_length": 48,
                "feed_forward_length": 80,
                "attention.head_count": 6,
                "attention.head_count_kv": 2,
                "attention.key_length": 16,
                "attention.value_length": 16,
                "attention.layer_norm_rms_epsilon": float(np.float32(2e-5)),
                "rope.freq_base": 1e4,
                "ssm.conv_kernel": 4,
                "ssm.inner_size": 64,
                "ssm.state_size": 24,
                "ssm.time_step_rank": 4,
                "ssm.group_count": 1,
            }.items()
        }
        assert {k: v for k, v in found.items() if not k.startswith("GGUF.")} == expected


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"mamba_proj_bias": True}, "mamba_proj_bias"),
        ({"projectors_bias": True}, "projectors_bias"),
        ({"mamba_norm_before_gate": True}, "mamba_norm_before_gate"),
        ({"time_step_limit": (0.02, 0.05)}, "time_step_limit"),
        ({"time_step_limit": (0.02, math.inf)}, "time_step_limit"),
    ],
)
def test_what_llama_cpp_has_no_graph_for_is_refused(tmp_path, changes, word):
    with pytest.raises(CheckpointError, match=word) as caught:
        writer.save_gguf(make_model(make_config(**changes)), tmp_path / "m.gguf")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_bad_requests_leave_nothing_behind(tmp_path, monkeypatch):
    model, path = case_model("two_groups"), tmp_path / "m.gguf"
    with pytest.raises(CheckpointError, match="float16, expected"):
        writer.save_gguf(model, path, dtype=torch.float16)
    with pytest.raises(CheckpointError, match="cannot save to"):
        writer.save_gguf(model, tmp_path / "none" / "m.gguf")
    with pytest.raises(CheckpointError, match="meta"):
        writer.save_gguf(type(model)(model.config, device="meta"), path)
    with monkeypatch.context() as patch:
        patch.setattr(writer, "folded_value", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            writer.save_gguf(model, path)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gguf", None)
        with pytest.raises(CheckpointError, match="pip install"):
            writer.save_gguf(model, path)
    assert not list(tmp_path.iterdir())


def test_only_a_gguf_file_is_replaced(tmp_path):
    model, path = case_model("two_groups"), tmp_path / "m.gguf"
    path.write_bytes(b"letters")
    with pytest.raises(CheckpointError, match="no GGUF file"):
        writer.save_gguf(model, path)
    assert path.read_bytes() == b"letters"
    path.write_bytes(b"GGUF and nothing else")
    writer.save_gguf(model, path)
    assert len(tensors_of(path)) == 3 + 17 * 3 and list(tmp_path.iterdir()) == [path]


@pytest.fixture
def tokenizer(tmp_path, monkeypatch):
    """A folder with a tokenizer that the writer takes for a released one."""
    folder = write_tokenizer(tmp_path / "tokenizer")
    digest = hashlib.sha256(str(build_backend().encode(writer._PROBE).ids).encode()).hexdigest()
    monkeypatch.setattr(writer, "_KNOWN_TOKENIZERS", {digest})
    return folder


def test_vocabulary(tmp_path, tokenizer):
    backend = build_backend()
    size = backend.get_vocab_size() + 3
    model = make_model(make_config(vocab_size=size))
    writer.save_gguf(model, tmp_path / "m.gguf", tokenizer_from=tokenizer)
    found = metadata_of(tmp_path / "m.gguf")
    assert found["tokenizer.ggml.model"] == "gpt2" and found["tokenizer.ggml.pre"] == "falcon-h1"
    tokens = [backend.id_to_token(i) or f"[PAD{i}]" for i in range(size)]
    assert found["tokenizer.ggml.tokens"] == tokens
    special, tags = [3] * len(SPECIAL), [4] * len(TAGS)
    ordinary = [1] * (size - 3 - len(SPECIAL + TAGS))
    assert found["tokenizer.ggml.token_type"] == [*special, *tags, *ordinary, 5, 5, 5]
    assert found["tokenizer.ggml.merges"] == [" ".join(pair) for pair in MERGES]
    assert [found[f"tokenizer.ggml.{n}_token_id"] for n in ("padding", "bos", "eos")] == [0, 1, 3]
    assert "message" in found["tokenizer.chat_template"]


def test_vocabularies_that_are_refused(tmp_path, tokenizer, monkeypatch):
    path, fitting = tmp_path / "m.gguf", build_backend().get_vocab_size()
    with pytest.raises(CheckpointError, match=f"id {fitting - 1} is outside"):
        model = make_model(make_config(vocab_size=fitting - 1))
        writer.save_gguf(model, path, tokenizer_from=tokenizer)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        writer.save_gguf(model, path, tokenizer_from=tmp_path / "empty")
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="none of the released"):
        writer.save_gguf(model, path, tokenizer_from=tokenizer)
    (tokenizer / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        writer.save_gguf(model, path, tokenizer_from=tokenizer)
    assert not path.exists()
