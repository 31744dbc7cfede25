"""Write what transformers computes as a dump for `falcon-h1r doctor --dump`.

    python tools/dump_transformers.py FOLDER dump.safetensors

Forward hooks see its modules. What patches transformers' model (Liger-Kernel, PEFT,
unsloth) is served as well: patch it where the comment says so. Imports nothing of falcon_h1r.
"""

import sys

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

DTYPE, ROWS, LENGTH = torch.float32, 2, 70
MODULES = (
    "input_layernorm mamba.in_proj mamba.out_proj self_attn.q_proj self_attn.k_proj "
    "self_attn.v_proj self_attn.o_proj pre_ff_layernorm feed_forward.gate_proj "
    "feed_forward.up_proj feed_forward.down_proj"
).split()

folder, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE).eval()
# Here a patch goes, e.g. liger_kernel.transformers.apply_liger_kernel_to_falcon_h1(model=model)
tensors = {"input_ids": torch.randint(0, model.config.vocab_size, (ROWS, LENGTH))}


def keep(name):
    def hook(module, arguments, output):
        first = output[0] if isinstance(output, tuple) else output
        tensors[name] = first.detach().cpu().clone()

    return hook


for number, layer in enumerate(model.model.layers):
    layer.register_forward_hook(keep(f"layers.{number}.residual.out"))
    for name in MODULES:
        layer.get_submodule(name).register_forward_hook(keep(f"layers.{number}.{name}"))
with torch.no_grad():
    tensors["logits"] = model(tensors["input_ids"].to(model.device)).logits.cpu()
save_file(tensors, out, {"dtype": str(DTYPE).removeprefix("torch."), "source": "transformers"})
