"""The page of a dissection: what is in the file, and, in a real browser, what it does."""

import base64
import json
import re

import browser
import numpy
import pytest
import torch
from models import load, make_config, make_model, random_ids
from tiny_cli import run, write_checkpoint

from falcon_h1r.commands.common import locate
from falcon_h1r.study.dissect import dissect
from falcon_h1r.study.page import MOST_TOKENS, QUANTILES, page, write_page
from falcon_h1r.text import load_tokenizer

PICO = locate("h1r-pico")


class Letters:
    """A tokenizer whose tokens try to leave the script element."""

    def decode(self, ids, skip_special_tokens=False):
        return "</script><b>" if ids[0] % 3 == 0 else f"\n{ids[0]}"


def data_of(html: str) -> dict:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    return json.loads(text)


def unpacked(packed: dict) -> torch.Tensor:
    values = torch.from_numpy(numpy.frombuffer(base64.b64decode(packed["f32"]), "<f4").copy())
    if not packed["lower"]:
        return values.view(packed["shape"])
    full = torch.zeros(packed["shape"])
    row, column = torch.tril_indices(*packed["shape"][-2:])
    full[..., row, column] = values.view(*packed["shape"][:2], -1)
    return full


def test_the_file_holds_the_tensors():
    model = make_model(make_config(), dtype=torch.float64)
    out = dissect(model, random_ids(model.config, 9).tolist())
    html = page(out, Letters(), model="</script>", prompt_tokens=5, title="<i>&</script>")
    data = data_of(html)
    assert data["title"] == "<i>&</script>" and data["promptTokens"] == 5
    assert html.count("</script>") == 3 and "</script><b>" in data["text"].values()
    assert set(data["text"]) >= {str(i) for i in data["ids"]} and data["ids"] == out.ids
    shown = {name: unpacked(packed) for name, packed in data["tensors"].items()}
    assert set(out.tensors) - set(shown) == {"conv.taps"}
    for name, tensor in out.tensors.items():
        if name != "conv.taps":
            assert torch.equal(shown[name], tensor.float()), name
    taps = out.tensors["conv.taps"].float().split([64, 48, 48], dim=1)
    for segment, part in enumerate(taps):
        for place, share in enumerate(QUANTILES):
            found = shown["conv.quantiles"][:, place, segment]
            assert torch.allclose(found, part.quantile(share, dim=1))
    for number, taps in enumerate(data["walk"]):
        for name, entry in taps.items():
            kept = out.walk[f"layers.{number}.{name}"]
            assert entry["shape"] == kept["shape"] and entry["rms"] == kept["rms"]
            assert torch.equal(unpacked(entry["token_values"]), kept["token_values"])
            assert unpacked(entry["token_rms"]).shape == (9,)
    acting = {
        key: v
        for taps in data["walk"]
        for e in taps.values()
        for key, v in e["multipliers"].items()
    }
    assert acting["ssm_multipliers[2]"] == 0.55 and acting["ssm_out_multiplier"] == 0.45
    assert len(acting) == 4 + 3 + 5 + 1  # every multiplier but lm_head's


def test_the_file_needs_nothing_else():
    model = make_model(make_config())
    html = page(dissect(model, [1, 2, 3]), Letters(), model="m", prompt_tokens=3, title="t")
    for mark in ("/* style */", "/* script */", "/* data */", "src=", "@import", "url(", "fetch("):
        assert mark not in html, mark
    assert set(re.findall(r'href="([^"#]*)', html)) == {"data:,", ""}
    assert set(re.findall(r"https?://[^\s\"']+", html)) == {"http://www.w3.org/2000/svg"}


def test_64_tokens_of_pico_stay_below_5_megabytes():
    tokenizer = load_tokenizer(PICO)
    ids = (tokenizer.encode("What is 47+25-8? ") * 9)[:64]
    out = dissect(load(PICO, dtype=torch.float32), ids)
    html = page(out, tokenizer, model="h1r-pico", prompt_tokens=64, title="x")
    assert len(ids) == 64 and len(html.encode()) < 5e6


def test_too_many_tokens_are_refused():
    model = make_model(make_config(num_hidden_layers=1))
    out = dissect(model, [1] * (MOST_TOKENS + 1), branch_switches=False)
    with pytest.raises(ValueError, match="257 tokens, the page shows at most 256"):
        page(out, Letters(), model="m", prompt_tokens=3, title="t")


def test_nothing_half_written_is_left(tmp_path):
    path = tmp_path / "page.html"
    write_page(path, "first")
    with pytest.raises(UnicodeEncodeError):
        write_page(path, "\ud800")
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("page") / "tiny")


def test_the_command_writes_the_page(capsys, checkpoint, tmp_path):
    path = tmp_path / "page.html"
    argv = ["dissect", "hello", "--model", checkpoint, "--out", path, "--max-new-tokens", "6"]
    status, out, err = run(capsys, *argv)
    data = data_of(path.read_text(encoding="utf-8"))
    assert status == 0 and out == ""
    assert err.endswith(f"]\n{path}: {path.stat().st_size / 1e6:.1f} MB\n")
    assert data["title"] == "hello" and len(data["ids"]) == data["promptTokens"] + 6
    tokenizer = load_tokenizer(checkpoint)
    prompt = tokenizer.encode_chat([{"role": "user", "content": "hello"}])
    assert data["ids"][: data["promptTokens"]] == prompt
    # The answer is the model's likeliest: each new token was the one explained before it.
    target = unpacked(data["tensors"]["attribution.token"]).long().tolist()
    assert target[len(prompt) - 1 : -1] == data["ids"][len(prompt) :]


def test_the_command_prints_the_document(capsys, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["dissect", "hello 12", "--model", checkpoint, "--json", "--max-new-tokens", "0"]
    status, out, _ = run(capsys, *argv, "--no-switches", "--raw", "--dtype", "float64")
    document = json.loads(out)
    assert status == 0 and not list(tmp_path.iterdir())
    assert document["prompt"] == "hello 12" and document["prompt_tokens"] == len(document["ids"])
    assert document["dtype"] == "float64" and "switch.loss" not in document["measures"]
    found = torch.tensor(document["measures"]["hidden_attention"]["values"], dtype=torch.float64)
    expected = dissect(load(checkpoint, dtype=torch.float64), document["ids"]).tensors
    assert torch.equal(found, expected["hidden_attention"])
    tokenizer = load_tokenizer(checkpoint)
    assert document["tokens"] == [tokenizer.decode([i]) for i in document["ids"]]


# --- in a browser --------------------------------------------------------------------------------

FIGURES = "block walk size attr att ssm row time dist conv norm rank lens top kl switch".split()
# Every canvas must show more than one colour, every drawing have marks.
EMPTY = """
[...document.querySelectorAll('main .figure, #fig-att, #fig-ssm')].flatMap((node) => {
  const box = node.getBoundingClientRect(), problems = [];
  const add = (what) => problems.push(`${node.id || node.className}: ${what}`);
  if (box.width < 100 || box.height < 20) add(`${box.width} x ${box.height}`);
  for (const canvas of node.querySelectorAll('canvas')) {
    const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
    const pixels = new Uint32Array(data.buffer), filled = pixels.filter((p) => p >>> 24 === 255);
    if (new Set(pixels).size < 5 || filled.length < 0.1 * pixels.length) add('empty canvas');
  }
  for (const svg of node.querySelectorAll('svg')) {
    if (svg.querySelectorAll('rect, line, polyline').length < 3) add('empty drawing');
  }
  return problems;
})
"""
# innerWidth will not do: a phone zooms out until what sticks out fits.
# No text of a drawing leaves the drawing or its box, and no label on a canvas touches its edge.
CLIPPED = """
(() => {
  const problems = [], seen = (n) => n.getBoundingClientRect().width > 0;
  for (const svg of [...document.querySelectorAll('main svg')].filter(seen)) {
    for (const text of svg.querySelectorAll('text')) {
      const frame = text.parentNode.querySelector(':scope > rect.box') || svg;
      const room = frame.getBoundingClientRect(), box = text.getBoundingClientRect();
      const out = box.left < room.left - 1 || box.right > room.right + 1;
      if (out || box.bottom > room.bottom + 3 || box.top < room.top - 3)
        problems.push(`${svg.getAttribute('aria-label')}: ${text.textContent}`);
    }
  }
  for (const canvas of document.querySelectorAll('canvas[tabindex="0"]')) {
    const context = canvas.getContext('2d'), { width, height } = canvas;
    const left = context.getImageData(0, 0, 2, height).data;
    const below = context.getImageData(0, height - 1, width, 1).data;
    if ([left, below].some((edge) => edge.some((v, i) => i % 4 === 3 && v)))
      problems.push(canvas.getAttribute('aria-label'));
  }
  return problems;
})()
"""
# Texts below 11 pixels, and what is to be touched below 24.
SMALL = """
(() => {
  const cut = (nodes) => nodes.map((n) => n.outerHTML.slice(0, 80));
  const all = (selector) => [...document.querySelectorAll(selector)]
    .filter((n) => n.getBoundingClientRect().width);
  const texts = all('main text, main span, main p, main td, main th');
  const size = (n) => parseFloat(getComputedStyle(n).fontSize);
  return cut(texts.filter((n) => n.textContent.trim() && size(n) < 11))
    .concat(cut(all('button, input, .tok, .block a').filter((n) => {
      const box = n.getBoundingClientRect();
      return box.width < 24 || box.height < 24;
    })));
})()
"""
TITLES = """
Object.fromEntries(['attr', 'row', 'dist', 'conv', 'norm', 'rank', 'kl', 'switch'].map((name) => [
  name, [...document.querySelectorAll(`#fig-${name} text.axis`)].map((n) => n.textContent),
]))
"""
LAYOUT = """((width) => ({
  wide: document.documentElement.scrollWidth > width,
  outside: [...document.querySelectorAll('main *, header *')].filter((n) => {
    const box = n.getBoundingClientRect();
    const out = box.right > width + 1 || box.left < -1;
    return box.width && out && !n.closest('.scroll, #strip, svg');
  }).map((n) => n.outerHTML.slice(0, 80)),
}))"""
TOKEN = "document.querySelector('.tok[aria-selected=true]').dataset.token"
LAYER = "document.getElementById('layer').value"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    if reason := browser.missing():
        pytest.skip(reason)
    path = tmp_path_factory.mktemp("browser") / "page.html"
    from falcon_h1r.cli import main

    assert main(["dissect", "What is 47+25-8?", "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def tab(written):
    with browser.browser() as opened:
        yield opened


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_every_figure_is_drawn_and_nothing_sticks_out(tab, written, width, dark):
    tab.open(written, width, dark=dark)
    assert tab.run(EMPTY) == []
    assert tab.run(f"{LAYOUT}({width})") == {"wide": False, "outside": []}
    assert tab.run(CLIPPED) == [] and tab.run(SMALL) == []
    found = tab.run(f"{json.dumps(FIGURES)}.filter((n) => !document.getElementById('fig-' + n))")
    assert found == []
    background = tab.run("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", background)[:3]))
    assert (brightness < 200) == dark
    assert tab.problems == []
    assert all(url.startswith(("file:", "data:", "about:")) for url in tab.requests)


@pytest.mark.slow
def test_axes_are_titled_and_tokens_are_named_whole(tab, written):
    tab.open(written, 390)
    titles = tab.run(TITLES)
    assert titles == {
        "attr": ["part of the logit, in logits"],
        "row": [titles["row"][0], titles["row"][1], "token that is read"],
        "dist": ["half-life, in tokens (logarithmic)"],
        "conv": ["weight", "place before the token, in tokens; by segment"],
        "norm": ["Frobenius norm of the state", "after which token"],
        "rank": ["effective rank of the state, in directions", "after which token"],
        "kl": ["KL divergence, in nats", "after which layer"],
        "switch": ["change of the mean loss, in nats per token"],
    }
    tokens = tab.run("range(T).map(word)")
    assert "<|im_start|>" in tokens and "\\boxed{" in tokens
    assert tab.run("[...document.querySelectorAll('#fig-lens thead th')].slice(1)"
                   ".map((n) => n.textContent)") == tokens  # fmt: skip
    tab.run("set({ token: T - 1, read: 0 })")
    assert tab.run("document.querySelector('#fig-row .token.strong').textContent") == tokens[0]
    assert tab.run(CLIPPED) == []


@pytest.mark.slow
def test_the_drawing_leads_to_the_numbers(tab, written):
    tab.open(written, 390)
    tab.run("document.documentElement.style.scrollBehavior = 'auto'")
    assert tab.run("document.querySelector('#fig-block .wide').offsetParent") is None
    tab.run("document.querySelector('#fig-block .narrow a[data-tap=\"mamba.scan.y\"]').focus()")
    tab.press("Enter")
    top = tab.run("document.getElementById('step-mamba.scan.y').getBoundingClientRect().top")
    assert 0 < top < 600 and tab.problems == []
    steps = tab.run("[...document.querySelectorAll('.step')].map((n) => n.id)")
    taps = [box["tap"] for box in data_of(written.read_text())["boxes"]]
    assert sorted(steps) == sorted(f"step-{tap}" for tap in taps)


@pytest.mark.slow
def test_the_keyboard_moves_everything(tab, written):
    tab.open(written, 1280)
    token, layer = int(tab.run(TOKEN)), int(tab.run(LAYER))
    tab.run("document.getElementById('strip').focus()")
    before = tab.run("document.getElementById('fig-attr').innerHTML")
    tab.press("ArrowLeft")
    tab.press("ArrowUp")
    assert (int(tab.run(TOKEN)), int(tab.run(LAYER))) == (token - 1, layer - 1)
    assert tab.run("document.getElementById('fig-attr').innerHTML") != before
    tab.press("Home")
    assert tab.run(TOKEN) == "0"
    tab.press("ArrowLeft")  # stays at the border
    assert tab.run(TOKEN) == "0" and tab.problems == []
    tab.run("set({ span: 'one' })")
    tab.press("End")
    assert tab.run("S.span") == "all"
    last = int(tab.run("DATA.ids.length")) - 1
    assert int(tab.run(TOKEN)) == last
    # The token after the last has no loss; the choice of one token is gone, the figure is not.
    assert tab.run("document.querySelectorAll('#fig-switch rect').length") > 10
    for figure in ("fig-size", "fig-att", "fig-ssm", "fig-time"):
        tab.run(f"document.querySelector('#{figure} canvas').focus()")
        tab.run("set({ token: 20, read: 10, layer: 1, head: 2 })")
        for key, change in {
            "ArrowRight": {"fig-size": "token", "fig-time": "token"}.get(figure, "read"),
            "ArrowUp": {"fig-size": "layer", "fig-time": "head"}.get(figure, "token"),
        }.items():
            was = tab.run(f"S.{change}")
            tab.press(key)
            assert tab.run(f"S.{change}") == was + (1 if key == "ArrowRight" else -1), (figure, key)
            # The figure was drawn anew and still has the focus.
            assert tab.run(f"document.querySelector('#{figure} canvas') === document.activeElement")
    tab.run("document.querySelector('#size-choice [aria-checked=true]').focus()")
    tab.press("ArrowRight")
    assert tab.run("S.size") == "norm"
    assert tab.run("document.activeElement.textContent") == "Length"
    tab.run("document.querySelector('#thumbs-ssm [aria-checked=true]').focus()")
    head = tab.run("S.head")
    tab.press("ArrowRight")
    assert tab.run("S.head") == head + 1
    assert tab.run("document.activeElement.getAttribute('aria-checked')") == "true"
    tab.run("document.getElementById('fig-lens').focus()")
    tab.run("set({ token: 20, layer: 1 })")
    tab.press("ArrowDown")
    tab.press("ArrowRight")
    assert (tab.run("S.layer"), tab.run("S.token")) == (2, 21)
    assert tab.problems == []


@pytest.mark.slow
def test_every_control_is_named_and_shows_its_focus(tab, written):
    tab.open(written, 1280)
    nameless = tab.run(
        "[...document.querySelectorAll('button, input, canvas[tabindex], [role=listbox], svg')]"
        ".filter((n) => !n.getAttribute('aria-label') && !n.textContent.trim())"
        ".filter((n) => !n.labels?.length)"
        ".map((n) => n.outerHTML.slice(0, 80))"
    )
    assert nameless == []
    reached, plain = [], []
    for _ in range(45):
        tab.press("Tab")
        place = tab.run("(document.activeElement.id || document.activeElement.className)")
        style = tab.run("getComputedStyle(document.activeElement).outlineStyle")
        reached.append(place or tab.run("document.activeElement.getAttribute('aria-label')"))
        if style == "none" and tab.run("document.activeElement !== document.body"):
            plain.append(reached[-1])
    assert plain == [] and {"theme", "strip", "layer", "fig-lens figure scroll"} & set(reached)
    assert len(set(reached)) >= 10, reached


@pytest.mark.slow
def test_the_mouse_picks_and_explains(tab, written):
    tab.open(written, 1280)

    def centre(selector: str, x: float = 0.5, y: float = 0.5):
        tab.run(f"document.querySelector('{selector}').scrollIntoView({{block: 'center'}})")
        box = tab.run(
            f"(({{left, top, width, height}}) => [left, top, width, height])"
            f"(document.querySelector('{selector}').getBoundingClientRect())"
        )
        return box[0] + x * box[2], box[1] + y * box[3]

    tab.run("document.documentElement.style.scrollBehavior = 'auto'")
    tab.mouse(*centre(".tok:nth-child(20)"), click=True)
    assert tab.run(TOKEN) == "19"
    tab.mouse(*centre("#fig-att canvas", 0.3, 0.8), click=True)
    place = tab.run("[S.token, S.read]")
    assert place != [19, 19] and place[1] < place[0]
    tab.mouse(*centre("#fig-att canvas", 0.3, 0.8))
    text = tab.run("tip.hidden ? '' : tip.textContent")
    value = tab.run("exact(X.attention.at(S.layer, S.query, S.token, S.read))")
    assert "reads" in text and f"weight {value}" in text
    tab.mouse(*centre("#fig-time canvas", 0.5, 0.05), click=True)
    assert tab.run("S.head") == 0
    assert "dt" in tab.run("document.getElementById('tip').textContent")
    tab.mouse(*centre("#thumbs-att button:nth-child(4)"), click=True)
    assert tab.run("S.query") == 3
    assert "head 3" in tab.run("document.getElementById('cap-att').textContent")
    tab.mouse(*centre("#fig-lens tbody tr:nth-child(2) td:nth-child(3)"), click=True)
    assert tab.run("[S.layer, S.token]") == [0, 1]
    tab.mouse(*centre("#time-choice button:nth-child(2)"), click=True)
    assert tab.run("S.time") == "dt"
    picture, seen = "document.querySelector('#fig-size canvas').toDataURL()", []
    for mode, dark in (("light", False), ("dark", True), ("auto", False)):
        seen.append(tab.run(picture))
        tab.mouse(*centre("#theme"), click=True)
        assert tab.run("document.getElementById('theme').textContent") == f"Theme: {mode}"
        assert (tab.run("document.documentElement.dataset.theme") == "dark") == dark
        assert tab.run(EMPTY) == []
    assert seen[0] == seen[1] != seen[2]  # before light, dark and auto
    assert tab.problems == []


@pytest.mark.slow
def test_what_is_drawn_is_what_was_measured(tab, written):
    """The page's own lookup of every tensor against the file's, and the bars of one figure."""
    tab.open(written, 1280)
    tensors = {name: unpacked(p) for name, p in data_of(written.read_text())["tensors"].items()}
    for name, tensor in tensors.items():
        place = [min(2, size - 1) for size in tensor.shape]
        if name in ("attention", "hidden_attention"):
            place[2:] = [9, 4]
        found = tab.run(f"X[{json.dumps(name)}].at({', '.join(map(str, place))})")
        assert found == pytest.approx(float(tensor[tuple(place)]), rel=1e-6), name
    tab.run("set({ token: 20, layer: 1 })")
    text = tab.run("[...document.querySelectorAll('#fig-attr text')].map((n) => n.textContent)")
    for branch in range(3):
        value = float(tensors["attribution.branches"][1, branch, 20])
        assert tab.run(f"short({value!r})") in text or abs(value) < 0.01
    assert tab.run("short(12345.6)") == "12,346" and tab.run("short(-0.01234)") == "−0.012"
    assert tab.run("short(1e-7)") == "1.0e−7" and tab.run("short(Infinity)") == "∞"


@pytest.mark.slow
def test_a_deep_model_is_drawn(tab, tmp_path):
    """44 layers, 24 and 12 heads, one token of answer, without switches."""
    sizes = {"num_hidden_layers": 44, "mamba_n_heads": 24, "mamba_d_ssm": 96, "mamba_d_head": 4}
    config = make_config(**sizes, num_attention_heads=12, head_dim=4)
    out = dissect(make_model(config), random_ids(config, 24).tolist(), branch_switches=False)
    write_page(tmp_path / "deep.html", page(out, Letters(), model="m", prompt_tokens=23, title="t"))
    for width in (375, 1280):
        tab.open(tmp_path / "deep.html", width)
        tab.run("set({ layer: 43, head: 23, query: 11, token: 23 })")
        assert [p for p in tab.run(EMPTY) if "fig-switch" not in p] == []
        assert tab.run(f"{LAYOUT}({width})") == {"wide": False, "outside": []}
        assert tab.run("document.getElementById('s-switch').hidden")
    assert tab.problems == []
