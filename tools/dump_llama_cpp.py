"""Write what llama.cpp computes as a dump for `falcon-h1r doctor --dump`.

    python tools/dump_llama_cpp.py FOLDER dump.safetensors [MODEL.gguf]

The folder's model goes into a GGUF file first, unless there is one already. A callback sees every
tensor of the graph. The multipliers are folded into a GGUF file's weights: the tensors taken
here are those that this does not change. Needs the package xllamacpp without llama-cpp-python.
"""

import ctypes
import sys

import torch
import xllamacpp.xllamacpp
from safetensors.torch import save_file

from falcon_h1r import FalconH1ForCausalLM
from falcon_h1r.bench.llama_library import READY_MADE, library, why_not
from falcon_h1r.bench.llama_peer import LlamaPeer

LENGTH = 70
NAMES = {  # in the graph, where the number of the layer follows: in a dump
    "attn_norm": "input_layernorm",
    "attn_out": "contribution.attention",
    "ssm_out": "contribution.ssm",
    "ffn_inp": "residual.mid",
    "ffn_norm": "pre_ff_layernorm",
    "ffn_swiglu": "feed_forward.swiglu.out",
    "ffn_out": "contribution.mlp",
    "l_out": "residual.out",
}

folder, out, *file = sys.argv[1:]
if reason := why_not():
    sys.exit(f"llama.cpp: {reason}")
if not library().source.startswith(READY_MADE):
    sys.exit(f"{library().source} is installed: its tensors are not read here, but {READY_MADE}'s")
ggml, tensors = ctypes.CDLL(xllamacpp.xllamacpp.__file__), {}
ggml.ggml_get_name.restype, ggml.ggml_nbytes.restype = ctypes.c_char_p, ctypes.c_size_t
pointer, size = ctypes.c_void_p, ctypes.c_size_t
ggml.ggml_backend_tensor_get.argtypes = pointer, pointer, size, size


@ctypes.CFUNCTYPE(ctypes.c_bool, pointer, ctypes.c_bool, pointer)
def observer(tensor, ask, _):
    """Called twice: to ask whether the tensor is wanted, and when it has its values."""
    name, _, layer = ggml.ggml_get_name(pointer(tensor)).decode().rpartition("-")
    if not ask and name in NAMES:
        raw = bytearray(ggml.ggml_nbytes(pointer(tensor)))
        ggml.ggml_backend_tensor_get(
            tensor, (ctypes.c_char * len(raw)).from_buffer(raw), 0, len(raw)
        )
        values = torch.frombuffer(raw, dtype=torch.float32).view(1, LENGTH, -1)
        tensors[f"layers.{layer}.{NAMES[name]}"] = values
    return True


model = FalconH1ForCausalLM.from_pretrained(folder, dtype=torch.float32)
ids = torch.randint(0, model.config.vocab_size, (1, LENGTH))
peer = LlamaPeer(
    model, kv_dtype=torch.float32, max_length=80, file=(file or [None])[0], observer=observer
)
try:
    tensors["logits"] = torch.from_numpy(peer.read(ids[0].tolist(), every=True))[None]
finally:
    peer.close()
save_file(tensors | {"input_ids": ids}, out, {"dtype": "float32", "source": "llama.cpp"})
