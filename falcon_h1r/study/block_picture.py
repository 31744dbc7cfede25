"""The hybrid block as a drawing: its tensors as boxes, arrows between them, multipliers in them.

BOXES is the walk of the dissect page, too. What a multiplier acts on and what an axis is called
comes from the table of taps; the sizes of axes come from a forward of the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any, NamedTuple

from ..tap_table import AXES, config_value, tap_of


class Box(NamedTuple):
    """A tensor that the walk and the drawing show."""

    tap: str
    lane: str  # "ssm", "attention", "mlp", or "" on the residual
    title: str
    what: str
    # Where it comes from: a box, then taps without a box on the way from there, as one string.
    paths: tuple[str, ...]

    @property
    def multipliers(self) -> tuple[str, ...]:
        """Config keys that act between the boxes before and this one."""
        taps = [*(name for path in self.paths for name in path.split()[1:]), self.tap]
        return tuple(key for name in taps for key in tap_of(name).multipliers)


# fmt: off
BOXES = (
    Box("residual.in", "", "Residual", "what the layers before have written",
        ("embed_tokens embedding",)),
    Box("input_layernorm", "", "Shared norm",
        "the residual scaled to an rms of 1, times a weight per channel", ("residual.in",)),
    Box("mamba.in_proj", "ssm", "Projection", "one matrix makes gate z, input x, B, C and step dt",
        ("input_layernorm mamba.in_proj.in",)),
    Box("mamba.conv.out", "ssm", "Short convolution",
        "x, B and C see the last few tokens; then SiLU", ("mamba.in_proj mamba.conv.x",)),
    Box("mamba.scan.dt", "ssm", "Step size dt",
        "per head: how much of this token enters the state", ("mamba.in_proj",)),
    Box("mamba.scan.y", "ssm", "Scan",
        "state ← decay · state + dt · x Bᵀ, then y = state · C + D x",
        ("mamba.conv.out", "mamba.scan.dt")),
    Box("mamba.gate.out", "ssm", "Gate",
        "times SiLU(z), normalised per group where the model does",
        ("mamba.scan.y", "mamba.in_proj mamba.gate.z")),
    Box("contribution.ssm", "ssm", "Added by the SSM", "projected back, times its multiplier",
        ("mamba.gate.out mamba.out_proj",)),
    Box("self_attn.attention.q", "attention", "Queries",
        "what each head looks for, rotated by position",
        ("input_layernorm self_attn.in self_attn.rope.q",)),
    Box("self_attn.attention.k", "attention", "Keys",
        "what each token offers, rotated by position",
        ("input_layernorm self_attn.in self_attn.rope.k",)),
    Box("self_attn.attention.v", "attention", "Values",
        "what a token hands over when it is read", ("input_layernorm self_attn.in",)),
    Box("self_attn.attention.o", "attention", "Mixture",
        "values, weighted by softmax(q · k / √size)",
        ("self_attn.attention.q", "self_attn.attention.k", "self_attn.attention.v")),
    Box("contribution.attention", "attention", "Added by attention",
        "projected back, times its multiplier", ("self_attn.attention.o self_attn.o_proj",)),
    Box("residual.mid", "", "Residual", "with both branches added",
        ("contribution.ssm", "contribution.attention", "residual.in")),
    Box("pre_ff_layernorm", "mlp", "Second norm", "the residual scaled again, with its own weights",
        ("residual.mid",)),
    Box("feed_forward.swiglu.out", "mlp", "SwiGLU", "up · SiLU(gate)", ("pre_ff_layernorm",)),
    Box("contribution.mlp", "mlp", "Added by the MLP", "projected back, times its multiplier",
        ("feed_forward.swiglu.out feed_forward.down_proj",)),
    Box("residual.out", "", "Residual", "handed to the next layer",
        ("contribution.mlp", "residual.mid")),
)
# fmt: on
LANES = {"ssm": "SSM branch (mamba)", "attention": "Attention branch (self_attn)"}
LINE, PAD, STEP, EDGE, GUTTER = 17, 8, 22, 18, 11

# Pixels per letter of the widest usual fonts (DejaVu): what fits there fits everywhere.
_LETTER = {"title": 8.3, "head": 8.3, "tap": 6.7, "soft": 6.7, "times": 6.7}

_STYLE = """
.block{font:12px system-ui,"Liberation Sans",Arial,sans-serif;max-width:100%;height:auto;
--c:var(--embedding,#6f757e)}
.block .paper{fill:#fbfaf7}.block text{fill:var(--ink,#22252a);font-size:12px}
.block .title{font-weight:650;font-size:13px}.block .soft{fill:var(--muted,#5c626c)}
.block .tap{font:11px ui-monospace,"Liberation Mono",Menlo,monospace;fill:var(--muted,#5c626c)}
.block .times{fill:var(--c)}
.block .ssm{--c:var(--ssm,#08808c)}.block .attention{--c:var(--attention,#c2580c)}
.block .mlp{--c:var(--mlp,#7450b4)}
.block .box{fill:var(--surface,#fff);stroke:var(--c);stroke-width:1.3}
.block .lane{fill:var(--c);opacity:.09}.block .head{fill:var(--c);font-weight:650;font-size:13px}
.block path{fill:none;stroke:var(--muted,#5c626c);stroke-width:1.4}
.block .tip{fill:var(--muted,#5c626c);stroke:none}
.block .plus{fill:var(--surface,#fff);stroke:var(--muted,#5c626c);stroke-width:1.4}
.block a:hover .box,.block a:focus .box{stroke-width:3}
"""


def multipliers_of(box: Box, config, layer: int = 0) -> dict[str, float]:
    """The multipliers of a box with their values. The embedding's acts before layer 0 alone."""
    keys = box.multipliers if box.tap != "residual.in" or layer == 0 else ()
    return {key: config_value(config, key) for key in keys}


def block_svg(
    walk: Mapping[str, Mapping[str, Any]],
    config,
    *,
    width: int = 760,
    title: str = "",
    links: bool = False,
    paper: bool = False,
) -> str:
    """The drawing of one block, `width` pixels wide, at least 340.

    walk: of each tap of BOXES its "axes" and "shape", as in `Dissection.walk` without the layer.
    title: is drawn above. links: every box leads to "#step-TAP". paper: with a background of its
    own, so that the file can be seen on white and on black.
    """
    return _Drawing(walk, config, width, links).draw(title, paper)


class _Drawing:
    """Parts are appended from the top down; self.y is where the next one begins."""

    def __init__(self, walk, config, width, links):
        self.walk, self.config, self.width, self.links = walk, config, width, links
        self.middle, self.y, self.parts = width / 2, 8.0, []
        self.boxes: dict[str, tuple[float, float, float, float]] = {}  # left, top, right, bottom

    def draw(self, title: str, paper: bool) -> str:
        if title:
            self._text(self.middle, self.y + 14, title, "title", "middle")
            self.y += LINE + 10
        (start, norm), (mid,), (end,) = self._of("")[:2], self._of("")[2:3], self._of("")[3:]
        half = min(150.0, self.middle - 60)
        for box in (start, norm):
            self._box(box, self.middle - half, self.middle + half)
            self.y += STEP
        self._arrow([self._below(start.tap), self._above(norm.tap)])
        self._branches(norm)
        plus = self._plus(self.y + 8)
        for lane, side in (("ssm", -10), ("attention", 10)):
            x, y = self._below(self._of(lane)[-1].tap)
            self._arrow([(x, y), (x, plus), (self.middle + side, plus)])
        both = self._plus(self.y + STEP)
        self._arrow([(self.middle, plus + 9), (self.middle, both - 9)])
        self._skip(start.tap, both)
        self.y += STEP
        self._box(mid, self.middle - half, self.middle + half)
        self._arrow([(self.middle, both + 9), self._above(mid.tap)])
        self.y += STEP
        self._mlp(mid, half)
        total = self._plus(self.y + 8)
        self._arrow([self._below(self._of("mlp")[-1].tap), (self.middle, total - 9)])
        self._skip(mid.tap, total)
        self.y += STEP
        self._box(end, self.middle - half, self.middle + half)
        self._arrow([(self.middle, total + 9), self._above(end.tap)])
        self._legend()
        return self._whole(title, paper)

    def _branches(self, norm: Box) -> None:
        """Both branches side by side, below the norm that feeds them."""
        top = self.y + STEP
        self._text(self.middle + 8, self.y + 1, "feeds both branches", "soft")
        size = (self.width - EDGE - 14) / 2
        bottoms = []
        for lane, left in (("ssm", float(EDGE)), ("attention", EDGE + size + 8)):
            self.y = top
            place = len(self.parts)
            self.y += 5
            lines = [("head", part) for part in self._fit(LANES[lane], size - 2 * PAD, "head")]
            shared = self._shared(lane, norm)
            for key in shared:
                times = self._times(key, self.config)
                lines += [("times", t) for t in self._fit(times, size - 2 * PAD, "times")]
            for kind, text in lines:
                self.y += LINE
                self._text(left + size / 2, self.y - 2, text, f"{lane} {kind}", "middle")
            self.y += STEP
            for box in self._of(lane):
                self._box(box, left + GUTTER, left + size - GUTTER, shared)
                self.y += STEP
            self._edges(lane, left, size, norm)
            bottoms.append(self.y)
            self.parts.insert(place, (lane, left, top, size))
        self.y = max(bottoms) + 4
        self.parts = [
            f'<rect class="lane {p[0]}" x="{p[1]:.1f}" y="{p[2]:.1f}" width="{p[3]:.1f}" '
            f'height="{self.y - p[2] - STEP / 2:.1f}" rx="10"/>'
            if isinstance(p, tuple)
            else p
            for p in self.parts
        ]
        for lane in LANES:
            x = self._above(self._of(lane)[0].tap)[0]
            y = self._below(norm.tap)[1]
            turn = y + (top - y) * 0.62
            self._arrow([(self.middle, y), (self.middle, turn), (x, turn), (x, top)])

    def _shared(self, lane: str, norm: Box) -> tuple[str, ...]:
        """Multipliers of the lane's input, which all boxes behind the norm get."""
        paths = [path.split() for box in self._of(lane) for path in box.paths]
        (name,) = {path[1] for path in paths if path[0] == norm.tap}
        return tap_of(name).multipliers

    def _edges(self, lane: str, left: float, size: float, norm: Box) -> None:
        """Straight to the next box; further ones along the sides, what the first made at left."""
        boxes = self._of(lane)
        order = [box.tap for box in boxes]
        for number, box in enumerate(boxes):
            for source in (path.split()[0] for path in box.paths):
                x, y = self._above(box.tap)
                if source == norm.tap:
                    inlet = (left + size / 2, self.boxes[order[0]][1] - STEP + 7)
                    if number == 0:
                        self._arrow([inlet, (x, y)])
                    else:
                        self._side(inlet, left + 4, box.tap, "left")
                elif order.index(source) == number - 1:
                    self._arrow([self._below(source), (x, y)])
                else:
                    first = source == order[0] and lane == "ssm"
                    x = left + 4 if first else left + size - 4
                    _, low, _, high = self.boxes[source]
                    start = self.boxes[source][0 if first else 2], (low + high) / 2
                    self._side(start, x, box.tap, "left" if first else "right")

    def _side(self, start, x: float, tap: str, side: str) -> None:
        """Along the track at x into the side of a box, a little below its top."""
        left, top, right, _ = self.boxes[tap]
        end = (left if side == "left" else right, top + 14)
        self._arrow([start, (x, start[1]), (x, end[1]), end])

    def _mlp(self, mid: Box, half: float) -> None:
        before = mid.tap
        for box in self._of("mlp"):
            self._box(box, self.middle - half, self.middle + half)
            self._arrow([self._below(before), self._above(box.tap)])
            before = box.tap
            self.y += STEP

    def _skip(self, tap: str, y: float) -> None:
        left, top, _, bottom = self.boxes[tap]
        start = (left, (top + bottom) / 2)
        self._arrow([start, (EDGE / 2, start[1]), (EDGE / 2, y), (self.middle - 10, y)])

    def _of(self, lane: str) -> list[Box]:
        return [box for box in BOXES if box.lane == lane]

    def _above(self, tap: str) -> tuple[float, float]:
        left, top, right, _ = self.boxes[tap]
        return (left + right) / 2, top

    def _below(self, tap: str) -> tuple[float, float]:
        left, _, right, bottom = self.boxes[tap]
        return (left + right) / 2, bottom

    def _times(self, key: str, config) -> str:
        return f"× {key} {config_value(config, key):.3g}"

    def _fit(self, text: str, room: float, kind: str) -> list[str]:
        """A label in lines no wider than `room`, broken behind "_", "." and " "."""
        most, lines = max(1, int(room / _LETTER[kind])), [""]
        for piece in re.split(r"(?<=[_ ])|(?<=\.)(?=[a-z])", text):
            if lines[-1] and len((lines[-1] + piece).rstrip()) > most:
                lines.append("")
            lines[-1] += piece
        return lines

    def _box(self, box: Box, left: float, right: float, shared: tuple[str, ...] = ()) -> None:
        entry, room = self.walk[box.tap], right - left - 2 * PAD
        beside = len(box.title) * _LETTER["title"] + len(box.tap) * _LETTER["tap"] + 10 <= room
        lines = [("title", box.title)] + [("tap", box.tap)] * (not beside)
        lines.append(("soft", _axes_text(entry)))
        for key in box.multipliers:
            if key not in shared:
                note = " in layer 0" * (box.tap == "residual.in")
                lines.append(("times", self._times(key, self.config) + note))
        lines = [(kind, part) for kind, text in lines for part in self._fit(text, room, kind)]
        rows, place = [], self.y + 4
        for kind, text in lines:
            place += LINE
            rows.append((left + PAD, place - 3, text, kind))
        if beside:
            rows.insert(1, (right - PAD, rows[0][1], box.tap, "tap", "end"))
        bottom = place + 5
        sizes = ", ".join(f"{n} {AXES[a]}" for a, n in zip(entry["axes"], entry["shape"]))
        label = f"{box.title}, {box.tap}: {sizes}"
        tag = f'a href="#step-{box.tap}" aria-label="{escape(label)}"' if self.links else "g"
        self.parts.append(f'<{tag} class="{box.lane}" data-tap="{box.tap}">')
        self.parts.append(f"<title>{escape(label)}</title>")
        self.parts.append(
            f'<rect class="box" x="{left:.1f}" y="{self.y:.1f}" width="{right - left:.1f}" '
            f'height="{bottom - self.y:.1f}" rx="7"/>'
        )
        for row in rows:
            self._text(*row)
        self.parts.append(f"</{tag.split()[0]}>")
        self.boxes[box.tap] = (left, self.y, right, bottom)
        self.y = bottom

    def _plus(self, y: float) -> float:
        """A sum at the middle; the place of its centre."""
        x = self.middle
        self.parts.append(f'<circle class="plus" cx="{x:.1f}" cy="{y:.1f}" r="9"/>')
        self.parts.append(f'<path d="M{x - 5:.1f} {y:.1f}h10M{x:.1f} {y - 5:.1f}v10"/>')
        self.y = y + 9
        return y

    def _arrow(self, points: list[tuple[float, float]]) -> None:
        (x0, y0), (x, y) = points[-2:]
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
        tip = f"{x:.1f},{y:.1f} {x - 6 * dx - 3.5 * dy:.1f},{y - 6 * dy - 3.5 * dx:.1f} "
        tip += f"{x - 6 * dx + 3.5 * dy:.1f},{y - 6 * dy + 3.5 * dx:.1f}"
        self.parts.append(f'<path d="M{line}"/><polygon class="tip" points="{tip}"/>')

    def _text(self, x, y, text, kind, anchor="start") -> None:
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">'
            f"{escape(text.strip())}</text>"
        )

    def _legend(self) -> None:
        self.y += STEP + 4
        used = dict.fromkeys(a for box in BOXES for a in self.walk[box.tap]["axes"] if a != "b")
        for line in _wrapped(
            [f"{a} {AXES[a]}" for a in used], int((self.width - 24) / _LETTER["soft"])
        ):
            self._text(12, self.y, line, "soft")
            self.y += LINE

    def _whole(self, title: str, paper: bool) -> str:
        label = escape(title or "The hybrid block: boxes are tensors, arrows lead to the next")
        role = "group" if self.links else "img"
        back = f'<rect class="paper" width="{self.width}" height="{self.y:.0f}" rx="12"/>' * paper
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="block" role="{role}" '
            f'aria-label="{label}" viewBox="0 0 {self.width} {self.y:.0f}" width="{self.width}" '
            f'height="{self.y:.0f}"><style>{_STYLE}</style>{back}{"".join(self.parts)}</svg>\n'
        )


def _axes_text(entry: Mapping[str, Any]) -> str:
    """ "l × h 6 × p 32": tokens by their letter alone, since their number is the prompt's."""
    parts = zip(entry["axes"], entry["shape"])
    return " × ".join(a if a in "ls" else f"{a} {n}" for a, n in parts if a != "b")


def _wrapped(words: list[str], room: int) -> Iterator[str]:
    """Lines of at most `room` letters, words separated by dots."""
    line = ""
    for word in words:
        if line and len(line) + len(word) + 3 > room:
            yield line
            line = ""
        line += f" · {word}" if line else word
    yield line
