"""What the default configurations must obey in every compiled binary, and who is excused.

The default configuration of a call is the one its launcher takes when none is named. On sm_80,
sm_90 and sm_100:

compiles  the call compiles at all; so does every other configuration that serves the shape
spills    no stack, no LDL or STL
fits      at least one block fits an SM: shared memory, registers, tensor memory
mma       16-bit dots of the hot loop: HMMA on sm_80, HGMMA on sm_90, UTCHMMA on sm_100
loads     with 16-bit operands, of the bytes that the hot loop loads (without one, the kernel), 3/4
          come in 128-bit pieces
"""

import re

RULES = ("compiles", "spills", "fits", "mma", "loads")
MMA = {"80": "HMMA", "90": "HGMMA", "100": "UTC"}
WIDE_SHARE = 0.75

# (kernel, rule, where): why it does not apply. where: words that all stand in a binary's dtype,
# target (as sm_90) or options; "" is everywhere. One that excuses nothing is an error too.
EXEMPT: dict[tuple[str, str, str], str] = {
    ("_causal_conv1d_kernel", "loads", "documents"): (
        "the numbers of the documents are single, one for every position; samples come 128 bits "
        "at a time"
    ),
    ("_chunk_cumsum_kernel", "loads", ""): "reads dt alone, one number per position and head",
    ("_chunk_bmm_kernel", "loads", "documents sm_100"): (
        "the numbers of the documents are single; 74 % of the bytes are 128-bit loads"
    ),
    ("_chunk_bmm_kernel", "mma", "float16"): (
        "the fused scan's chunks have 32 positions in float16, fewer than the 64 rows of HGMMA "
        "and UTCHMMA"
    ),
    ("_state_passing_kernel", "loads", "documents"): (
        "a decay and a document of each chunk are single numbers; states come 128 bits at a time"
    ),
    ("_ssd_walk_kernel", "loads", "documents float16"): (
        "the numbers of the documents are single, and weigh more beside chunks of 32 positions: "
        "74 % of the bytes are 128-bit loads"
    ),
    ("_ssd_walk_kernel", "spills", "documents sm_100"): (
        "32 bytes, outside the loop; p64q32, which spills nothing, has more instructions in it"
    ),
    ("_decode_attention_kernel", "mma", ""): (
        "the query heads of one key head are fewer than the 64 rows of HGMMA and UTCHMMA; "
        "every key is used once, so memory sets the time"
    ),
    ("_decode_merge_kernel", "loads", ""): (
        "a maximum and a sum per part, single numbers, beside it"
    ),
    ("_logprob_merge_kernel", "loads", ""): "a stretch's three sums are single numbers",
}


def excuse(row: dict, rule: str) -> tuple[str, str, str] | None:
    """The entry of `EXEMPT` that covers what `broken` says of a row."""
    facts = re.findall(r"\w+", f"{row['dtype']} sm_{row['target']} {row.get('options', '')}")
    for kernel, excused, where in EXEMPT:
        named = (kernel, excused) == (row.get("kernel", row["case"]), rule)
        if named and set(where.split()) <= set(facts):
            return kernel, excused, where
    return None


def broken(row: dict) -> dict[str, str]:
    """{rule: what is wrong} of one row, whether it is a default or not, exemptions left aside."""
    if "error" in row:
        return {"compiles": row["error"]}
    if row["target"] not in MMA:
        return {}
    found = {}
    code, hot = row["code"], row["hot"]
    if row["stack"] or code["local"]:
        found["spills"] = f"{row['stack']} bytes of stack, {code['local']} LDL/STL"
    if not row["fits"]:
        found["fits"] = f"no block fits: {row['shared']} bytes shared, {row['registers']} registers"
    if row["dots"] and row["dtype"] != "float32":
        kinds = set().union(*(loop["mma"] for loop in hot)) or set(code["mma"])
        wrong = sorted(kind for kind in kinds if not kind.startswith(MMA[row["target"]]))
        if wrong or not kinds:
            expected = MMA[row["target"]]
            found["mma"] = f"dots are {', '.join(wrong) or 'FMA'}, expected {expected}"
    share = wide_share(row)
    if share < WIDE_SHARE and row["dtype"] != "float32":
        found["loads"] = f"{share:.0%} of the bytes in 128-bit loads"
    return found


def wide_share(row: dict) -> float:
    """Of the bytes loaded in the hot loops (without them in the kernel), how many 128 at a time."""
    stretches = [loop for loop in row["hot"] if loop["ldg"] or loop["ldgsts"] or loop["tma"]]
    total = wide = 0
    for stretch in stretches or [row["code"]]:
        for widths in (stretch["ldg"], stretch["ldgsts"]):
            for bits, number in widths.items():
                total += int(bits) * number
                wide += int(bits) * number * (int(bits) >= 128)
    return wide / total if total else 1.0


def verdict(rows: list[dict], complete: bool = False) -> list[str]:
    """One line per default configuration and rule that is broken and not excused.

    complete: the rows are those of every kernel, so that an exemption nobody needs shows.
    """
    lines, used = [], set()
    for row in rows:
        # A named configuration may refuse a shape (ValueError), but not fail to compile.
        failed = not row.get("error", "ValueError").startswith("ValueError")
        if not (row["default"] or failed):
            continue
        for rule, text in broken(row).items():
            if known := excuse(row, rule):
                used.add(known)
                continue
            kernel = row.get("kernel", row["case"])
            where = f"{kernel} ({row['case']}, {row['shape']}) {row['dtype']} {row['config']}"
            lines.append(f"{where} on {row['target']}: {rule}: {text}")
    if complete:
        unused = sorted(set(EXEMPT) - used)
        lines += [
            f"{kernel}: excused from {rule} without need" + f" ({where})" * bool(where)
            for kernel, rule, where in unused
        ]
    return list(dict.fromkeys(lines))
