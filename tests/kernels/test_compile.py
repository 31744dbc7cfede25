"""Ahead-of-time compilation of the kernels, in processes of its own: this one interprets them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "tools" / "kernel_report.py"

# The judged rows of some families, as JSON on the last line.
JUDGE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import kernel_collect, kernel_rules
if __name__ == "__main__":
    rows = list(kernel_collect.collect(sys.argv[2:], ["90"], dtype="bfloat16", defaults=["90"]))
    print(json.dumps([sorted({row["kernel"] for row in rows}), kernel_rules.verdict(rows)]))
"""


def run(*command, expected=0):
    """Standard output of a Python process that compiles, not interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == expected, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_default_configurations_obey_the_rules_on_sm_90():
    names = ("rms_norm", "ssd_fused", "attention")
    kernels, broken = json.loads(run("-c", JUDGE, REPORT.parent, *names).splitlines()[-1])
    assert {"_rms_norm_kernel", "_attention_kernel"} < set(kernels)
    assert not broken, "\n".join(broken)


def test_planted_faults_break_each_rule():
    planted = Path(__file__).with_name("planted.py")
    common = ("--cases", planted, "--kernel", "planted", "--targets", "90", "--dtype", "bfloat16")
    found, name = {}, ""
    for line in run(REPORT, *common).splitlines():
        if line.startswith("planted "):
            name = line.partition(" bfloat16 ")[2].split()[0]
            found[name] = set()
        elif line.startswith("  BREAKS "):
            found[name].add(line.split()[1].rstrip(":"))
    rules = ("spills", "mma", "fits", "loads")
    assert found == {"sound": set()} | {rule: {rule} for rule in rules}


def test_refusals():
    for extra in (["--targets", "91"], ["--kernel", "rms_nrom"]):
        run(REPORT, *extra, expected=2)


@pytest.mark.slow
def test_the_committed_report_is_what_the_compiler_makes():
    # Of the other targets the default configurations, which the rules are about, to save minutes.
    run(REPORT, "--check", "--defaults", "80,100,gfx942")
