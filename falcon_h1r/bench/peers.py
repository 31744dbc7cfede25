"""Adapters to other people's implementations, used where they are installed, never required.

An adapter takes a case and its inputs, and returns the call to be timed and a function that brings
what the call returned into the registry's layout. What a peer's own caller would hand it already
prepared - another memory layout, expanded scalars, cos and sin over the whole head - is prepared
outside the timed call.

The transformers adapters run on a CPU and are tested. mamba_ssm, causal_conv1d, flash-linear-
attention and flash_attn need a GPU: their adapters follow the packages' documented signatures and
have never been run. The gate stands before them as before everyone, and an adapter that raises is
reported with its error.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

TRANSFORMERS = "transformers.models.falcon_h1.modeling_falcon_h1"
Adapter = Callable[[Any, dict[str, Any]], tuple[Callable, Callable]]


class PeerPackage(NamedTuple):
    """A package's implementations by operator.

    slack: factor on the gate's tolerance, 1 unless the package rounds more often by design, for the
    reason given. refuses(case) -> why a case is not its own, or "".
    """

    name: str
    module: str
    adapters: dict[str, Adapter]
    needs_gpu: bool = False
    slack: float = 1.0
    slack_reason: str = ""
    refuses: Callable[[Any], str] = lambda case: ""


def why_away(peer: PeerPackage, device: torch.device) -> str:
    """Why a peer takes part in no case on a device; "" if it does."""
    if error := import_error(peer.module):
        return error
    return "needs a GPU" if peer.needs_gpu and device.type != "cuda" else ""


@cache
def import_error(module: str) -> str:
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return "not installed"
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken build raises anything, and is the reader's news, not ours
        return f"cannot be imported: {type(error).__name__}: {error}"
    return ""


def _one(out: Tensor) -> tuple[Tensor, ...]:
    return (out,)


# --- transformers: its torch path, whatever kernels it would rather use -------------------------


def _falcon_h1():
    return importlib.import_module(TRANSFORMERS)


def _torch_path(function: Callable) -> Callable:
    """The plain function behind transformers' dispatch to mamba_ssm and causal_conv1d."""
    return getattr(function, "__wrapped__", function)


def _with_weight(module, weight: Tensor):
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    return module


def _hf_rms_norm(case, i):
    norm = _with_weight(_falcon_h1().FalconH1RMSNorm(len(i["weight_d"]), i["eps"]), i["weight_d"])
    return partial(norm, i["x"]), _one


def _hf_gated_rms_norm(case, i):
    if i["weight_d"] is None:
        silu = torch.nn.functional.silu
        return lambda: i["y_bld"] * silu(i["z_bld"]), _one
    arguments = (len(i["weight_d"]), i["eps"], i["n_groups"], i["norm_before_gate"])
    norm = _with_weight(_falcon_h1().FalconH1RMSNormGated(*arguments), i["weight_d"])
    return partial(norm, i["y_bld"], i["z_bld"]), _one


def _hf_rope(case, i):
    """Its function turns queries and keys together; here one of the two has no heads."""
    rotate, x, multiplier = _falcon_h1().apply_rotary_pos_emb, i["x_bhle"], i.get("multiplier")
    cos, sin = (torch.cat([i[n], i[n]], -1).to(x.dtype) for n in ("cos_bli", "sin_bli"))
    none = x[:, :0]
    if multiplier is None:
        return lambda: rotate(x, none, cos, sin), lambda out: (out[0],)
    return lambda: rotate(none, x * multiplier, cos, sin), lambda out: (out[1],)


def _hf_conv(case, i):
    """With the window put in front, as its cache does in prefill."""
    convolve, l = _torch_path(_falcon_h1().causal_conv1d_fn), case.workload.length
    x_bcl, window = i["x_blc"].mT, i["initial_window_bvc"].mT.contiguous()
    w = i["weight_cw"].shape[1]

    def call():
        history = torch.cat([window, x_bcl], dim=-1)
        y = convolve(history, i["weight_cw"], i["bias_c"], activation="silu")
        return y[:, :, -l:], history[:, :, 1 - w :]

    return call, lambda out: (out[0].mT, out[1].mT)


def _hf_conv_step(case, i):
    update, x_bc1 = _torch_path(_falcon_h1().causal_conv1d_update), i["x_bc"][:, :, None]
    window = i["window_bvc"].mT.contiguous()
    call = partial(update, x_bc1, window, i["weight_cw"], i["bias_c"], activation="silu")
    return call, lambda out: (out[:, :, 0], window.mT)


def _scan_options(i, length_name: str) -> dict[str, Any]:
    return {
        "chunk_size": i["chunk_size"],
        "D": i["D_h"],
        length_name: i["initial_state_bhpn"],
        "return_final_states": True,
    }


def _scan_inputs(i) -> tuple[Tensor, ...]:
    return tuple(i[name] for name in ("x_blhp", "dt_blh", "A_h", "B_blgn", "C_blgn"))


def _in_x_dtype(i):
    """Its torch path returns y in float32 and the mixer casts it; so does the registry's layout."""
    return lambda out: (out[0].to(i["x_blhp"].dtype), out[1].to(i["initial_state_bhpn"].dtype))


def _hf_scan(case, i):
    scan = _torch_path(_falcon_h1().mamba2_chunk_scan)
    return partial(scan, *_scan_inputs(i), **_scan_options(i, "initial_states")), _in_x_dtype(i)


def _expanded_step(i) -> tuple[Tensor, ...]:
    """The arguments of selective_state_update: dt, A and D spread over channels, without copies."""
    state = i["state_bhpn"]
    b, h, p, n = state.shape
    dt = i["dt_bh"][..., None].expand(b, h, p)
    A = i["A_h"][:, None, None].expand(h, p, n)
    return state, i["x_bhp"], dt, A, i["B_bgn"], i["C_bgn"], i["D_h"][:, None].expand(h, p)


def _step(update: Callable, i, **options):
    state = i["state_bhpn"]
    return partial(update, *_expanded_step(i), **options), lambda out: (out, state)


def _hf_step(case, i):
    return _step(_torch_path(_falcon_h1().mamba2_selective_state_update), i)


# --- packages that need a GPU: never run here ----------------------------------------------------


def _ms_scan(case, i):
    scan = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    return partial(scan, *_scan_inputs(i), **_scan_options(i, "initial_states")), _in_x_dtype(i)


def _ms_step(case, i):
    module = importlib.import_module("mamba_ssm.ops.triton.selective_state_update")
    # Scalars per head are its fast case, which it looks for in dt_bias too.
    h, p = i["x_bhp"].shape[1:]
    return _step(
        module.selective_state_update, i, dt_bias=torch.zeros_like(i["A_h"])[:, None].expand(h, p)
    )


def _ms_gated_rms_norm(case, i):
    norm = importlib.import_module("mamba_ssm.ops.triton.layernorm_gated").rmsnorm_fn
    options = {
        "z": i["z_bld"],
        "eps": i["eps"],
        "group_size": i["y_bld"].shape[-1] // i["n_groups"],
        "norm_before_gate": i["norm_before_gate"],
    }
    return partial(norm, i["y_bld"], i["weight_d"], None, **options), _one


def _cc_conv(case, i):
    """Channels-last: the layout that its initial and final states ask for, and the model has."""
    convolve = importlib.import_module("causal_conv1d").causal_conv1d_fn
    options = {
        "initial_states": i["initial_window_bvc"].mT,
        "return_final_states": True,
        "activation": "silu",
    }
    call = partial(convolve, i["x_blc"].mT, i["weight_cw"], i["bias_c"], **options)
    return call, lambda out: (out[0].mT, out[1].mT)


def _cc_conv_step(case, i):
    update = importlib.import_module("causal_conv1d").causal_conv1d_update
    window = i["window_bvc"].mT.contiguous()
    call = partial(update, i["x_bc"], window, i["weight_cw"], i["bias_c"], "silu")
    return call, lambda out: (out, window.mT)


def _fla_scan(case, i):
    """Mamba-2 as gated linear attention: q = C, k = B, v = x dt, log-decay = dt A; D added."""
    chunk_simple_gla = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla
    x, dt, A, B, C = _scan_inputs(i)
    r = x.shape[2] // B.shape[2]
    q, k = (t.repeat_interleave(r, dim=2) for t in (C, B))
    state = i["initial_state_bhpn"].mT.contiguous()

    def call():
        v = (x * dt[..., None]).to(x.dtype)
        options = {"scale": 1.0, "initial_state": state, "output_final_state": True}
        y, final = chunk_simple_gla(q, k, v, dt * A, **options)
        return y + (i["D_h"][:, None] * x).to(x.dtype), final

    return call, lambda out: (out[0].to(x.dtype), out[1].mT)


def _flash_attention(case, i):
    attend = importlib.import_module("flash_attn").flash_attn_func
    q, k, v = (i[name].transpose(1, 2) for name in ("q_bhle", "k_bjse", "v_bjse"))
    # Its causal mask ends at the last query and the last key, as a query behind a past needs it.
    return partial(attend, q, k, v, causal=True), lambda out: (out.transpose(1, 2),)


def _flash_decode(case, i):
    attend = importlib.import_module("flash_attn").flash_attn_with_kvcache
    k, v = (i[name].transpose(1, 2) for name in ("k_bjse", "v_bjse"))
    lengths = i.get("lengths_b")
    lengths = k.shape[1] if lengths is None else lengths.int()
    call = partial(attend, i["q_bhe"][:, None], k, v, cache_seqlens=lengths)
    return call, lambda out: (out[:, 0],)


def _ms_refuses(case) -> str:
    if case.op == "gated_rms_norm":
        return "" if case.config.mamba_rms_norm else "has no gate without a norm"
    tf32 = case.op == "ssd_scan" and case.dtype.itemsize != 2
    return "float32 products are TF32" if tf32 else ""


PEERS = (
    PeerPackage(
        "transformers",
        TRANSFORMERS,
        {
            "rms_norm": _hf_rms_norm,
            "gated_rms_norm": _hf_gated_rms_norm,
            "rope": _hf_rope,
            "rope_key": _hf_rope,
            "causal_conv1d": _hf_conv,
            "causal_conv1d_step": _hf_conv_step,
            "ssd_scan": _hf_scan,
            "ssd_step": _hf_step,
        },
        slack=4.0,
        slack_reason="it rounds intermediate results, cos, sin and the state to the model's dtype",
        refuses=lambda case: "computes in float32" if case.dtype == torch.float64 else "",
    ),
    PeerPackage(
        "mamba_ssm",
        "mamba_ssm",
        {"gated_rms_norm": _ms_gated_rms_norm, "ssd_scan": _ms_scan, "ssd_step": _ms_step},
        needs_gpu=True,
        slack=4.0,
        slack_reason="states between chunks in the model's dtype",
        refuses=_ms_refuses,
    ),
    PeerPackage(
        "causal_conv1d",
        "causal_conv1d",
        {"causal_conv1d": _cc_conv, "causal_conv1d_step": _cc_conv_step},
        needs_gpu=True,
    ),
    PeerPackage(
        "flash-linear-attention",
        "fla",
        {"ssd_scan": _fla_scan},
        needs_gpu=True,
        slack=4.0,
        slack_reason="x dt and operands of products rounded to the model's dtype",
        refuses=lambda case: "" if case.dtype.itemsize == 2 else "float32 products are TF32",
    ),
    PeerPackage(
        "flash_attn",
        "flash_attn",
        {
            "attention": _flash_attention,
            "decode_attention": _flash_decode,
            "decode_attention_ragged": _flash_decode,
        },
        needs_gpu=True,
        refuses=lambda case: "16-bit only" if case.dtype.itemsize != 2 else "",
    ),
)
# Everyone whose faults are not ours; llama.cpp takes part in `bench generate`.
NAMES = (*(peer.name for peer in PEERS), "llama.cpp")
