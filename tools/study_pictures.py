"""Make the pictures of docs/study.md and docs/parity.md.

    python tools/study_pictures.py [--out tools/pictures]

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

from falcon_h1r.cli import main  # noqa: E402

PROMPT = "What is 47+25-8?"
WIDTH = 1000


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
            tab.open(page, WIDTH, height=900)
            tab.run("document.querySelector('#cap-att').scrollIntoView({behavior: 'instant'})")
            tab.run("window.scrollBy({top: 40, behavior: 'instant'})")  # below the fixed strip
            time.sleep(0.5)
            tab.picture(out, whole=False)


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "tools" / "pictures")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    parity(args.out / "parity.png")
    dissect(args.out / "dissect.png")


if __name__ == "__main__":
    run()
