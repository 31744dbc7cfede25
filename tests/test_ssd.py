"""The SSD scan: every form of one map, against the sum that the recurrence unrolls to.

Float64 comparisons are exact up to 1e-12, a few thousand roundoffs; a wrong index or a missing
decay is off by a part in ten. Float32 and bfloat16 are judged by the distance to float64, which is
at most twice that of transformers' torch scan on the same inputs.
"""

import itertools
import math

import pytest
import torch
from models import relative_error, rms_error
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.falcon_h1.modeling_falcon_h1 import mamba2_chunk_scan

from falcon_h1r import ssd
from falcon_h1r.cpu import step
from falcon_h1r.scan import ssd_scan
from falcon_h1r.ssd import ssd_chunked, ssd_dual, ssd_recurrent

FORMS = {
    "recurrent": ssd_recurrent,
    "dual": ssd_dual,
    "chunked": ssd_chunked,
    "scan": ssd_scan,
}
CHUNKED = {"chunked": ssd_chunked, "scan": ssd_scan}
STEPS = {"step": ssd.ssd_step, "tuned_step": step.ssd_step}
FLOAT64_BOUND = 1e-12


def normal(*shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def make_inputs(b=2, l=17, h=4, p=3, g=2, n=5, *, dt_scale=1.0, dtype=torch.float64, seed=0):
    """x, dt, A, B, C, D with every value different and decays between almost 0 and almost 1."""
    dt = torch.nn.functional.softplus(normal(b, l, h, seed=seed + 1) * 2 - 1) * dt_scale
    A = -normal(h, seed=seed + 2).abs() - 0.1
    x, D = normal(b, l, h, p, seed=seed), normal(h, seed=seed + 3)
    B, C = normal(b, l, g, n, seed=seed + 4), normal(b, l, g, n, seed=seed + 5)
    return [tensor.to(dtype) for tensor in (x, dt, A, B, C, D)]


def make_seq_idx(b: int, l: int, seed: int = 0) -> torch.Tensor:
    """Documents of random lengths, one token long too; numbers neither start at 0 nor are dense."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.rand(b, l, generator=generator) < 0.3
    return 3 + 2 * starts.cumsum(1)


def unrolled(x, dt, A, B, C, D=None, initial_state_bhpn=None, seq_idx_bl=None):
    """y_t = sum over s <= t of exp(A (dt_s+1 + .. + dt_t)) (C_t . B_s) dt_s x_s, pair by pair."""
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    y, state = torch.zeros_like(x), torch.zeros(b, h, p, n, dtype=x.dtype)
    ids = torch.zeros(b, l, dtype=torch.int64) if seq_idx_bl is None else seq_idx_bl
    for row in range(b):
        for head in range(h):
            group = head // (h // g)
            for t in range(l):
                carried = torch.zeros(p, n, dtype=x.dtype)
                if initial_state_bhpn is not None and ids[row, t] == ids[row, 0]:
                    total = dt[row, : t + 1, head].sum()
                    carried += torch.exp(A[head] * total) * initial_state_bhpn[row, head]
                for s in range(t + 1):
                    if ids[row, s] == ids[row, t]:
                        decay = torch.exp(A[head] * dt[row, s + 1 : t + 1, head].sum())
                        xdt = x[row, s, head] * dt[row, s, head]
                        carried += decay * torch.outer(xdt, B[row, s, group])
                y[row, t, head] = carried @ C[row, t, group]
                if D is not None:
                    y[row, t, head] += D[head] * x[row, t, head]
            state[row, head] = carried
    return y, state


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("packed", [False, True], ids=["one_document", "packed"])
def test_forms_equal_the_unrolled_sum(form, groups, packed):
    x, dt, A, B, C, D = make_inputs(l=12, g=groups)
    options = {
        "initial_state_bhpn": normal(2, 4, 3, 5, seed=9),
        "seq_idx_bl": make_seq_idx(2, 12) if packed else None,
    }
    for skip in (D, None):
        expected_y, expected_state = unrolled(x, dt, A, B, C, skip, **options)
        y, state = FORMS[form](x, dt, A, B, C, skip, chunk_size=5, **options)
        assert relative_error(y, expected_y) < FLOAT64_BOUND
        assert relative_error(state, expected_state) < FLOAT64_BOUND


@pytest.mark.parametrize("length", [1, 2, 6, 7, 8, 9, 15, 16, 17, 31, 64, 65])
@pytest.mark.parametrize("start", ["zero", "state", "packed", "packed_state"])
def test_every_chunk_size_gives_the_recurrence(length, start):
    inputs = make_inputs(l=length, seed=length)
    options = {
        "initial_state_bhpn": normal(2, 4, 3, 5, seed=9) if "state" in start else None,
        "seq_idx_bl": make_seq_idx(2, length, seed=length) if "packed" in start else None,
    }
    expected_y, expected_state = ssd_recurrent(*inputs, **options)
    sizes = (1, 2, 7, 8, 64, length, length + 3)
    for chunk_size, form in itertools.product(sizes, CHUNKED.values()):
        y, state = form(*inputs, chunk_size=chunk_size, **options)
        assert relative_error(y, expected_y) < FLOAT64_BOUND, chunk_size
        assert relative_error(state, expected_state) < FLOAT64_BOUND, chunk_size
    y, state = ssd_dual(*inputs, **options)
    assert relative_error(y, expected_y) < FLOAT64_BOUND
    assert relative_error(state, expected_state) < FLOAT64_BOUND


@pytest.mark.parametrize("form", FORMS)
def test_two_halves_joined_by_the_state(form):
    scan = FORMS[form]
    x, dt, A, B, C, D = make_inputs(l=19)
    y, state = scan(x, dt, A, B, C, D, chunk_size=8)
    for cut in range(1, 19):
        parts, carried = [], None
        for part in (slice(0, cut), slice(cut, None)):
            part_y, carried = scan(
                x[:, part],
                dt[:, part],
                A,
                B[:, part],
                C[:, part],
                D,
                chunk_size=8,
                initial_state_bhpn=carried,
            )
            parts.append(part_y)
        assert relative_error(torch.cat(parts, 1), y) < FLOAT64_BOUND
        assert relative_error(carried, state) < FLOAT64_BOUND


@pytest.mark.parametrize("form", FORMS)
def test_packed_documents_equal_documents_alone(form):
    x, dt, A, B, C, D = make_inputs(b=1, l=20)
    lengths = [1, 7, 1, 8, 3]
    seq_idx = torch.repeat_interleave(torch.arange(5), torch.tensor(lengths))[None]
    y, state = FORMS[form](x, dt, A, B, C, D, chunk_size=8, seq_idx_bl=seq_idx)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        alone, last = ssd_recurrent(x[:, part], dt[:, part], A, B[:, part], C[:, part], D)
        assert relative_error(y[:, part], alone) < FLOAT64_BOUND
        start += length
    assert relative_error(state, last) < FLOAT64_BOUND


@pytest.mark.parametrize("form", FORMS)
def test_constant_input_is_a_geometric_series(form):
    """With dt, x, B and C constant, y_t = dt x (C.B) (1 + a + .. + a^t), a = exp(dt A)."""
    l, dt, A, x, product = 40, 0.3, -0.7, 1.7, 2.0 * 0.25
    a = math.exp(dt * A)
    full = torch.full
    y, state = FORMS[form](
        full((1, l, 1, 1), x, dtype=torch.float64),
        full((1, l, 1), dt, dtype=torch.float64),
        full((1,), A, dtype=torch.float64),
        full((1, l, 1, 1), 2.0, dtype=torch.float64),
        full((1, l, 1, 1), 0.25, dtype=torch.float64),
        chunk_size=7,
    )
    expected = [dt * x * product * (1 - a ** (t + 1)) / (1 - a) for t in range(l)]
    expected = torch.tensor(expected, dtype=torch.float64)
    assert relative_error(y.flatten(), expected) < FLOAT64_BOUND
    assert relative_error(state.flatten() * 0.25, expected[-1:]) < FLOAT64_BOUND


@pytest.mark.parametrize("form", FORMS)
def test_an_impulse_decays_and_dt_zero_holds(form):
    l = 20
    x, dt, A, B, C, _ = make_inputs(b=1, l=l, h=2, g=1)
    x[:, 1:] = 0
    y, _ = FORMS[form](x, dt, A, B, C, chunk_size=8)
    for t in range(l):
        decay = torch.exp(A * dt[0, 1 : t + 1].sum(0))
        expected = (decay * dt[0, 0] * (C[0, t, 0] @ B[0, 0, 0]))[:, None] * x[0, 0]
        assert relative_error(y[0, t], expected) < FLOAT64_BOUND
    start = normal(1, 2, 3, 5, seed=8)
    x = normal(1, l, 2, 3, seed=7)
    y, state = FORMS[form](x, torch.zeros_like(dt), A, B, C, chunk_size=8, initial_state_bhpn=start)
    assert torch.equal(state, start)
    assert relative_error(y, torch.einsum("bhpn,blgn->blhp", start, C)) < FLOAT64_BOUND


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_steps_equal_the_recurrence_in_place(step, groups):
    x, dt, A, B, C, D = make_inputs(l=9, g=groups)
    start = normal(2, 4, 3, 5, seed=9)
    for skip in (D, None):
        expected_y, expected_state = ssd_recurrent(
            x, dt, A, B, C, skip, initial_state_bhpn=start.clone()
        )
        held = start.clone()
        address = held.data_ptr()
        for t in range(9):
            y = STEPS[step](held, x[:, t], dt[:, t], A, B[:, t], C[:, t], skip)
            assert relative_error(y, expected_y[:, t]) < FLOAT64_BOUND
        assert relative_error(held, expected_state) < FLOAT64_BOUND
        assert held.data_ptr() == address


@pytest.mark.parametrize("step", STEPS)
def test_step_reads_the_state_before_rounding_it(step):
    """y comes from the float32 state; only what is kept for the next token is rounded."""
    x, dt, A, B, C, D = make_inputs(l=1, dtype=torch.float32)
    start = normal(2, 4, 3, 5, seed=9, dtype=torch.bfloat16)
    wide, narrow = start.float(), start.clone()
    arguments = (x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D)
    assert torch.equal(STEPS[step](narrow, *arguments), STEPS[step](wide, *arguments))
    assert torch.equal(narrow, wide.bfloat16())


@pytest.mark.parametrize("form", FORMS)
def test_inputs_are_left_alone(form):
    inputs = make_inputs()
    start, seq_idx = normal(2, 4, 3, 5, seed=9), make_seq_idx(2, 17)
    copies = [t.clone() for t in (*inputs, start, seq_idx)]
    FORMS[form](*inputs, chunk_size=8, initial_state_bhpn=start, seq_idx_bl=seq_idx)
    assert all(torch.equal(a, b) for a, b in zip((*inputs, start, seq_idx), copies))


def as_slice(tensor: torch.Tensor) -> torch.Tensor:
    """The same values as a slice of a bigger tensor whose rest is NaN."""
    bigger = tensor.new_full([size + 3 for size in tensor.shape], torch.nan)
    window = tuple(slice(1, 1 + size) for size in tensor.shape)
    bigger[window] = tensor
    return bigger[window]


def as_transposed(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with the axes laid out in the opposite order."""
    axes = tuple(reversed(range(tensor.dim())))
    return tensor.permute(axes).contiguous().permute(axes)


@pytest.mark.parametrize("layout", [as_slice, as_transposed])
@pytest.mark.parametrize("form", FORMS)
def test_scan_takes_any_strides(form, layout):
    inputs, start = make_inputs(), normal(2, 4, 3, 5, seed=9)
    expected = FORMS[form](*inputs, chunk_size=8, initial_state_bhpn=start)
    found = FORMS[form](*map(layout, inputs), chunk_size=8, initial_state_bhpn=layout(start))
    for a, b in zip(found, expected):
        assert relative_error(a, b) < FLOAT64_BOUND


@pytest.mark.parametrize("layout", [as_slice, as_transposed])
@pytest.mark.parametrize("step", STEPS)
def test_step_takes_any_strides(step, layout):
    x, dt, A, B, C, D = make_inputs()
    start = normal(2, 4, 3, 5, seed=9)
    arguments = (x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D)
    expected_state, state = start.clone(), layout(start)
    expected = STEPS[step](expected_state, *arguments)
    y = STEPS[step](state, *map(layout, arguments))
    assert relative_error(y, expected) < FLOAT64_BOUND
    assert relative_error(state, expected_state) < FLOAT64_BOUND


@pytest.mark.parametrize("dt_scale", [1e2, 1e4, 1e30])
@pytest.mark.parametrize("form", FORMS)
def test_strong_decay_stays_finite(form, dt_scale):
    """exp of minus thousands is 0, never inf * 0: outputs, states and gradients are finite.

    And right, up to steps of dt * A = -1e4: sums over a chunk do not lose the weak steps between.
    """
    x, dt, A, B, C, D = make_inputs(l=20, dtype=torch.float32)
    dt[:, ::2] *= dt_scale
    x = x / dt.clamp(min=1)[..., None]  # keeps x * dt, which is not at issue, in range
    leaves = [t.requires_grad_() for t in (x, dt, A, B, C, D)]
    y, state = FORMS[form](*leaves, chunk_size=8, initial_state_bhpn=normal(2, 4, 3, 5, seed=9))
    assert y.isfinite().all() and state.isfinite().all()
    (y.sum() + state.sum()).backward()
    for leaf in leaves:
        assert leaf.grad.isfinite().all()
    if dt_scale <= 1e4:
        exact, _ = ssd_recurrent(
            *(t.detach().double() for t in leaves), initial_state_bhpn=normal(2, 4, 3, 5, seed=9)
        )
        assert relative_error(y.detach(), exact) < 1e-5  # 80 roundoffs of float32


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("packed", [False, True], ids=["one_document", "packed"])
def test_gradients(form, packed):
    inputs = make_inputs(b=1, l=5, h=2, p=2, g=1, n=2)
    start = normal(1, 2, 2, 2, seed=9)
    seq_idx = torch.tensor([[0, 0, 1, 1, 1]]) if packed else None

    def run(x, dt, A, B, C, D, start):
        return FORMS[form](
            x, dt, A, B, C, D, chunk_size=3, initial_state_bhpn=start, seq_idx_bl=seq_idx
        )

    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in (*inputs, start)])


DECAYS = {
    "as_trained": lambda noise: torch.nn.functional.softplus(noise - 2),
    "wide": lambda noise: torch.exp(2 * noise - 2),
    "strong_then_weak": lambda noise: torch.where(
        (torch.arange(noise.shape[1]) % 128 < 100)[:, None], 20.0, 0.005 * noise.exp()
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("form", ["recurrent", "chunked", "scan"])
def test_rounding_is_at_most_twice_that_of_transformers(form, decay, dtype):
    """Chunks of 128, as released. A weak decay after strong ones is where sums cancel."""
    b, l, h, p, g, n = 2, 300, 4, 16, 2, 24
    x, _, A, B, C, D = make_inputs(b, l, h, p, g, n, seed=3)
    x, B, C = (t.to(dtype) for t in (x, B, C))
    dt, A, D = DECAYS[decay](normal(b, l, h, seed=8)).float(), A.float(), D.float()
    exact_y, exact_state = ssd_recurrent(*(t.double() for t in (x, dt, A, B, C, D)))
    y, state = FORMS[form](x, dt, A, B, C, D, chunk_size=128)
    witness_y, witness_state = mamba2_chunk_scan(
        x, dt, A, B, C, chunk_size=128, D=D, return_final_states=True
    )
    assert y.dtype == dtype and state.dtype == torch.float32
    assert rms_error(y, exact_y) <= 2 * rms_error(witness_y.to(dtype), exact_y)
    assert rms_error(state, exact_state) <= 2 * rms_error(witness_state, exact_state)


@pytest.mark.parametrize("form", FORMS)
def test_wrong_shapes_are_refused(form):
    x, dt, A, B, C, D = make_inputs()
    wrong = {
        "dt": (x, dt[:, :-1], A, B, C, D),
        "A": (x, dt, A[:-1], B, C, D),
        "B": (x, dt, A, B[..., :-1], C, D),
        "groups": (x[:, :, :3], dt[:, :, :3], A[:3], B, C, D[:3]),
        "D": (x, dt, A, B, C, D[:-1]),
        "empty": (x[:, :0], dt[:, :0], A, B[:, :0], C[:, :0], D),
    }
    for arguments in wrong.values():
        with pytest.raises(AssertionError):
            FORMS[form](*arguments)
    with pytest.raises(AssertionError):
        FORMS[form](x, dt, A, B, C, D, initial_state_bhpn=normal(2, 4, 5, 3, seed=9))
    with pytest.raises(AssertionError):
        FORMS[form](x, dt, A, B, C, D, seq_idx_bl=torch.zeros(2, 16, dtype=torch.int64))


class LiveMemory(TorchDispatchMode):
    """Bytes of tensors that operators made and that are alive: the peak, and the largest one."""

    def __init__(self, inputs):
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in inputs}
        self.alive, self.peak, self.largest = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
        for leaf in tree_leaves(out):
            storage = leaf.untyped_storage() if isinstance(leaf, torch.Tensor) else None
            if storage is not None and storage.data_ptr() not in self.known:
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self.largest = max(self.largest, storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def memory_of_scan(l, chunk_size, *, b=1, h=16, p=8, g=1, n=64):
    inputs = make_inputs(b, l, h, p, g, n, dtype=torch.float32)
    with LiveMemory(inputs) as memory, torch.no_grad():
        y, state = ssd_scan(*inputs, chunk_size=chunk_size)
    return memory, sum(t.nbytes for t in (*inputs, y, state)), y.nbytes


@pytest.mark.parametrize("chunks", [4, 8, 16, 32, 64])
def test_memory_is_linear_in_length_with_one_chunk_of_work(chunks):
    """Beside inputs and outputs, at most half their size again (the pieces of y before they are
    joined) and what one chunk needs, which a sequence of one chunk shows."""
    q = 32
    work = memory_of_scan(q, q)[0].peak
    memory, in_and_out, y_bytes = memory_of_scan(chunks * q, q)
    assert in_and_out - y_bytes + memory.peak <= 1.5 * in_and_out + work


def test_B_and_C_are_never_copied_to_the_heads():
    """With 16 heads per group, per-head B or C would be the largest tensor by far."""
    q, l, h, n = 16, 512, 16, 64
    memory, _, y_bytes = memory_of_scan(l, q, h=h, n=n)
    per_head_B = 4 * q * h * n
    assert memory.largest == y_bytes
    single, *_ = memory_of_scan(q, q, h=h, n=n)
    state, decay = 4 * h * 8 * n, 4 * h * q * q
    assert single.largest == max(state, decay) < per_head_B
