"""llama.cpp's C functions, from one of two packages.

llama-cpp-python compiles llama.cpp for this processor and wraps all functions. xllamacpp is a wheel
for any processor of a kind, which makes it slower. Its extension module exports the functions and
wraps few: the ones called here are declared below, with the structures of one release.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from types import SimpleNamespace
from typing import Any, NamedTuple

from .peers import import_error

COMPILED, READY_MADE = "llama-cpp-python", "xllamacpp"
MODULES = {COMPILED: "llama_cpp", READY_MADE: "xllamacpp"}
RELEASE = "2026.10.11549"  # of xllamacpp: the structures below are those of its llama.h
ERROR = 4  # GGML_LOG_LEVEL_ERROR


class Library(NamedTuple):
    """llama.cpp, initialised."""

    functions: Any  # under their C names, with structures, constants and llama_token
    source: str  # the package and its version
    messages: list[str]  # errors that it logged
    callback: Any  # C holds a bare pointer to it


def why_not() -> str:
    """Why llama.cpp does not take part, "not installed" for one; "" if it does."""
    package = _package()
    if reason := import_error(MODULES[package]) or import_error("gguf"):
        return reason
    found = importlib.metadata.version(package)
    if package == READY_MADE and found != RELEASE:
        return f"xllamacpp {found} is installed, known is {RELEASE}"
    return ""


@functools.cache
def library() -> Library:
    """The package that serves, llama-cpp-python where both are installed; see `why_not`."""
    package, messages = _package(), []
    functions = _ready_made() if package == READY_MADE else importlib.import_module("llama_cpp")

    @functions.llama_log_callback
    def remember(level, text, _):
        if level == ERROR:
            messages.append(text.decode(errors="replace").strip())

    functions.llama_log_set(remember, None)
    functions.llama_backend_init()
    source = f"{package} {importlib.metadata.version(package)}"
    return Library(functions, source, messages, remember)


def _package() -> str:
    # A broken llama-cpp-python is the reader's news, not a reason to take the other in silence.
    return READY_MADE if import_error(MODULES[COMPILED]) == "not installed" else COMPILED


class _ModelSettings(ctypes.Structure):
    """llama_model_params"""

    _fields_ = (
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int32),
        ("load_mode", c_int32),
        ("lazy_mode", c_int32),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        *((name, c_bool) for name in ("vocab_only", "check_tensors", "use_extra_bufts")),
        *((name, c_bool) for name in ("no_host", "no_alloc", "load_mtp")),
    )


class _ContextSettings(ctypes.Structure):
    """llama_context_params"""

    _fields_ = (
        *((name, c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq")),
        *((name, c_uint32) for name in ("n_outputs_max", "n_outputs_max_per_seq")),
        *((name, c_int32) for name in ("n_threads", "n_threads_batch", "ctx_type")),
        *((name, c_int32) for name in ("rope_scaling_type", "pooling_type", "attention_type")),
        ("flash_attn_type", c_int32),
        *((name, c_float) for name in ("rope_freq_base", "rope_freq_scale", "yarn_ext_factor")),
        *((name, c_float) for name in ("yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow")),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("moe_cache_size", c_size_t),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        *((name, c_bool) for name in ("embeddings", "offload_kqv", "no_perf", "op_offload")),
        *((name, c_bool) for name in ("swa_full", "kv_unified")),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
    )


class _Batch(ctypes.Structure):
    """llama_batch"""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


_log_callback = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)
_SIGNATURES = {  # what is returned, the arguments
    "llama_log_set": (None, _log_callback, c_void_p),
    "llama_backend_init": (None,),
    "llama_model_default_params": (_ModelSettings,),
    "llama_model_load_from_file": (c_void_p, c_char_p, _ModelSettings),
    "llama_model_free": (None, c_void_p),
    "llama_model_get_vocab": (c_void_p, c_void_p),
    "llama_tokenize": (
        *(c_int32, c_void_p, c_char_p, c_int32),
        *(POINTER(c_int32), c_int32, c_bool, c_bool),
    ),
    "llama_context_default_params": (_ContextSettings,),
    "llama_init_from_model": (c_void_p, c_void_p, _ContextSettings),
    "llama_free": (None, c_void_p),
    "llama_batch_init": (_Batch, c_int32, c_int32, c_int32),
    "llama_batch_free": (None, _Batch),
    "llama_decode": (c_int32, c_void_p, _Batch),
    "llama_synchronize": (None, c_void_p),
    "llama_get_logits_ith": (POINTER(c_float), c_void_p, c_int32),
    "llama_get_memory": (c_void_p, c_void_p),
    "llama_memory_clear": (None, c_void_p, c_bool),
    "llama_memory_seq_cp": (None, c_void_p, c_int32, c_int32, c_int32, c_int32),
    "llama_memory_seq_rm": (c_bool, c_void_p, c_int32, c_int32, c_int32),
    "llama_state_seq_get_size_ext": (c_size_t, c_void_p, c_int32, c_uint32),
    "llama_state_seq_get_data_ext": (c_size_t, c_void_p, c_void_p, c_size_t, c_int32, c_uint32),
    "llama_state_seq_set_data": (c_size_t, c_void_p, c_void_p, c_size_t, c_int32),
    "llama_state_seq_set_data_ext": (c_size_t, c_void_p, c_void_p, c_size_t, c_int32, c_uint32),
}


def _ready_made() -> SimpleNamespace:
    shared = ctypes.CDLL(importlib.import_module("xllamacpp.xllamacpp").__file__)
    found = {"llama_log_callback": _log_callback, "llama_token": c_int32}
    found |= {"GGML_TYPE_F32": 0, "GGML_TYPE_F16": 1, "LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY": 1}
    for name, (result, *arguments) in _SIGNATURES.items():
        found[name] = function = getattr(shared, name)
        function.restype, function.argtypes = result, arguments
    return SimpleNamespace(**found)
