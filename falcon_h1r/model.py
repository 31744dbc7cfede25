"""FalconH1ForCausalLM: embedding, hybrid blocks, final norm, head.

Module and parameter names are the checkpoint's. `model` is a plain container of the checkpoint's
`model.*` names, not a second forward.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .block import HybridBlock
from .cache import Cache, Span
from .checks import as_dtype, as_ids, as_integers, as_mask, check_integer
from .config import FalconH1Config
from .mamba2 import Mamba2Mixer
from .norm import RMSNorm
from .ops import Ops, default_table, table
from .precision import autocasts, compute_dtype, scaled


class FalconH1ForCausalLM(nn.Module):
    """A Falcon-H1 language model with freshly initialised weights.

    config: `FalconH1Config`; ops: an operator table, None means TRITON on a GPU and TORCH
    elsewhere, also after the model was moved (`ops.default_table`; the kernels have no backward:
    train with TORCH); dtype: of the weights, default float32 (A_log, D and dt_bias are at least
    float32, whatever the model is cast to); device: None means torch's default device, "meta"
    builds without memory. Load weights with `from_pretrained`.
    """

    config_class = FalconH1Config

    def __init__(self, config: FalconH1Config, ops: Ops | None = None, dtype=None, device=None):
        super().__init__()
        device = torch.get_default_device() if device is None else torch.device(device)
        dtype = torch.float32 if dtype is None else as_dtype(dtype)
        self._follows_device = False
        self.config, self.ops = config, default_table(device, dtype) if ops is None else ops
        self.source: Path | None = None  # the folder the weights came from
        self.eos_token_ids = config.eos_token_ids  # loading adds those of generation_config.json
        with torch.device("meta"):
            # nn.Embedding(v, d) draws its values even here, for which torch imports sympy: 1 s.
            embedding = torch.empty(config.vocab_size, config.hidden_size)
            self.model = nn.ModuleDict(
                {
                    "embed_tokens": nn.Embedding.from_pretrained(embedding, freeze=False),
                    "layers": nn.ModuleList(
                        HybridBlock(config, self.ops) for _ in range(config.num_hidden_layers)
                    ),
                    "final_layernorm": RMSNorm(config.hidden_size, config.rms_norm_eps, self.ops),
                }
            )
            if not config.tie_word_embeddings:
                self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.to(dtype)
        if device.type != "meta":
            self.to_empty(device=device)
            self.init_weights()
        self._follows_device = ops is None

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Start values for training, in place.

        Matrices normal(0, initializer_range), biases 0, norms 1; A in 1..h, dt = softplus(dt_bias)
        log-uniform in 0.001..0.1, the defaults of the Mamba-2 paper.
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight.normal_(0, self.config.initializer_range, generator=generator)
            elif isinstance(module, nn.Conv1d):
                bound = module.kernel_size[0] ** -0.5
                module.weight.uniform_(-bound, bound, generator=generator)
            elif isinstance(module, Mamba2Mixer):
                heads = torch.arange(1, len(module.A_log) + 1, device=module.A_log.device)
                module.A_log.copy_(heads.log())
                module.D.fill_(1)
                module.dt_bias.uniform_(math.log(0.001), math.log(0.1), generator=generator)
                dt = module.dt_bias.exp()
                module.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
            elif hasattr(module, "weight"):
                module.weight.fill_(1)
            if getattr(module, "bias", None) is not None:
                module.bias.zero_()

    @property
    def dtype(self) -> torch.dtype:
        return self.model["embed_tokens"].weight.dtype

    @property
    def device(self) -> torch.device:
        return self.model["embed_tokens"].weight.device

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        logits_to_keep: int = 0,
        seq_idx: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        recompute: bool = False,
        head: Callable[[Tensor], Any] | None = None,
    ) -> Tensor:
        """Logits of the next token at every position, and `cache` advanced in place.

        input_ids: (b, l) int64, the new tokens. attention_mask: (b, l), 1 at real tokens, 0 at
        padding, which may stand before or after a row's tokens but not between them; None means all
        real. A row gives what it would give alone; padding is never cached, and its logits are 0.
        cache: from `new_cache`, with one row per row of input_ids. It holds values, no graph,
        and is overwritten in place: a forward with a cache gives logits without a gradient.
        logits_to_keep: 0 for all positions; k for the last k real tokens of each row (zeros in
        front of shorter rows).
        seq_idx: (b, l) integers, equal inside a document: several documents packed into one row,
        each as if alone; not together with a cache or with padding.
        inputs_embeds: (b, l, d) in the model's dtype, in place of input_ids: what `embed` returns,
        the embedding multiplier included.
        recompute: keep the input of each block alone for the backward, which runs the block again:
        a training step takes a third longer, and its memory is one block's.
        head: makes what is returned of the last hidden states (b, l or k, d), behind the final
        norm; None: the logits. See `training.next_token_loss`.
        Returns (b, l or k, vocab) logits in float32 (float64 in a float64 model).
        Raises ValueError for ids outside the vocabulary, shapes and dtypes that do not fit, a cache
        of another model, full, or in which a forward was interrupted, and a row longer than
        max_position_embeddings.
        """
        if cache is not None and torch.is_grad_enabled():
            options = {"seq_idx": seq_idx, "inputs_embeds": inputs_embeds, "head": head}
            with torch.no_grad():
                return FalconH1ForCausalLM.forward(
                    self, input_ids, attention_mask, cache, logits_to_keep, **options
                )
        tokens = self._tokens(input_ids, inputs_embeds)
        shape = tokens.shape[:2]
        check_integer("logits_to_keep", logits_to_keep, 0)
        if cache is not None:
            cache.check(self.config, len(tokens), self.dtype, self.device)
        if attention_mask is not None:
            attention_mask = as_mask("attention_mask", attention_mask, shape).to(tokens.device)
        if seq_idx is not None:
            seq_idx = self._documents(seq_idx, shape)
            if cache is not None or attention_mask is not None:
                raise ValueError("seq_idx: packed documents take no cache and no attention_mask")
        self._check_autocast()
        tokens, lengths, shift = _right_pad(tokens, attention_mask)
        span = Span.plan(self.config, cache, tokens, lengths, seq_idx, compute_dtype(self.dtype))
        if seq_idx is None:
            self._check_positions(span.total)
        x_bld = self.embed(tokens) if inputs_embeds is None else tokens
        if cache is not None:
            held, cache.lengths = cache.lengths, ~cache.lengths  # stays, should a block raise
        recompute = recompute and torch.is_grad_enabled()
        for block, layer in self._blocks(cache):
            if recompute:
                x_bld = checkpoint(block, x_bld, span, layer, use_reentrant=False)
            else:
                x_bld = block(x_bld, span, layer)
        if cache is not None:
            cache.lengths = held.add_(tokens.shape[1] if lengths is None else lengths)
        x_bld = _rows_to_return(x_bld, shape[1], lengths, shift, logits_to_keep)
        return self.logits(x_bld) if head is None else head(self.model["final_layernorm"](x_bld))

    def embed(self, input_ids: Tensor) -> Tensor:
        """(b, l) ids -> (b, l, d): the embedding and its multiplier."""
        return scaled(self.model["embed_tokens"](input_ids), self.config.embedding_multiplier)

    def run(self, x_bld: Tensor, span: Span, cache: Cache | None = None) -> Tensor:
        """(b, l, d) -> (b, l, d): the blocks, one after another, as in `forward`.

        Nothing is checked or read back to the CPU, and the lengths of the cache stay with the
        caller: `embed`, `run` and `logits` are what is captured, exported and compiled. Compile a
        twin `under("inductor")` for inference.
        """
        for block, layer in self._blocks(cache):
            x_bld = block(x_bld, span, layer)
        return x_bld

    def _blocks(self, cache: Cache | None):
        """Each block, beside the part of the cache that is its own."""
        blocks = self.model["layers"]
        layers = [None] * len(blocks) if cache is None else cache.layers()
        return zip(blocks, layers, strict=True)

    def logits(self, x_bld: Tensor) -> Tensor:
        """(b, l, d) -> (b, l, vocab): the final norm, the head and its multiplier."""
        x_bld = self.model["final_layernorm"](x_bld)
        if hasattr(self, "lm_head"):
            logits = self.lm_head(x_bld)
        else:  # tied
            logits = F.linear(x_bld, self.model["embed_tokens"].weight)
        return scaled(logits.to(compute_dtype(self.dtype)), self.config.lm_head_multiplier)

    def _tokens(self, input_ids, inputs_embeds) -> Tensor:
        """The one of both that was given, checked: (b, l) ids or (b, l, d)."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected either input_ids or inputs_embeds")
        if inputs_embeds is not None:
            d, shape = self.config.hidden_size, tuple(getattr(inputs_embeds, "shape", ()))
            dtype = getattr(inputs_embeds, "dtype", type(inputs_embeds).__name__)
            if len(shape) != 3 or 0 in shape or shape[2] != d or dtype != self.dtype:
                raise ValueError(
                    f"inputs_embeds: expected {self.dtype} of shape (batch, length, {d}), "
                    f"found {shape} {dtype}"
                )
            return inputs_embeds
        ids = as_ids("input_ids", input_ids, self.config.vocab_size)
        if ids.dim() != 2:
            raise ValueError(
                f"input_ids: expected the shape (batch, length), found {tuple(ids.shape)}"
            )
        return ids

    def _documents(self, seq_idx, shape) -> Tensor:
        """seq_idx numbered along each row, from 0."""
        seq_idx = as_integers("seq_idx", seq_idx, shape)
        numbers = F.pad((seq_idx[:, 1:] != seq_idx[:, :-1]).cumsum(1), (1, 0))
        if shape[1] > self.config.max_position_embeddings:
            self._check_positions(max(int(row.bincount().max()) for row in numbers))
        return numbers

    def _check_autocast(self) -> None:
        weight = self.model["embed_tokens"].weight
        if autocasts(weight) and self.dtype in (torch.bfloat16, torch.float16):
            other = torch.get_autocast_dtype(weight.device.type)
            if other != self.dtype:
                raise ValueError(f"torch.autocast to {other}: the model is in {self.dtype} already")

    def _check_positions(self, count: int) -> None:
        limit = self.config.max_position_embeddings
        if count > limit:
            raise ValueError(
                f"input_ids: a row of {count} tokens, more than max_position_embeddings {limit} "
                "(a larger number in the config lets it through)"
            )

    def under(self, ops: Ops | str) -> FalconH1ForCausalLM:
        """A twin under another table, or the table of a name; parameters and buffers are shared.

        What changes the parameters of one - a cast, a move, training - changes them in both.
        Raises ValueError for a module with a `forward` put on it, which a twin would share.
        """
        for name, module in self.named_modules():
            if "forward" in vars(module):
                raise ValueError(f"{name or 'the model'}: its forward was replaced; take that off")
        ops = ops if isinstance(ops, Ops) else table(ops)

        def view(module):
            twin = copy.copy(module)
            twin._modules = {name: view(child) for name, child in module._modules.items()}
            if hasattr(twin, "ops"):
                twin.ops = ops
            return twin

        twin = view(self)
        twin._follows_device = False
        return twin

    def _apply(self, fn, recurse=True):
        """`to`, `cuda`, `half` ...: a table that nobody chose is the new device's and dtype's."""
        super()._apply(fn, recurse)
        if self._follows_device:
            before, now = self.ops, default_table(self.device, self.dtype)
            for module in self.modules():
                if getattr(module, "ops", None) is before:  # not what somebody put in its place
                    module.ops = now
        return self

    def extra_repr(self) -> str:
        return f"ops={self.ops!r}"

    def new_cache(self, batch_size: int, max_length: int) -> Cache:
        """An empty cache for `batch_size` rows of up to `max_length` tokens.

        Raises ValueError for numbers below 1, and where the device has no such memory.
        """
        try:
            return Cache.alloc(self.config, batch_size, max_length, self.dtype, self.device)
        except (RuntimeError, OverflowError, TypeError, MemoryError) as error:
            raise ValueError(
                f"a cache of {batch_size} x {max_length} tokens: {self.device} has no memory for it"
            ) from error

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo_id: str | Path,
        dtype: torch.dtype | str | None = None,
        device: str | torch.device = "cpu",
        ops: Ops | None = None,
        revision: str | None = None,
        *,
        check: bool = False,
        progress: Callable[[int, int, str], None] | None = None,
    ) -> FalconH1ForCausalLM:
        """Load a local folder, a hub repository or the embedded "h1r-pico", in eval mode.

        dtype: of the weights, or its name; None: as they are stored. check: refuse NaN and
        infinities. progress: called after each tensor with (bytes read, bytes in all, tensor name).
        Strict: every tensor of the model must be there, and no other. What is accepted and raised
        in detail: `checkpoint.load`.
        """
        from .checkpoint import load

        return load(cls, path_or_repo_id, dtype, device, ops, revision, check, progress)

    def save_pretrained(self, path: str | Path) -> None:
        """Write the released layout, which transformers loads too; see `checkpoint.save`."""
        from .checkpoint import save

        save(self, path)


def _right_pad(tokens: Tensor, attention_mask: Tensor | None):
    """Move each row's real tokens to the front, the one layout that the layers know.

    tokens: (b, l) ids or (b, l, d); attention_mask: (b, l) booleans. Returns (b, longest row, ...),
    lengths (b,) on the CPU or None if no padding is left, and shift (b,): the column at which each
    row's tokens stood.
    """
    if attention_mask is None:
        return tokens, None, None
    real = attention_mask
    starts_b = real.int().argmax(1)
    lengths_b = real.sum(1)
    column = torch.arange(real.shape[1], device=real.device)
    run = (column >= starts_b[:, None]) & (column < (starts_b + lengths_b)[:, None])
    if not torch.equal(run, real):
        row = int((run != real).any(1).int().argmax())
        raise ValueError(f"attention_mask: row {row} has padding between its real tokens")
    lengths = lengths_b.cpu()
    longest = int(lengths.max())
    if longest == 0:
        raise ValueError("attention_mask: no row has a real token")
    index = (starts_b[:, None] + column[:longest]).clamp(max=real.shape[1] - 1)
    full = bool((lengths == longest).all())
    rows = torch.arange(len(tokens), device=real.device)[:, None]
    return tokens[rows, index], None if full else lengths, starts_b


def _rows_to_return(x_bld: Tensor, l: int, lengths, shift, keep: int) -> Tensor:
    """The hidden states the head is asked for, (b, l or keep, d), zero where there is no token."""
    b, longest, d = x_bld.shape
    if lengths is None and (shift is None or longest == l or keep):
        if keep == 0 or keep == longest:
            return x_bld
        if keep < longest:
            return x_bld[:, -keep:]
    column = torch.arange(keep or l, device=x_bld.device)
    ends = torch.full((b,), longest) if lengths is None else lengths
    ends = ends.to(x_bld.device)[:, None]
    index = column + ends - keep if keep else column - shift[:, None]
    inside = (index >= 0) & (index < ends)
    picked = x_bld.gather(1, index.clamp(0, longest - 1)[..., None].expand(-1, -1, d))
    return picked * inside[..., None]
