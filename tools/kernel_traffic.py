"""Counts what the kernels move and multiply, in Triton's interpreter, beside what they must.

python tools/kernel_traffic.py [KERNEL ...]

prints JSON: one record per call, with one entry per launch. The calls have the models' true head
sizes, widths and strides, and few rows, heads and positions. The minimum is the formula of the
benchmark registry: every distinct element once. bfloat16, default configurations.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path[:0] = [str(Path(__file__).resolve().parent.parent / "tests" / "kernels")]

import interpret  # noqa: E402
import torch  # noqa: E402
from kernel_launches import CASES, OPERATORS, Draw  # noqa: E402

from falcon_h1r.config import FalconH1Config  # noqa: E402

# Rows, new tokens and past of the reduced call.
PLACES = {
    "rms_norm": (1, 64, 0),
    "gated_rms_norm": (1, 64, 0),
    "rope": (1, 64, 0),
    "swiglu": (1, 16, 0),
    "causal_conv1d": (1, 256, 0),
    "causal_conv1d_step": (4, 1, 255),
    "ssd_staged": (1, 512, 0),
    "ssd_fused": (1, 512, 0),
    "ssd_step": (4, 1, 255),
    "conv_ssd_step": (4, 1, 255),
    "logprob": (2, 1, 255),
    "attention": (1, 512, 0),
    "decode_attention": (4, 1, 1023),
}
# Programs of one head are like those of another: two SSM heads and one key head stand for all.
FEW_HEADS = (
    "ssd_staged",
    "ssd_fused",
    "ssd_step",
    "conv_ssd_step",
    "attention",
    "decode_attention",
)
HEADS = {"mamba_n_heads": 2, "num_attention_heads": 6, "num_key_value_heads": 1}


def measure(case) -> dict:
    """One call of `case` at its reduced place."""
    config = FalconH1Config.preset(case.model)
    if case.name in FEW_HEADS:
        config = dataclasses.replace(config, **HEADS, mamba_d_ssm=2 * config.mamba_head_dim)
    size = case.size(torch.bfloat16, config, PLACES[case.name])
    with interpret.counted() as launches:
        case.call(case.inputs(size, Draw(0, "cpu")), "")
    minimum = OPERATORS[case.operator].cost(size)
    b, l, past = PLACES[case.name]
    return {
        "case": case.name,
        "call": f"{case.operator} {b}x{l}" + f"@{past}" * (past > 0),
        "minimum": {"load": minimum.read, "store": minimum.written, "flops": minimum.flops},
        "launches": [launch._asdict() for launch in launches],
    }


def main() -> None:
    interpret.install()
    seen, records, failed = set(), [], False
    for case in CASES:
        if case.name in seen or (sys.argv[1:] and case.name not in sys.argv[1:]):
            continue
        seen.add(case.name)
        try:
            records.append(measure(case))
        except Exception as error:  # a call that fails is a finding
            print(f"{case.name}: {type(error).__name__}: {error}", file=sys.stderr)
            failed = True
    json.dump(records, sys.stdout)
    sys.exit(failed)


if __name__ == "__main__":
    main()
