"""A checkpoint read one module at a time: a model that need not fit into memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..ops import Ops, default_table
from .loader import prepare, read_all

if TYPE_CHECKING:
    from ..model import FalconH1ForCausalLM


class Streamed:
    """`model` is on the meta device; `loaded` gives one of its modules its weights for a while."""

    def __init__(self, model, entries, device: torch.device):
        self.model, self.device = model, device
        self._entries = {entry.name: entry for entry in entries}

    @contextmanager
    def loaded(self, path: str) -> Iterator[nn.Module]:
        """The module `path`, such as "model.layers.3", with its weights until the block ends."""
        module = self.model.get_submodule(path)
        wanted = {f"{path}.{name}": tensor for name, tensor in module.state_dict().items()}
        entries = [self._entries[name] for name in wanted]
        weights = read_all(entries, wanted, self.device, False, None)
        own = {name.removeprefix(f"{path}."): tensor for name, tensor in weights.items()}
        module.load_state_dict(own, strict=True, assign=True)
        try:
            yield module
        finally:
            module.to("meta")

    @torch.no_grad()
    def __call__(self, input_ids: Tensor) -> Tensor:
        """The model's forward of ids (b, l) without a cache; each weight is read once, used, and
        dropped. Hooks of the model see it as they see any forward."""
        paths = [f"model.layers.{n}" for n in range(self.model.config.num_hidden_layers)]
        paths += ["model.final_layernorm"]
        with ExitStack() as stack:
            if self.model.config.tie_word_embeddings:  # used at both ends
                stack.enter_context(self.loaded("model.embed_tokens"))
            else:
                paths += ["model.embed_tokens", "lm_head"]
            for path in paths:
                self._load_around(path, stack)
            return self.model(input_ids)

    def _load_around(self, path: str, stack: ExitStack) -> None:
        """Load a module when it is called, for the call."""
        module, held = self.model.get_submodule(path), ExitStack()
        stack.callback(held.close)  # after an exception within the call
        hooks = (
            module.register_forward_pre_hook(
                lambda *_: held.enter_context(self.loaded(path)) and None, prepend=True
            ),
            module.register_forward_hook(lambda *_: held.close()),
        )
        for hook in hooks:
            stack.callback(hook.remove)


def stream_modules(
    model_class: type[FalconH1ForCausalLM],
    path_or_repo_id: str | Path,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "cpu",
    ops: Ops | None = None,
    revision: str | None = None,
) -> Streamed:
    """A checkpoint of which weights are read when a module is asked for.

    Arguments, checks and errors as in `load`. Every header is checked here; no weight is read, but
    those of a stored copy of tied embeddings.
    """
    model, entries, device = prepare(model_class, path_or_repo_id, dtype, device, ops, revision)
    if ops is None:  # the model stays on the meta device, whose table it has
        ops = default_table(device, model.dtype)
        for module in model.modules():
            if hasattr(module, "ops"):
                module.ops = ops
    return Streamed(model, entries, device)
