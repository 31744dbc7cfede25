"""The SSD scan: one operator, two forms of the same maths, and the rule that chooses.

    state_t = exp(dt_t A) state_{t-1} + dt_t x_t (outer) B_t          y_t = state_t C_t + D x_t

The fused form (ssd_fused.py) walks the chunks of a head one after another with the state on chip;
the staged form (ssd_staged.py) computes all chunks at once and moves a state per chunk through
device memory. `plan` chooses by an estimate of the time either takes.

Axes: b batch, l length, h heads, p channels per head, g groups (head i belongs to group
i // (h/g)), n state size.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import ssd_fused, ssd_staged
from .documents import fill, not_finite, without_lost
from .launch import check_inputs, check_limit, operator

FORMS = ("auto", "staged", "fused")
CONFIGS = ssd_fused.CONFIGS
"""What `config` may name for the fused form; for the staged form see `ssd_staged.TABLES`."""

MAX_SEGMENTS = 64
ASSUMED_MULTIPROCESSORS = 132
ASSUMED_SHARED_MEMORY = 227 * 1024
"""An H100's: the numbers that plans are made with where there is no GPU."""

# For a state of 64 x 256 per program, in units of one chunk of 64 positions of the walk that writes
# y: 3.9 microseconds on an H100. There the two forms took 165 and 128 microseconds for one sequence
# of H1R-7B of 4096 tokens, 44 and 35 for 512, 783 and 728 for eight of 4096; the estimates are 179
# and 127, 41 and 30, 749 and 711.
END_STEP = 0.4  # one chunk of the walk that only finds a segment's end: 290 of 720 instructions
STATE_MOVE = 1.5  # a tile of the state, 64 KB, to or from device memory at its share of bandwidth
STATE_REREAD = 0.5  # a tile that another program has read before, from L2
LAUNCH = 2.0  # one more kernel in the queue
STAGED_STEP = 0.5  # the same chunk in the staged form: several programs share a multiprocessor
STAGED_STATES = 54.0  # a state written and read, once per chunk_size positions
STAGED_LAUNCHES = 2  # more than a fused walk
STAGED_PASSING = 0.1  # what one chunk adds to the chain of states, which nothing shortens


class ScanPlan(NamedTuple):
    """`segments` has a meaning for the fused form only."""

    form: str
    segments: int


def plan(
    batch: int,
    heads: int,
    length: int,
    *,
    tiles: int = 2,
    block: int = 64,
    chunk_size: int = 128,
    multiprocessors: int = ASSUMED_MULTIPROCESSORS,
    form: str = "auto",
) -> ScanPlan:
    """The form (unless it is given) and the segments of the sequence that should take least time.

    tiles: programs per head (two of 64 channels for heads of 128); block: positions per chunk of
    the fused form; chunk_size: those of the staged form. A program of the fused walk occupies a
    multiprocessor, so its time is the number of rounds that the programs need, times a segment's
    chunks. More segments fill the machine; each also costs a walk for its end and the moves of one
    more state. The staged form, parallel in everything but the chain of states, has no such rounds
    and moves more bytes, which costs an H100 less time than a program alone on a multiprocessor
    does. The fused form is left for short sequences whose programs just fill the machine, and for
    those who would rather save the memory of the states. At equal estimates the fewest segments
    are taken.
    """
    if form == "staged":
        return ScanPlan("staged", 1)
    programs, chunks = batch * heads * tiles, -(-length // block)
    choices = {}
    for asked in range(1, min(MAX_SEGMENTS, chunks) + 1):
        per_segment = -(-chunks // asked)
        segments = -(-chunks // per_segment)
        choices[segments] = _fused_time(programs, per_segment, segments, multiprocessors)
    best = min(choices, key=lambda segments: (choices[segments], segments))
    step = STAGED_STEP + STAGED_STATES / chunk_size
    staged = -(-programs * chunks // multiprocessors) * step
    staged += STAGED_PASSING * chunks + STAGED_LAUNCHES * LAUNCH
    if form == "auto" and staged < choices[best]:
        return ScanPlan("staged", 1)
    return ScanPlan("fused", best)


def _fused_time(programs: int, per_segment: int, segments: int, multiprocessors: int) -> float:
    rounds = -(-programs * segments // multiprocessors)
    if segments == 1:
        return rounds * per_segment
    ends = -(-programs * (segments - 1) // multiprocessors)
    return (
        rounds * (per_segment + STATE_MOVE)
        + ends * (END_STEP * per_segment + STATE_MOVE)
        + STATE_REREAD * (segments - 2)
        + LAUNCH
    )


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return ASSUMED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may have; an H100's where there is no GPU."""
    if device.type != "cuda":
        return ASSUMED_SHARED_MEMORY
    from triton.runtime import driver

    index = torch.cuda.current_device() if device.index is None else device.index
    return driver.active.utils.get_device_properties(index)["max_shared_mem"]


def _check(x_blhp, dt_blh, A_h, B_blgn, C_blgn, chunk_size, form, optional: dict) -> None:
    """Raise ValueError unless shapes and dtypes fit together and `form` exists."""
    name = "ssd_scan"
    if form not in FORMS:
        raise ValueError(f"{name}: no form {form!r}; there are: {', '.join(FORMS)}")
    if chunk_size < 1:
        raise ValueError(f"{name}: chunk_size {chunk_size}, expected at least 1")
    for label, tensor in (("x_blhp", x_blhp), ("B_blgn", B_blgn)):
        if tensor.ndim != 4:
            raise ValueError(f"{name}: {label} {tuple(tensor.shape)}, expected four axes")
    check_inputs(name, x_blhp, dt_blh, A_h, B_blgn, C_blgn, *optional.values())
    b, l, h, p = x_blhp.shape
    g, n = B_blgn.shape[2:]
    if l == 0 or g == 0 or h % g:
        raise ValueError(f"{name}: length {l} must be positive, {h} heads a multiple of {g} groups")
    shapes = {
        "dt_blh": (b, l, h),
        "A_h": (h,),
        "B_blgn": (b, l, g, n),
        "C_blgn": (b, l, g, n),
        "D_h": (h,),
        "initial_state_bhpn": (b, h, p, n),
        "seq_idx_bl": (b, l),
        "dt_bias_h": (h,),
    }
    given = {"dt_blh": dt_blh, "A_h": A_h, "B_blgn": B_blgn, "C_blgn": C_blgn, **optional}
    for label, tensor in given.items():
        if tensor is not None and tensor.shape != shapes[label]:
            raise ValueError(f"{name}: {label} {tuple(tensor.shape)}, expected {shapes[label]}")
    if not B_blgn.dtype == C_blgn.dtype == x_blhp.dtype:
        raise ValueError(
            f"{name}: B {B_blgn.dtype} and C {C_blgn.dtype}, expected {x_blhp.dtype}, x's dtype"
        )
    seq_idx = optional["seq_idx_bl"]
    if seq_idx is not None and seq_idx.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}: seq_idx_bl {seq_idx.dtype}, expected int32 or int64")


@operator("ssd_scan")
def _ssd_scan_op(
    x_blhp: Tensor,
    dt_blh: Tensor,
    A_h: Tensor,
    B_blgn: Tensor,
    C_blgn: Tensor,
    D_h: Tensor | None,
    chunk_size: int,
    initial_state_bhpn: Tensor | None,
    seq_idx_bl: Tensor | None,
    dt_bias_h: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    form: str,
    config: str,
) -> tuple[Tensor, Tensor]:
    optional = {
        "D_h": D_h,
        "initial_state_bhpn": initial_state_bhpn,
        "seq_idx_bl": seq_idx_bl,
        "dt_bias_h": dt_bias_h,
    }
    _check(x_blhp, dt_blh, A_h, B_blgn, C_blgn, chunk_size, form, optional)
    check_limit("ssd_scan", dt_min, dt_max)
    if form == "auto" and config:
        form = "fused" if config in [known.name for known in CONFIGS] else "staged"
    if form == "auto" and B_blgn.shape[-1] > ssd_fused.MAX_STATE:
        form = "staged"
    lost_bl = None
    if seq_idx_bl is not None:
        # A step that softplus or the limit makes finite is used.
        least = torch.finfo(dt_blh.dtype).min if dt_softplus else -math.inf
        steps_blh = dt_blh.clamp(least, math.inf if dt_max == math.inf else 0.0)
        lost_bl, (x_blhp, B_blgn, _) = without_lost(seq_idx_bl, x_blhp, B_blgn, steps_blh)
        dt_blh = fill(dt_blh, lost_bl)
        bad_bl = not_finite(C_blgn)
        C_blgn, unread_bl = fill(C_blgn, bad_bl), lost_bl | bad_bl
        if initial_state_bhpn is not None:
            bad_b = not_finite(initial_state_bhpn[:, None])[:, 0]
            initial_state_bhpn = fill(initial_state_bhpn, bad_b)
            first_bl = bad_b[:, None] & (seq_idx_bl == seq_idx_bl[:, :1])
            lost_bl, unread_bl = lost_bl | first_bl, unread_bl | first_bl
    tail = (initial_state_bhpn, seq_idx_bl, dt_bias_h, dt_softplus, (dt_min, dt_max))
    segments, fused_config = 1, config
    if form != "staged":
        b, l, h, p = x_blhp.shape
        if not config:
            fused_config = ssd_fused.default_config(x_blhp.dtype, _shared_memory(x_blhp.device))
        tiles, block = ssd_fused.tiling(x_blhp.dtype, p, fused_config)
        form, segments = plan(
            b,
            h,
            l,
            tiles=tiles,
            block=block,
            chunk_size=chunk_size,
            multiprocessors=_multiprocessors(x_blhp.device),
            form=form,
        )
    if form == "staged":
        y_blhp, state_bhpn = ssd_staged.launch_ssd_staged(
            x_blhp, dt_blh, A_h, B_blgn, C_blgn, D_h, chunk_size, *tail, config
        )
    else:
        y_blhp, state_bhpn = ssd_fused.launch_ssd_fused(
            x_blhp, dt_blh, A_h, B_blgn, C_blgn, D_h, segments, *tail, fused_config
        )
    if lost_bl is None:
        return y_blhp, state_bhpn
    return fill(y_blhp, unread_bl, math.nan), fill(state_bhpn, lost_bl[:, -1], math.nan)


@_ssd_scan_op.register_fake
def _(x_blhp, dt_blh, A_h, B_blgn, C_blgn, *rest):
    b, l, h, p = x_blhp.shape
    y_blhp = torch.empty((b, l, h, p), dtype=x_blhp.dtype, device=x_blhp.device)
    final_shape = (b, h, p, B_blgn.shape[-1])
    return y_blhp, torch.empty(final_shape, dtype=torch.float32, device=x_blhp.device)


def ssd_scan(
    x_blhp: Tensor,
    dt_blh: Tensor,
    A_h: Tensor,
    B_blgn: Tensor,
    C_blgn: Tensor,
    D_h: Tensor | None = None,
    *,
    chunk_size: int = 128,
    initial_state_bhpn: Tensor | None = None,
    seq_idx_bl: Tensor | None = None,
    dt_bias_h: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    form: str = "auto",
    config: str = "",
) -> tuple[Tensor, Tensor]:
    """The scan over a sequence; returns y_blhp in x's dtype and the final state, float32.

    x_blhp (b, l, h, p); dt_blh (b, l, h); A_h (h,) < 0; B_blgn, C_blgn (b, l, g, n) in x's dtype;
    D_h (h,) or None; all of any strides. dt is used as clamp(softplus(dt + dt_bias_h), *dt_limit),
    with what of that is asked for; 0 holds the state. initial_state_bhpn (b, h, p, n) or None for
    zeros. seq_idx_bl (b, l) int32 or int64 numbers packed documents and never decreases along a
    row: the state is cleared where it changes, the initial state belongs to the first document and
    the final one to the last. What is not
    finite in one document reaches no other: the document is NaN from there to its end.

    form: "fused", "staged", or "auto" for what `plan` says; chunk_size is the staged form's.
    config: a configuration of the form; without a form it decides that too. The result depends on
    all three by rounding only. y (b, l, h, p) and the final state (b, h, p, n) are contiguous.
    In float16 the state and x dt enter products as float16: beyond 65504 they are infinite, where a
    scan in float32 is not. Raises ValueError.
    """
    return _ssd_scan_op(
        x_blhp,
        dt_blh,
        A_h,
        B_blgn,
        C_blgn,
        D_h,
        chunk_size,
        initial_state_bhpn,
        seq_idx_bl,
        dt_bias_h,
        dt_softplus,
        float(dt_limit[0]),
        float(dt_limit[1]),
        form,
        config,
    )
