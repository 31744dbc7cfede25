"""Make the pictures of README.md, docs/study.md and docs/parity.md.

    python tools/study_pictures.py [--out tools/pictures] [--only block parity dissect]

block.svg: the drawing of the hybrid block that the dissect page has, for h1r-pico.
parity.png: the heat map of `falcon-h1r parity` on h1r-pico, beside the installed transformers.
dissect.png: the attention figures of `falcon-h1r dissect`, as Chromium shows them (Debian's
`chromium` and the extra `test`).
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]

import browser  # noqa: E402

from falcon_h1r import FalconH1ForCausalLM  # noqa: E402
from falcon_h1r.cli import main  # noqa: E402
from falcon_h1r.study import dissect as dissection  # noqa: E402
from falcon_h1r.study.block_picture import BOXES, block_svg  # noqa: E402
from falcon_h1r.study.page import WIDE  # noqa: E402

PROMPT = "What is 47+25-8?"
SIZE = 1000, 720  # down to the legends of the two maps


def block(out: Path) -> None:

    model = FalconH1ForCausalLM.from_pretrained("h1r-pico")
    found = dissection.dissect(model, [1, 2, 3], branch_switches=False)
    walk = {box.tap: found.walk[f"layers.0.{box.tap}"] for box in BOXES}
    title = "One hybrid block of h1r-pico"
    drawn = block_svg(walk, found.config, width=WIDE, title=title, paper=True)
    out.write_text(drawn, encoding="utf-8")


def parity(out: Path) -> None:
    if main(["parity", "--dtype", "bfloat16", "--paths", "prefill", "padded", "--out", str(out)]):
        raise SystemExit("parity did not end well")


def dissect(out: Path) -> None:
    """The section of both attention matrices."""
    if reason := browser.missing():
        raise SystemExit(reason)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        if main(["dissect", PROMPT, "--out", str(page)]):
            raise SystemExit("dissect did not end well")
        with browser.browser() as tab:
            tab.open(page, *SIZE)
            tab.run("document.querySelector('#cap-att').scrollIntoView({behavior: 'instant'})")
            tab.run("window.scrollBy({top: 40, behavior: 'instant'})")  # below the fixed strip
            time.sleep(0.5)
            tab.picture(out, whole=False)


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "tools" / "pictures")
    pictures = {"block.svg": block, "parity.png": parity, "dissect.png": dissect}
    names = [name.partition(".")[0] for name in pictures]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, make in pictures.items():
        if name.partition(".")[0] in args.only:
            make(args.out / name)


if __name__ == "__main__":
    run()
