"""`falcon-h1r bench ops` from a checkout that is not installed.

    python benchmarks/bench_ops.py --quick
    python benchmarks/bench_ops.py --ops ssd_scan --model-shape family --plot roofline.png

`bench_ops.py --help` lists the options; `falcon-h1r bench layer` and `bench generate` measure more.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from falcon_h1r.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["bench", "ops", *sys.argv[1:]]))
