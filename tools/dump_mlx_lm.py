"""Write what mlx-lm computes as a dump for `falcon-h1r doctor --dump`.

    python tools/dump_mlx_lm.py FOLDER dump.safetensors

Its modules have no hooks, so each layer is wrapped. mlx-lm folds multipliers into the weights: what
leaves a layer is as in other engines, what leaves a projection is not. Imports nothing of
falcon_h1r.
"""

import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm.utils import load_model

ROWS, LENGTH = 2, 70

folder, out = sys.argv[1:]
model, config = load_model(Path(folder))
model.set_dtype(mx.float32)
ids = mx.random.randint(0, config["vocab_size"], (ROWS, LENGTH))
tensors = {"input_ids": ids}


class Kept:
    def __init__(self, layer, name):
        self.layer, self.name = layer, name

    def __call__(self, hidden, **rest):
        tensors[self.name] = self.layer(hidden, **rest)
        return tensors[self.name]


cache = model.make_cache()  # without a cache mlx-lm 0.32 runs its first layer alone
model.model.layers = [
    Kept(layer, f"layers.{number}.residual.out") for number, layer in enumerate(model.layers)
]
tensors["logits"] = model(ids, cache=cache)
mx.save_safetensors(out, tensors, {"dtype": "float32", "source": "mlx-lm"})
