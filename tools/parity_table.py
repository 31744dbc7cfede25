"""Print the table of docs/parity.md: how far the logits are from the float64 forward.

    python tools/parity_table.py

Tiny random models, one row per variant of tests/models.py; needs the `test` extra. The numbers are
the ones that tests/test_parity.py judges.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import transformers  # noqa: E402
from measure import SEEDS, SHAPE, logit_distances  # noqa: E402
from models import VARIANTS  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    transformers.logging.set_verbosity_error()
    batch, length = SHAPE
    print(
        "Logits of tiny random models on a CPU, root mean square difference over root mean square: "
        f"TORCH operators against transformers {transformers.__version__} (sdpa) on torch "
        f"{torch.__version__}; {len(SEEDS)} seeds of {batch} rows of {length} tokens per cell.\n"
    )
    header = ["variant"]
    for name in DTYPES:
        header += [f"{name}: ours to float64", "transformers to float64", "ours to transformers"]
    print("| " + " | ".join(header) + " |")
    print("|---" + "|---:" * (len(header) - 1) + "|")
    for variant in VARIANTS:
        cells = [f"`{variant}`"]
        for dtype in DTYPES.values():
            cells += [f"{value:.2e}" for value in logit_distances(variant, dtype)]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
