"""The forward pass of Falcon-H1 in plain Python numbers: it shares nothing with the package.

One sequence, token after token, scalars and lists; no torch, no batch, no chunks, no cache, no
operator tables. A Python float is a float64, and sums are `math.fsum`, so no narrower number can
hide here. Written from the equations of the papers (arXiv 2405.21060 and 2507.22448) and the names
in config.json.
"""

import math


def logits(config, weights: dict[str, list], ids: list[int]) -> list[list[float]]:
    """config: the dict of a `config.json`; weights: checkpoint names to nested lists."""
    c = config
    table = weights["model.embed_tokens.weight"]
    stream = [[value * c["embedding_multiplier"] for value in table[token]] for token in ids]
    for n in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{n}."
        layer = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        normed = [_norm(x, layer["input_layernorm.weight"], c["rms_norm_eps"]) for x in stream]
        attended = _attention(c, layer, normed)
        mixed = _mixer(c, layer, normed)
        for x, a, m in zip(stream, attended, mixed):
            for i in range(len(x)):
                x[i] += a[i] * c["attention_out_multiplier"] + m[i] * c["ssm_out_multiplier"]
            fed = _mlp(c, layer, _norm(x, layer["pre_ff_layernorm.weight"], c["rms_norm_eps"]))
            for i in range(len(x)):
                x[i] += fed[i]
    head = table if c["tie_word_embeddings"] else weights["lm_head.weight"]
    final = weights["model.final_layernorm.weight"]
    return [
        [c["lm_head_multiplier"] * v for v in _matvec(head, _norm(x, final, c["rms_norm_eps"]))]
        for x in stream
    ]


def _attention(c, layer, normed):
    heads, groups, size = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    queries, keys, values, out = [], [], [], []
    for position, x in enumerate(normed):
        x = [value * c["attention_in_multiplier"] for value in x]
        q, k, v = (_linear(layer, f"self_attn.{name}_proj", x) for name in "qkv")
        k = [value * c["key_multiplier"] for value in k]
        queries.append([_rotate(part, position, c["rope_theta"]) for part in _cut(q, size)])
        keys.append([_rotate(part, position, c["rope_theta"]) for part in _cut(k, size)])
        values.append(_cut(v, size))
        row = []
        for head in range(heads):
            group = head // (heads // groups)
            scores = [_dot(queries[-1][head], key[group]) / math.sqrt(size) for key in keys]
            highest = max(scores)
            shares = [math.exp(score - highest) for score in scores]
            total = math.fsum(shares)
            for channel in range(size):
                picked = [value[group][channel] for value in values]
                row.append(_dot(shares, picked) / total)
        out.append(_linear(layer, "self_attn.o_proj", row))
    return out


def _rotate(x, position, theta):
    half = len(x) // 2
    out = [0.0] * len(x)
    for i in range(half):
        angle = position * theta ** (-i / half)
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def _mixer(c, layer, normed):
    width = c["mamba_expand"] * c["hidden_size"] if c["mamba_d_ssm"] is None else c["mamba_d_ssm"]
    heads, groups, n = c["mamba_n_heads"], c["mamba_n_groups"], c["mamba_d_state"]
    p, per_group = width // heads, heads // groups
    low, high = c["time_step_limit"]
    sizes = (width, width, groups * n, groups * n, heads)
    taps = layer["mamba.conv1d.weight"]
    bias = layer.get("mamba.conv1d.bias", [0.0] * len(taps))
    state = [[[0.0] * n for _ in range(p)] for _ in range(heads)]
    before, out = [], []
    for u in normed:
        projected = _linear(layer, "mamba.in_proj", [value * c["ssm_in_multiplier"] for value in u])
        segments = []
        for size, multiplier in zip(sizes, c["ssm_multipliers"]):
            segments.append([value * multiplier for value in projected[:size]])
            projected = projected[size:]
        z, dt = segments[0], segments[4]
        before.append(segments[1] + segments[2] + segments[3])
        convolved = []
        for channel, (kernel,) in enumerate(taps):
            total = [bias[channel]]
            for back, weight in enumerate(reversed(kernel)):
                if back < len(before):
                    total.append(weight * before[-1 - back][channel])
            convolved.append(_silu(math.fsum(total)))
        x, B, C = convolved[:width], convolved[width : width + groups * n], convolved[-groups * n :]
        y = []
        for head in range(heads):
            first = head // per_group * n
            B_n, C_n = B[first : first + n], C[first : first + n]
            step = _softplus(dt[head] + layer["mamba.dt_bias"][head])
            step = min(max(step, low), high)
            decay = math.exp(-math.exp(layer["mamba.A_log"][head]) * step)
            for channel in range(p):
                x_value, row = x[head * p + channel], state[head][channel]
                for i in range(n):
                    row[i] = decay * row[i] + step * x_value * B_n[i]
                y.append(_dot(row, C_n) + layer["mamba.D"][head] * x_value)
        out.append(_linear(layer, "mamba.out_proj", _gated(c, layer, y, z)))
    return out


def _gated(c, layer, y, z):
    gate = [_silu(value) for value in z]
    if not c["mamba_rms_norm"]:
        return [a * b for a, b in zip(y, gate)]
    if not c["mamba_norm_before_gate"]:
        y = [a * b for a, b in zip(y, gate)]
    size = len(y) // c["mamba_n_groups"]
    ones = [1.0] * size
    y = [v for part in _cut(y, size) for v in _norm(part, ones, c["rms_norm_eps"])]
    y = [a * b for a, b in zip(y, layer["mamba.norm.weight"])]
    return [a * b for a, b in zip(y, gate)] if c["mamba_norm_before_gate"] else y


def _mlp(c, layer, x):
    inside, outside = c["mlp_multipliers"]
    gate = _linear(layer, "feed_forward.gate_proj", x)
    up = _linear(layer, "feed_forward.up_proj", x)
    hidden = [_silu(inside * g) * u for g, u in zip(gate, up)]
    return [outside * value for value in _linear(layer, "feed_forward.down_proj", hidden)]


def _norm(x, weight, eps):
    scale = 1 / math.sqrt(math.fsum(v * v for v in x) / len(x) + eps)
    return [v * scale * w for v, w in zip(x, weight)]


def _linear(layer, name, x):
    y = _matvec(layer[name + ".weight"], x)
    bias = layer.get(name + ".bias")
    return y if bias is None else [a + b for a, b in zip(y, bias)]


def _matvec(matrix, x):
    return [_dot(row, x) for row in matrix]


def _dot(a, b):
    return math.fsum(u * v for u, v in zip(a, b))


def _cut(x, size):
    return [x[start : start + size] for start in range(0, len(x), size)]


def _silu(x):
    return x / (1 + math.exp(-x))


def _softplus(x):
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))
