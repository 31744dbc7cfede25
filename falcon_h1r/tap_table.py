"""The names of what can be observed in a forward; `taps.py` observes it.

A full name is a tap's name behind its layer: "layers.3.mamba.scan.y". AXES names the axes of the
table. Inside the model rows are right-padded (`cache.Span`), so b and l are that layout's.
TAPS and MODEL_TAPS are tensors that the forward makes anyway. DERIVED_TAPS are computed beside the
forward from what an operator is given, take far more memory, and are recorded only when named.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable
from typing import NamedTuple

PORTS = {
    "input": "an argument before the call",
    "after": "an argument after the call, which may have changed it",
    "output": "a result",
    "derived": "computed from all arguments after the call; index: the function of `derived.py`",
}

AXES = {
    "b": "rows",
    "l": "tokens",
    "s": "tokens so far",
    "d": "model width",
    "i": "MLP width",
    "k": "columns of in_proj: z, x, B, C, dt",
    "h": "heads",
    "j": "key heads",
    "e": "per attention head",
    "p": "channels per SSM head",
    "g": "groups",
    "n": "state size",
    "c": "conv channels",
    "v": "conv history",
    "w": "vocabulary",
    "hp": "SSM heads × channels",
    "he": "query heads × channels",
    "je": "key heads × channels",
}


class Source(NamedTuple):
    """A place of a call at which a tensor is seen."""

    module: str  # path below the layer, or below the model; "" is the layer or model itself
    port: str  # one of PORTS
    index: int | str = 0  # of an argument (a string: by keyword), of a result, or see PORTS
    axes: str = ""  # where they differ from the tap's: a decode step has no l
    multiplier: str = ""  # config key by which the tensor is multiplied here


class Tap(NamedTuple):
    """One name of TAPS, DERIVED_TAPS or MODEL_TAPS."""

    name: str
    axes: str  # separated by spaces, see AXES
    sources: tuple[Source, ...]  # the first that is called in a forward
    meaning: str
    # Config keys that act on the way here from the tap before; [n] picks one of several values.
    keys: tuple[str, ...] = ()
    file: str = ""  # of falcon_h1r/, where TORCH makes it
    made: str = ""  # the step or result it is, where neither multipliers nor the name say so

    @property
    def derived(self) -> bool:
        """Whether it is one of DERIVED_TAPS."""
        return self.sources[0].port == "derived"

    @property
    def multipliers(self) -> tuple[str, ...]:
        """Those of `keys` by which the tensor is multiplied."""
        return tuple(key for key in self.keys if "multiplier" in key)

    @property
    def maker(self) -> tuple[str, str]:
        """The module or operator that makes the tensor, and which of its results or steps."""
        source, model = self.sources[0], self in MODEL_TAPS
        module = source.module.removeprefix("model.") if model else source.module
        if source.port != "output" or source.multiplier or not module:
            outer = module.rpartition(".")[0] or ("model" if model else "block")
            return outer, self.made or ", ".join(self.multipliers) or self.meaning
        if module == self.name:
            return module, "output"
        # The one operator rope is called for queries and for keys.
        operator = module.removesuffix("_q").removesuffix("_k")
        return operator, self.made or self.name.rpartition(".")[2]


def _tap(name, axes, sources, meaning, keys="", file="", made=""):
    return Tap(name, axes, tuple(sources), meaning, tuple(keys.split()), file, made)


def _in(module, index=0, **kw):
    return Source(module, "input", index, **kw)


def _out(module, index=0, **kw):
    return Source(module, "output", index, **kw)


def _derived(module, what):
    return Source(module, "derived", f"{what}_{module.rpartition('.')[2]}")


def _both(scan, step, index, axes, step_index=None, port="input"):
    """The same tensor in a stretch of tokens and in one decode step."""
    step_index = index if step_index is None else step_index
    return Source(scan, port, index), Source(step, port, step_index, axes)


_CONV, _CONV1 = "mamba.causal_conv1d", "mamba.causal_conv1d_step"
_SCAN, _STEP = "mamba.ssd_scan", "mamba.ssd_step"
_GATE, _ATT, _ATT1 = "mamba.gated_rms_norm", "self_attn.attention", "self_attn.decode_attention"

# fmt: off
TAPS: tuple[Tap, ...] = (  # of every layer, in the order of the forward
    _tap("residual.in", "b l d", [_in("")],
         "what enters the block", file="model.py"),
    _tap("input_layernorm", "b l d", [_out("input_layernorm")],
         "the norm both branches share", "rms_norm_eps", "norm.py"),
    _tap("mamba.in_proj.in", "b l d", [_in("mamba.in_proj")],
         "input of the mixer's projection", "ssm_in_multiplier", "mamba2.py"),
    _tap("mamba.in_proj", "b l k", [_out("mamba.in_proj")],
         "z, x, B, C and dt side by side", file="mamba2.py"),
    _tap("mamba.conv.window_in", "b v c",
         [Source(_CONV, "input", "initial_window_bvc"), _in(_CONV1, 1)],
         "the last inputs of the tokens before", file="conv.py"),
    _tap("mamba.conv.x", "b l c", _both(_CONV, _CONV1, 0, "b c"),
         "x, B and C before the convolution",
         "ssm_multipliers[1] ssm_multipliers[2] ssm_multipliers[3]", "conv.py"),
    _tap("mamba.conv.out", "b l c", [_out(_CONV), _out(_CONV1, axes="b c")],
         "x, B and C after convolution and SiLU", file="conv.py", made="y"),
    _tap("mamba.conv.window", "b v c", [_out(_CONV, 1), Source(_CONV1, "after", 1)],
         "the window kept for the next tokens", file="conv.py"),
    _tap("mamba.scan.x", "b l h p", _both(_SCAN, _STEP, 0, "b h p", 1),
         "input of the scan", file="mamba2.py", made="split of the convolution"),
    _tap("mamba.scan.dt", "b l h", _both(_SCAN, _STEP, 1, "b h", 2),
         "step size: bias, softplus and clamp done; 0 at padding",
         "ssm_multipliers[4] time_step_limit", "mamba2.py", "dt_bias, softplus and clamp"),
    _tap("mamba.scan.A", "h", _both(_SCAN, _STEP, 2, "h", 3),
         "decay rate, -exp(A_log)", file="mamba2.py", made="-exp(A_log)"),
    _tap("mamba.scan.B", "b l g n", _both(_SCAN, _STEP, 3, "b g n", 4),
         "what is written to the state, per group", file="mamba2.py",
         made="split of the convolution"),
    _tap("mamba.scan.C", "b l g n", _both(_SCAN, _STEP, 4, "b g n", 5),
         "what is read from the state, per group", file="mamba2.py",
         made="split of the convolution"),
    _tap("mamba.scan.D", "h", _both(_SCAN, _STEP, 5, "h", 6),
         "weight of the skip from x to y", file="mamba2.py", made="D"),
    _tap("mamba.scan.state_in", "b h p n",
         [Source(_SCAN, "input", "initial_state_bhpn"), _in(_STEP, 0)],
         "SSM state before the first token", file="mamba2.py"),
    _tap("mamba.scan.y", "b l h p", [_out(_SCAN), _out(_STEP, axes="b h p")],
         "output of the scan, D x in it", file="scan.py"),
    _tap("mamba.scan.state", "b h p n", [_out(_SCAN, 1), Source(_STEP, "after", 0)],
         "SSM state after the last token", file="scan.py"),
    _tap("mamba.gate.y", "b l hp", [_in(_GATE)],
         "the scan's output, heads merged", file="mamba2.py"),
    _tap("mamba.gate.z", "b l hp", [_in(_GATE, 1)],
         "the gate before its SiLU", "ssm_multipliers[0]", "mamba2.py"),
    _tap("mamba.gate.out", "b l hp", [_out(_GATE)],
         "gated, and normalised per group where the model does",
         "mamba_rms_norm mamba_norm_before_gate mamba_n_groups rms_norm_eps", "norm.py"),
    _tap("mamba.out_proj", "b l d", [_out("mamba.out_proj")],
         "the mixer's output", file="mamba2.py"),
    _tap("contribution.ssm", "b l d", [_out("mamba", multiplier="ssm_out_multiplier")],
         "what the SSM branch adds to the residual", "ssm_out_multiplier", "block.py"),
    _tap("self_attn.in", "b l d", [_in("self_attn")],
         "input of q, k and v", "attention_in_multiplier", "block.py"),
    _tap("self_attn.q_proj", "b l he", [_out("self_attn.q_proj")],
         "queries before rotation, heads merged", file="attention.py"),
    _tap("self_attn.k_proj", "b l je", [_out("self_attn.k_proj")],
         "keys before multiplier and rotation, heads merged", file="attention.py"),
    _tap("self_attn.v_proj", "b l je", [_out("self_attn.v_proj")],
         "values, heads merged", file="attention.py"),
    _tap("self_attn.rope.q_in", "b h l e", [_in("self_attn.rope_q")],
         "queries before rotation", file="attention.py"),
    _tap("self_attn.rope.q", "b h l e", [_out("self_attn.rope_q")],
         "queries, rotated", "rope_theta", "rope.py"),
    _tap("self_attn.rope.k_in", "b j l e", [_in("self_attn.rope_k")],
         "keys before multiplier and rotation", file="attention.py"),
    _tap("self_attn.rope.k", "b j l e", [_out("self_attn.rope_k")],
         "keys, multiplied and rotated", "key_multiplier rope_theta", "rope.py"),
    _tap("self_attn.attention.q", "b h l e", _both(_ATT, _ATT1, 0, "b h e"),
         "queries as attention gets them", file="attention.py"),
    _tap("self_attn.attention.k", "b j s e", _both(_ATT, _ATT1, 1, "b j s e"),
         "all keys so far, cached ones included", file="attention.py"),
    _tap("self_attn.attention.v", "b j s e", _both(_ATT, _ATT1, 2, "b j s e"),
         "all values so far", file="attention.py"),
    _tap("self_attn.attention.o", "b h l e", [_out(_ATT), _out(_ATT1, axes="b h e")],
         "attention's output per head", file="attention.py"),
    _tap("self_attn.o_proj", "b l d", [_out("self_attn.o_proj")],
         "the attention branch's output", file="attention.py"),
    _tap("contribution.attention", "b l d",
         [_out("self_attn", multiplier="attention_out_multiplier")],
         "what the attention branch adds to the residual", "attention_out_multiplier", "block.py"),
    _tap("residual.mid", "b l d", [_in("pre_ff_layernorm")],
         "the residual with both branches added", file="block.py",
         made="sum of the branches with their multipliers"),
    _tap("pre_ff_layernorm", "b l d", [_out("pre_ff_layernorm")],
         "input of the MLP", "rms_norm_eps", "norm.py"),
    _tap("feed_forward.gate_proj", "b l i", [_out("feed_forward.gate_proj")],
         "the MLP's gate before multiplier and SiLU", file="mlp.py"),
    _tap("feed_forward.up_proj", "b l i", [_out("feed_forward.up_proj")],
         "what the gate multiplies", file="mlp.py"),
    _tap("feed_forward.swiglu.gate", "b l i", [_in("feed_forward.swiglu")],
         "the gate as the operator gets it", file="mlp.py"),
    _tap("feed_forward.swiglu.up", "b l i", [_in("feed_forward.swiglu", 1)],
         "the other factor as the operator gets it", file="mlp.py"),
    _tap("feed_forward.swiglu.out", "b l i", [_out("feed_forward.swiglu")],
         "up * silu(multiplier * gate)", "mlp_multipliers[0]", "mlp.py"),
    _tap("feed_forward.down_proj", "b l d", [_out("feed_forward.down_proj")],
         "the MLP's output before its multiplier", file="mlp.py"),
    _tap("contribution.mlp", "b l d", [_out("feed_forward")],
         "what the MLP adds to the residual", "mlp_multipliers[1]", "mlp.py",
         "down_proj and its multiplier"),
    _tap("residual.out", "b l d", [_out("")],
         "what leaves the block", file="block.py", made="residual sum"),
)
DERIVED_TAPS: tuple[Tap, ...] = (  # of every layer
    _tap("mamba.scan.states", "b l h p n", [_derived(_SCAN, "states"), _derived(_STEP, "states")],
         "SSM state after every token; padding leaves it as it is", file="derived.py"),
    _tap("self_attn.attention.probabilities", "b h l s",
         [_derived(_ATT, "probabilities"), _derived(_ATT1, "probabilities")],
         "softmax(q k^T / sqrt(e)); 0 at keys a query does not see, and for a padding query",
         file="derived.py"),
)
MODEL_TAPS: tuple[Tap, ...] = (  # once per forward; the first two come before the layers
    _tap("embed_tokens", "b l d", [_out("model.embed_tokens")],
         "rows of the embedding", file="model.py"),
    _tap("embedding", "b l d", [_out("model.embed_tokens", multiplier="embedding_multiplier")],
         "the residual's first value", "embedding_multiplier", "model.py"),
    _tap("final_layernorm.in", "b l d", [_in("model.final_layernorm")],
         "the last residual, at the positions asked for", file="model.py", made="last residual"),
    _tap("final_layernorm", "b l d", [_out("model.final_layernorm")],
         "input of the head", "rms_norm_eps", "norm.py"),
    _tap("lm_head", "b l w", [_out("lm_head")],
         "logits before their multiplier; not with tied embeddings", file="model.py"),
    _tap("logits", "b l w", [_out("")],
         "what the model returns, in the caller's layout", "lm_head_multiplier", "model.py"),
)
# fmt: on

_BY_NAME = {tap.name: tap for tap in (*TAPS, *DERIVED_TAPS, *MODEL_TAPS)}
_BEFORE_LAYERS = 2

# Every multiplier of a config, each once, in the order in which they act.
MULTIPLIERS = tuple(dict.fromkeys(key for tap in _BY_NAME.values() for key in tap.multipliers))


def config_value(config, key: str):
    """The value of one of a tap's `keys`."""
    name, _, place = key.removesuffix("]").partition("[")
    value = getattr(config, name)
    return value[int(place)] if place else value


def _in_order() -> list[Tap]:
    """TAPS with each derived one behind those of its operator."""
    order = list(TAPS)
    for tap in DERIVED_TAPS:
        operator = tap.sources[0].module
        last = max(i for i, other in enumerate(order) if other.sources[0].module == operator)
        order.insert(last + 1, tap)
    return order


_OF_LAYER = _in_order()


def tap_of(full_name: str) -> Tap:
    """The tap of a full or a tap's name. Raises ValueError with the nearest known name."""
    head, _, rest = full_name.partition(".")
    if head == "layers" and rest.partition(".")[0].isdigit():
        full_name = rest.partition(".")[2]
    if full_name not in _BY_NAME:
        close = difflib.get_close_matches(full_name, _BY_NAME, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"no tap {full_name!r}{hint}")
    return _BY_NAME[full_name]


def full_names(
    config, names: Iterable[str] | None = None, layers: Iterable[int] | None = None
) -> list[str]:
    """Full names in the order of the forward, of a model with this `config`.

    names: taps ("mamba.scan.y"), patterns ("mamba.scan.*") or full names ("layers.0.residual.in");
    None: all but the derived ones. A derived tap is matched by its own name, behind any layer
    ("layers.*.mamba.scan.states"), and by no pattern of its name. layers: their numbers, negative
    ones count from the end; None: all. `layers` bounds the taps of layers only. Raises ValueError
    for a name that matches nothing and a layer that the model does not have.
    """
    count = config.num_hidden_layers
    chosen = range(count) if layers is None else sorted({_layer(n, count) for n in layers})
    own = [
        tap.name for tap in MODEL_TAPS if not (config.tie_word_embeddings and tap[0] == "lm_head")
    ]
    inner = [f"layers.{n}.{tap.name}" for n in chosen for tap in _OF_LAYER]
    known = [*own[:_BEFORE_LAYERS], *inner, *own[_BEFORE_LAYERS:]]
    if names is None:
        return [name for name in known if not tap_of(name).derived]
    if isinstance(names, str):
        raise ValueError(f"names is the string {names!r}, expected a list of names")
    wanted = set()
    for name in names:
        found = {full for full in known if _matches(full, name)}
        if not found:
            tap_of(name)
            raise ValueError(f"no tap {name!r} in this model, or not in the layers asked for")
        wanted |= found
    return [name for name in known if name in wanted]


def _matches(full_name: str, pattern: str) -> bool:
    own = inner_name(full_name)
    if tap_of(own).derived and not f".{pattern}".endswith(f".{own}"):
        return False
    return any(fnmatch.fnmatchcase(name, pattern) for name in (full_name, own))


def inner_name(full_name: str) -> str:
    """A full name without its layer."""
    return full_name.split(".", 2)[2] if full_name.startswith("layers.") else full_name


def _layer(number: int, count: int) -> int:
    if not -count <= number < count:
        raise ValueError(f"layer {number}: the model has layers 0 to {count - 1}")
    return number % count
