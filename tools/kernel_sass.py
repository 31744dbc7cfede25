"""Reads NVIDIA machine code: instructions, control flow, loops and what they hold."""

import re
from collections import Counter
from typing import NamedTuple

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);", re.M)
_TARGET = re.compile(r"0x[0-9a-f]+$")
_ENDS = ("EXIT", "RET", "BRX", "KILL", "JMX")
_MMA = re.compile(r"^(HMMA|IMMA|QMMA|OMMA|DMMA|HGMMA|QGMMA|IGMMA|UTC[A-Z]*MMA)(\.\w+)?")
_WIDTHS = {"8": 8, "16": 16, "32": 32, "64": 64, "128": 128, "256": 256}
_WIDTHS |= {f"{sign}{bits}": bits for sign in "US" for bits in (8, 16)}


class Instruction(NamedTuple):
    address: int
    guarded: bool  # behind a predicate
    name: str  # with its modifiers
    operands: str

    @property
    def base(self) -> str:
        return self.name.split(".")[0]


def parse(sass: str) -> list[Instruction]:
    """The instructions in what cuobjdump or nvdisasm prints, without the padding at the end."""
    found = [
        Instruction(int(address, 16), bool(guard), name, operands.strip())
        for address, guard, name, operands in _LINE.findall(sass)
    ]
    return [instruction for instruction in found if instruction.base != "NOP"]


def _successors(code: list[Instruction]) -> list[list[int]]:
    """For each instruction the indices of those that can follow it. Calls return."""
    index = {instruction.address: i for i, instruction in enumerate(code)}
    addresses = sorted(index)
    following = []
    for i, instruction in enumerate(code):
        after = [i + 1] if i + 1 < len(code) else []
        jump = _TARGET.search(instruction.operands) if instruction.base in ("BRA", "JMP") else None
        if jump:
            # A target can be one of the NOPs left out: then the next instruction after it.
            goal = int(jump.group(), 16)
            goal = next((a for a in addresses if a >= goal), None)
            taken = [] if goal is None else [index[goal]]
            alone = not instruction.guarded and instruction.operands == jump.group()
            following.append(taken if alone else after + taken)
        elif instruction.base in _ENDS and not instruction.guarded:
            following.append([])
        else:
            following.append(after)
    return following


def _blocks(code: list[Instruction]):
    """Basic blocks as index ranges, and the blocks that follow each."""
    following = _successors(code)
    leaders = {0}
    for i, after in enumerate(following):
        if after != [i + 1]:
            leaders.update(after, [i + 1])
    starts = sorted(leader for leader in leaders if leader < len(code))
    block_of = {start: number for number, start in enumerate(starts)}
    ranges = [range(a, b) for a, b in zip(starts, [*starts[1:], len(code)])]
    return ranges, [[block_of[i] for i in following[block[-1]]] for block in ranges]


def _dominators(after: list[list[int]]) -> list[set[int]]:
    """For each block those that every way to it passes; for one out of reach, itself."""
    before = [[] for _ in after]
    for block, nexts in enumerate(after):
        for n in nexts:
            before[n].append(block)
    reached, queue = {0}, [0]
    while queue:
        for n in after[queue.pop()]:
            if n not in reached:
                reached.add(n)
                queue.append(n)
    dominators = [set(reached) if b in reached else {b} for b in range(len(after))]
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for b in sorted(reached - {0}):
            new = {b} | set.intersection(*(dominators[p] for p in before[b] if p in reached))
            if new != dominators[b]:
                dominators[b], changed = new, True
    return dominators


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The natural loops: for each loop head, everything from which a back edge to it is reached."""
    ranges, after = _blocks(code)
    dominators = _dominators(after)
    before = [[b for b, nexts in enumerate(after) if n in nexts] for n in range(len(after))]
    bodies: dict[int, set[int]] = {}
    for tail, nexts in enumerate(after):
        for head in nexts:
            if head not in dominators[tail]:
                continue
            body = bodies.setdefault(head, {head})
            queue = [tail]
            while queue:
                block = queue.pop()
                if block not in body:
                    body.add(block)
                    queue.extend(before[block])
    return [[code[i] for b in sorted(body) for i in ranges[b]] for body in bodies.values()]


def width(instruction: Instruction) -> int:
    """Bits per thread that a load or a store moves."""
    named = [_WIDTHS[part] for part in instruction.name.split(".")[1:] if part in _WIDTHS]
    return named[-1] if named else 32


def mma(instruction: Instruction) -> str:
    """`HGMMA.64x128x16`, `HMMA.16816`, `UTCHMMA`; empty for anything else."""
    found = _MMA.match(instruction.name)
    if not found:
        return ""
    return found.group(1) if found.group(1).startswith("UTC") else found.group()


def mma_flops(kind: str) -> int:
    """Floating-point operations of one instruction of `mma`'s names, per warp; 0: not in the name.

    HMMA.16816 is 16 x 8 x 16 per warp; the four warps of a group issue one HGMMA together.
    """
    name, _, shape = kind.partition(".")
    if name == "HGMMA":
        m, n, k = map(int, shape.split("x"))
        return 2 * m * n * k // 4
    return {"HMMA.16816": 4096, "HMMA.1688": 2048}.get(kind, 0)


class Count(NamedTuple):
    """What a stretch of code holds. Widths: {bits: instructions}; local: LDL and STL."""

    instructions: int
    mma: dict[str, int]
    fma: int
    mufu: int
    barriers: int
    local: int
    calls: int
    ldg: dict[int, int]
    ldgsts: dict[int, int]
    stg: dict[int, int]
    tma: int
    atomics: int


def count(code: list[Instruction]) -> Count:
    """Counts of a whole kernel or of one loop. Barriers: BAR, and on sm_100 mbarrier SYNCS too."""
    bases = Counter(instruction.base for instruction in code)

    def widths(base):
        found = Counter(width(i) for i in code if i.base == base)
        return dict(sorted(found.items(), reverse=True))

    return Count(
        instructions=len(code),
        mma=dict(sorted(Counter(filter(None, map(mma, code))).items())),
        fma=bases["FFMA"] + bases["FFMA2"] + bases["DFMA"],
        mufu=bases["MUFU"],
        barriers=bases["BAR"] + bases["SYNCS"],
        local=bases["LDL"] + bases["STL"],
        calls=bases["CALL"],
        ldg=widths("LDG"),
        ldgsts=widths("LDGSTS"),
        stg=widths("STG"),
        tma=bases["UTMALDG"] + bases["UTMASTG"] + bases["UBLKCP"],
        atomics=bases["ATOMG"] + bases["RED"] + bases["REDG"] + bases["ATOM"],
    )


def density(loop: dict) -> str:
    """Instructions per 1000 FLOPs of matrix products, per warp; "-" where not known.

    loop: a `Count` as a dictionary.
    """
    flops = sum(mma_flops(kind) * n for kind, n in loop["mma"].items())
    return f"{1000 * loop['instructions'] / flops:.2f}" if flops else "-"


def hot_loops(code: list[Instruction]) -> list[Count]:
    """Innermost loops with the kernel's work, largest first.

    The work is the matrix instructions; in a kernel without any, FMA where there are many (dots in
    float32), else loads and stores of global memory. Empty for a kernel without such a loop.
    """
    whole = count(code)

    def work(c):
        if whole.mma:
            return sum(c.mma.values())
        if whole.fma >= 512:
            return c.fma >= 64
        return sum(c.ldg.values()) + sum(c.ldgsts.values()) + sum(c.stg.values()) + c.tma

    bodies = [body for body in loops(code) if work(count(body))]
    addresses = [{i.address for i in body} for body in bodies]
    innermost = [
        body for body, own in zip(bodies, addresses) if not any(other < own for other in addresses)
    ]
    return sorted(map(count, innermost), key=lambda c: -c.instructions)
