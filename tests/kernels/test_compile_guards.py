"""Two lines of the kernels whose loss no number shows on a CPU: their traces in machine code."""

import json
import re

import pytest
from kernels.test_compile import REPORT, run

# The lines of machine code of one launch, as JSON on the last line.
SASS = """
import json, re, subprocess, sys, tempfile
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from kernel_compile import compiling
from triton import knobs

target, name = sys.argv[2:4]
dtype = torch.bfloat16
with compiling(target) as launches:
    if name == "chunk_bmm":
        from falcon_h1r_kernels.ssd_prepare import chunk_bmm
        B = torch.empty(1, 4096, 1, 64, dtype=dtype, device="meta")
        chunk_bmm(B, torch.empty_like(B), 64, config="q64s64")
    else:
        from falcon_h1r_kernels.conv1d_step import launch_causal_conv1d_step
        x, window, weight = (torch.empty(*s, dtype=dtype, device="meta")
                             for s in ((4, 3584), (4, 3, 3584), (3584, 4)))
        launch_causal_conv1d_step(x, window, weight, None, name)
with tempfile.TemporaryDirectory() as folder:
    cubin = Path(folder, "kernel.cubin")
    cubin.write_bytes(launches[-1].compiled.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "-sass", str(cubin)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
print(json.dumps(re.findall(r"/[*][0-9a-f]{4}[*]/ +(?:@!?U?P[0-9T]+ )?([^;]*?) *;", text)))
"""


def code(target, name):
    return json.loads(run("-c", SASS, REPORT.parent, target, name).splitlines()[-1])


def kept(lines):
    """Which of a product's sums are read behind it, before something else is written there."""
    last = max(number for number, line in enumerate(lines) if line.startswith("HGMMA"))
    first = int(re.search(r" R(\d+)", lines[last]).group(1))
    holding, read = set(range(first, first + 32)), set()
    for line in lines[last + 1 :]:
        if re.match(r"F?SEL|MOV|IMAD\.MOV", line):
            read |= holding & {int(r) for r in re.findall(r", R(\d+)", line)}
        written = re.match(r"(?!ST)\S+ R(\d+)", line)
        holding -= {int(written.group(1))} if written else set()
    return sorted(r - first for r in read)


def test_products_of_one_tile_reach_the_mask():
    """ptxas 12.8 and 12.9 carried an accumulator's constant zeros past them, into the mask."""
    lines = code("90", "chunk_bmm")
    products = [line for line in lines if line.startswith("HGMMA")]
    assert len(products) == 4
    assert not [line for line in products if "RZ" in line]  # the zero is no constant
    assert kept(lines) == list(range(32))
    broken = [line.replace("SEL R25, R25, RZ", "SEL R25, RZ, RZ") for line in lines]
    assert broken != lines and kept(broken) != kept(lines)


@pytest.mark.parametrize("target", ["80", "90", "100"])
@pytest.mark.parametrize("config", ["channels256", "channels1024"])
def test_a_window_is_written_behind_a_barrier(target, config):
    """A thread may write to the window what another one has yet to read."""
    names = [line.split()[0] for line in code(target, config)]
    barrier = max(i for i, name in enumerate(names) if name.startswith("BAR.SYNC"))
    assert not [name for name in names[barrier:] if name.startswith("LD")]
    assert sum(name.startswith("STG") for name in names[barrier:]) == 3
    assert sum(name.startswith("STG") for name in names[:barrier]) == 1
