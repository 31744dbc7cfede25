"""The kernel report's reading of machine code and its rules, on text and rows made by hand."""

import sys
from pathlib import Path

import pytest

from tools import kernel_rules
from tools.kernel_sass import count, hot_loops, loops, mma, mma_flops, parse, width
from tools.kernel_targets import occupancy


def sass(*lines):
    """What cuobjdump prints for `lines`, one instruction each, 16 bytes apart."""
    text = []
    for number, line in enumerate(lines):
        text.append(
            f"        /*{16 * number:04x}*/                   {line} ;   /* 0x00000a00ff01 */"
        )
        text.append("                                                      /* 0x000fe200000008 */")
    return parse("\n".join(text))


def test_instructions_are_read_with_guard_modifiers_and_without_padding():
    code = sass("@!P0 LDG.E.128 R4, desc[UR4][R2.64]", "EXIT", "BRA 0x20", "NOP")
    assert [i.name for i in code] == ["LDG.E.128", "EXIT", "BRA"]
    assert [i.guarded for i in code] == [True, False, False]
    assert [i.address for i in code] == [0, 16, 32]


@pytest.mark.parametrize(
    "name, bits",
    [
        ("LDG.E.128", 128),
        ("LDG.E.64.CONSTANT", 64),
        ("LDG.E", 32),
        ("LDG.E.U16", 16),
        ("LDG.E.S8", 8),
        ("LDGSTS.E.BYPASS.LTC128B.128", 128),
        ("LDGSTS.E.LTC128B", 32),
        ("STG.E.EF.128", 128),
    ],
)
def test_width_is_that_of_the_access_not_of_a_prefetch(name, bits):
    assert width(sass(f"{name} R4, [R2]")[0]) == bits


@pytest.mark.parametrize(
    "name, kind, flops",
    [
        ("HMMA.16816.F32.BF16", "HMMA.16816", 4096),
        ("HGMMA.64x128x16.F32.BF16", "HGMMA.64x128x16", 65536),
        ("UTCHMMA", "UTCHMMA", 0),
        ("UTCHMMA.2CTA", "UTCHMMA", 0),
        ("FFMA.FTZ", "", 0),
        ("LDSM.16.M88.4", "", 0),
    ],
)
def test_matrix_instructions(name, kind, flops):
    assert mma(sass(f"{name} R4, R8, R4, R12")[0]) == kind
    assert mma_flops(kind) == flops


def test_a_loop_is_what_lies_between_its_head_and_its_back_edge():
    code = sass("MOV R1, R2", "LDG.E R4, [R2]", "@P0 BRA 0x10", "STG.E [R2], R4", "EXIT")
    (body,) = loops(code)
    assert [i.name for i in body] == ["LDG.E", "BRA"]


def test_the_trap_after_the_end_and_jumps_back_from_cold_code_are_no_loops():
    # 0x50: a slow path behind EXIT, which jumps back into the middle of straight code.
    code = sass("@P0 BRA 0x50", "FADD R1, R1, R1", "STG.E [R2], R1", "EXIT", "BRA 0x40", "BRA 0x10")
    assert [[i.address for i in body] for body in loops(code)] in ([], [[0x40]])
    assert not hot_loops(code)


def test_cold_code_of_a_loop_belongs_to_it():
    code = sass(
        "MOV R1, R2",
        "HMMA.16816.F32.BF16 R4, R8, R4, R12",
        "@P1 BRA 0x50",
        "@P0 BRA 0x10",
        "EXIT",
        "SYNCS.PHASECHK.TRANS64 P2, [UR4]",
        "BRA 0x30",
    )
    (hot,) = hot_loops(code)
    assert (hot.instructions, hot.barriers, hot.mma) == (5, 1, {"HMMA.16816": 1})


def test_innermost_loops_with_products_largest_first():
    product = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24"
    code = sass(
        "MOV R1, R2",
        "MOV R3, R2",  # 0x10: outer head
        product,  # 0x20: first inner loop
        "@P0 BRA 0x20",
        product,  # 0x40: second inner loop
        "MUFU.EX2 R5, R5",
        "STL [R1], R5",
        "BAR.SYNC.DEFER_BLOCKING 0x0",
        "BRA.U UP1, 0x40",
        "@P2 BRA 0x10",
        "LDG.E R1, [R2]",  # 0xa0: a loop without products
        "@P3 BRA 0xa0",
        "EXIT",
    )
    found = hot_loops(code)
    assert [loop.instructions for loop in found] == [5, 2]
    assert (found[0].mufu, found[0].local, found[0].barriers) == (1, 1, 1)
    assert count(code).mma == {"HGMMA.64x64x16": 2}


def test_memory_kernels_have_the_loop_of_their_loads_and_float32_dots_that_of_their_fma():
    code = sass("LDG.E.128 R4, [R2]", "@P0 BRA 0x0", "FADD R1, R1, R1", "@P0 BRA 0x20", "EXIT")
    assert [loop.ldg for loop in hot_loops(code)] == [{128: 1}]
    code = sass(*["FFMA R1, R2, R3, R1"] * 600, "@P0 BRA 0x0", "LDG.E R1, [R2]", "@P0 BRA 0x2590")
    assert [loop.fma for loop in hot_loops(code)] == [600]


@pytest.mark.parametrize(
    "target, registers, shared, warps, tmem, blocks, limiter",
    [
        ("90", 32, 0, 8, 0, 8, "regs"),
        ("90", 168, 0, 4, 0, 3, "regs"),
        ("90", 255, 0, 8, 0, 1, "regs"),
        ("90", 32, 100 * 1024, 4, 0, 2, "shared"),
        ("90", 32, 227 * 1024, 4, 0, 1, "shared"),
        ("90", 32, 227 * 1024 + 1, 4, 0, 0, "shared"),
        ("80", 32, 164 * 1024, 4, 0, 0, "shared"),
        ("90", 16, 0, 1, 0, 32, "blocks"),
        ("90", 16, 0, 4, 0, 16, "warps"),
        ("100", 64, 0, 4, 256, 2, "tmem"),
        ("90", 255, 0, 16, 0, 0, "regs"),
    ],
)
def test_occupancy(target, registers, shared, warps, tmem, blocks, limiter):
    assert occupancy(target, registers, shared, warps, tmem)[:2] == (blocks, limiter)


def row(**changes):
    """A sound sm_90 kernel's row."""
    lines = ["LDGSTS.E.BYPASS.128 [R1], [R2]", "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24"]
    code = sass(*lines, "@P0 BRA 0x0", "LDG.E R1, [R2]", "EXIT")

    def plain(counts):
        widths = {n: {str(b): k for b, k in getattr(counts, n).items()} for n in ("ldg", "ldgsts")}
        return counts._asdict() | widths

    sound = {
        "case": "one",
        "shape": "1",
        "kernel": "_one_kernel",
        "dtype": "bfloat16",
        "config": "first",
        "default": True,
        "target": "90",
        "registers": 64,
        "stack": 0,
        "shared": 1024,
        "fits": True,
        "dots": 1,
        "code": plain(count(code)),
        "hot": [plain(loop) for loop in hot_loops(code)],
    }
    return sound | changes


def narrow():
    loop = row()["hot"][0] | {"ldgsts": {"128": 1, "32": 2}}
    return row(hot=[loop])


@pytest.mark.parametrize(
    "wrong, rules",
    [
        (row(), set()),
        (row(stack=8), {"spills"}),
        (row(code=row()["code"] | {"local": 2}), {"spills"}),
        (row(fits=False), {"fits"}),
        (row(target="100"), {"mma"}),
        (row(target="80"), {"mma"}),
        (row(target="80", dtype="float32"), set()),
        (row(hot=[], code=row()["code"] | {"mma": {}}), {"mma"}),
        (row(dots=0, target="80"), set()),
        (narrow(), {"loads"}),
        ({"error": "no", "target": "90"}, {"compiles"}),
    ],
)
def test_rules(wrong, rules):
    assert set(kernel_rules.broken(wrong)) == rules


def test_only_defaults_are_judged_and_excuses_must_be_needed(monkeypatch):
    monkeypatch.setattr(kernel_rules, "EXEMPT", {})
    spilling = row(stack=8)
    assert kernel_rules.verdict([spilling]) == [
        "_one_kernel (one, 1) bfloat16 first on 90: spills: 8 bytes of stack, 0 LDL/STL"
    ]
    assert not kernel_rules.verdict([spilling | {"default": False}])
    refused = {"error": "ValueError: a shape", "case": "one", "shape": "1", "target": "90"}
    refused |= {"default": False, "dtype": "bfloat16", "config": "second"}
    assert not kernel_rules.verdict([refused])
    assert kernel_rules.verdict([refused | {"default": True}])
    assert kernel_rules.verdict([refused | {"error": "CompilationError: at 1:1"}])
    monkeypatch.setattr(kernel_rules, "EXEMPT", {("_one_kernel", "spills", ""): "a reason"})
    assert not kernel_rules.verdict([spilling], complete=True)
    assert not kernel_rules.verdict([row()])
    (line,) = kernel_rules.verdict([row()], complete=True)
    assert "excused from spills without need" in line


@pytest.mark.parametrize("where", ["bfloat16", "sm_90", "documents", "sm_90 documents bfloat16"])
@pytest.mark.parametrize("other", ["float16", "sm_100", "lengths", "documents sm_80"])
def test_an_excuse_holds_where_it_says(where, other, monkeypatch):
    spilling = row(stack=8, options="documents, no initial state")
    monkeypatch.setattr(kernel_rules, "EXEMPT", {("_one_kernel", "spills", where): "a reason"})
    assert not kernel_rules.verdict([spilling], complete=True)
    monkeypatch.setattr(kernel_rules, "EXEMPT", {("_one_kernel", "spills", other): "a reason"})
    assert len(kernel_rules.verdict([spilling])) == 1
    assert len(kernel_rules.verdict([spilling], complete=True)) == 2


def test_a_report_is_read_as_written_and_every_difference_is_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(kernel_rules.__file__).parent)
    import kernel_report

    monkeypatch.setattr(sys.modules["kernel_rules"], "EXEMPT", {})
    second = row(config="second", default=False)
    report = {"versions": {"triton": "1"}, "rows": [row(), second], "traffic": [], "floors": []}
    path = tmp_path / "report.json"
    path.write_text(kernel_report.dump(report))
    committed = kernel_report.load(path)
    assert kernel_report.check(report, committed, True) == []
    # Other versions: the rules alone count.
    other = committed | {"versions": {"triton": "2"}, "rows": []}
    assert kernel_report.check(report, other, True) == []

    key = "one 1 _one_kernel bfloat16 {} 90"
    changed = report | {"rows": [row(stack=8), row(config="third", default=False)]}
    assert kernel_report.check(changed, committed, True) == [
        "_one_kernel (one, 1) bfloat16 first on 90: spills: 8 bytes of stack, 0 LDL/STL",
        key.format("first") + ": stack: 0 -> 8",
        key.format("second") + ": no longer there",
        key.format("third") + ": new",
    ]
    # What was not compiled this time is not missing.
    assert kernel_report.check(report | {"rows": [row()]}, committed, True) == []


def test_what_is_compiled(monkeypatch):
    monkeypatch.syspath_prepend(Path(kernel_rules.__file__).parent)
    import kernel_collect
    from kernel_launches import CASES

    planned = {"": [], "options": []}
    for index, dtype, configs in kernel_collect.plan(["causal_conv1d", "decode_attention"]):
        planned["options" if CASES[index].options else ""].append((dtype, configs))
    halves = ["", "segment8", "segment32"]
    assert planned[""][:3] == [
        ("bfloat16", halves),
        ("float16", [""]),
        ("float32", ["", "channels256"]),
    ]
    assert planned["options"] == [("bfloat16", [""]), ("float16", [""])] * 2


def test_float16_and_options_have_one_short_table(monkeypatch):
    monkeypatch.syspath_prepend(Path(kernel_rules.__file__).parent)
    import kernel_render

    monkeypatch.setattr(sys.modules["kernel_rules"], "EXEMPT", {})
    more = {"warps": 4, "stages": 3, "tmem": 0, "blocks": 8, "limiter": "regs", "occupancy": 50}
    rows = [
        row(**more),
        row(**more, dtype="float16", registers=65),
        row(**more, shape="1, documents", options="documents", registers=66, stack=8),
        row(**more, shape="1, documents", options="documents", target="100", shared=2048),
    ]
    report = {"versions": {"triton": "1"}, "rows": rows, "traffic": [], "floors": [], "peers": {}}
    lines = kernel_render.markdown(report).splitlines()
    long, *short = (line for line in lines if line.startswith("| one |"))
    assert long.startswith("| one | bfloat16 | first* | 90 | 4/3 | 64 | 0 | 1.0 | 0 | 8 (regs) |")
    assert short == [
        "| one | 1 | float16 | one | 65 / 1.0 / 0 | - |",
        "| one | 1, documents | bfloat16 | one | 66 / 1.0 / 8 | 64 / 2.0 / 0 |",
    ]
