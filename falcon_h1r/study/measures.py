"""The measures of a dissection: names, axes, units, meaning.

Axes: point is the embedding and then each layer's output; layer, branch (ssm, attention, mlp), head
(of the SSM), query head, token; reader and read are tokens too, the row and the column of a matrix;
next is the token after which there is another one (all but the last).
"""

from __future__ import annotations

from typing import NamedTuple


class Measure(NamedTuple):
    """One line of MEASURES."""

    name: str
    axes: str  # separated by commas
    unit: str
    meaning: str


MEASURES = (
    Measure("residual.norm", "point, token", "", "Euclidean norm of the residual"),
    Measure("residual.before", "layer, branch, token", "", "norm of what the branch is added to"),
    Measure("contribution.norm", "layer, branch, token", "", "norm of what the branch adds"),
    Measure("contribution.cosine", "layer, branch, token", "", "with what it is added to"),
    Measure("attribution.token", "token", "token id", "the likeliest next token, explained here"),
    Measure("attribution.logit", "token", "logit", "the model's logit of that token"),
    Measure("attribution.embedding", "token", "logit", "the embedding's part of it"),
    Measure("attribution.branches", "layer, branch, token", "logit", "each branch's part of it"),
    Measure("attribution.rounding", "token", "logit", "the logit less all parts"),
    Measure("attention", "layer, query head, reader, read", "weight", "softmax weights"),
    Measure("hidden_attention", "layer, head, reader, read", "", "the SSM's M: y = M x + D x"),
    Measure("skip", "layer, head", "", "D, which adds D x to the scan's output"),
    Measure("attention.reach", "layer, query head, token", "tokens", "latest with 90 % of the row"),
    Measure("attention.fewest", "layer, query head, token", "tokens", "fewest with 90 % of it"),
    Measure("hidden_attention.reach", "layer, head, token", "tokens", "latest with 90 % of |row|"),
    Measure("hidden_attention.fewest", "layer, head, token", "tokens", "fewest with 90 % of it"),
    Measure("dt", "layer, head, token", "", "step size"),
    Measure("decay", "layer, head, token", "", "exp(dt A), the share of the state that stays"),
    Measure("half_life", "layer, head, token", "tokens", "ln 2 / (-A dt)"),
    Measure("state.norm", "layer, head, token", "", "Frobenius norm of the state after the token"),
    Measure("state.positions", "position", "token index", "where ranks are taken"),
    Measure("state.rank", "layer, head, position", "", "numerical rank of the state"),
    Measure("state.effective_rank", "layer, head, position", "", "exp of singular values' entropy"),
    Measure("conv.taps", "layer, channel, tap", "", "convolution, oldest sample first"),
    Measure("lens.top_ids", "point, token, place", "token id", "likeliest next tokens here"),
    Measure("lens.top_probabilities", "point, token, place", "", "their probabilities"),
    Measure("lens.kl", "point, token", "nats", "KL(final distribution || this point's)"),
    Measure("lens.rank", "point, next", "", "place of the true next token, 1 the likeliest"),
    Measure("loss", "next", "nats", "-log p of the true next token"),
    Measure("switch.loss", "layer, branch, next", "nats", "without the branch, less `loss`"),
)  # fmt: skip
