"""Planted faults, one kernel each, and clean kernels beside them."""

import interpret
import interpret_sanitize
import pytest
import torch
import triton
import triton.language as tl

B = tl.constexpr(32)


@triton.jit
def _copy_kernel(x_ptr, y_ptr, load_n, store_n, stride=1):
    at = tl.program_id(0) * B + tl.arange(0, B)
    x = tl.load(x_ptr + at * stride, mask=at < load_n, other=0.0)
    tl.store(y_ptr + at, x, mask=at < store_n)


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype)


def fault(words, kernel, grid, *args, **options):
    with pytest.raises(interpret.MemoryFault, match=words) as caught:
        kernel[grid](*args, **options)
    assert str(caught.value).startswith(f"kernel {kernel.__name__}, program (")
    return str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.int64])
def test_bounds(dtype):
    x, y = zeros(100, dtype=dtype), zeros(100, dtype=dtype)
    _copy_kernel[(4,)](x, y, 100, 100)
    words = fault("load outside x_ptr", _copy_kernel, (4,), x, y, 101, 100)
    assert "program (3, 0, 0)" in words and "1 of 5 lanes" in words
    assert "element offset 100 of a tensor of shape (100,)" in words
    fault("store outside y_ptr: 1 of 5 lanes", _copy_kernel, (4,), x, y, 100, 101)
    fault("28 of 32 lanes", _copy_kernel, (4,), x, y, 10**6, 100)  # a tail that is not masked


@pytest.mark.parametrize("stride", [-1, 2, 2**20])
def test_wrong_strides(stride):
    fault("load outside x_ptr", _copy_kernel, (4,), zeros(100), zeros(100), 100, 100, stride)


def test_views_within_their_storage():
    storage = zeros(4, 100)
    inner, gaps = storage[1], storage.view(-1)[::2][:100]
    _copy_kernel[(4,)](inner, storage[2], 100, 100)
    _copy_kernel[(4,)](gaps, zeros(100), 100, 100, 2)
    fault("store outside y_ptr", _copy_kernel, (4,), zeros(100), inner, 100, 101)
    fault("load outside x_ptr", _copy_kernel, (4,), inner, zeros(100), 101, 100)
    fault("element offset 100 ", _copy_kernel, (4,), storage[:1], zeros(100), 128, 100)
    words = fault("load outside x_ptr", _copy_kernel, (1,), gaps, zeros(100), 100, 100)
    assert "16 of 32 lanes, the first at element offset 1 " in words and "strides (2,)" in words


def test_columns_rows_and_repetitions():
    table = zeros(100, 8)
    column, transposed = table[:, 3], table.t()
    _copy_kernel[(4,)](column, zeros(100), 100, 100, 8)
    fault("31 of 32 lanes", _copy_kernel, (1,), column, zeros(100), 100, 100, 4 * 800)
    fault("load outside", _copy_kernel, (4,), column, zeros(100), 100, 100)
    _copy_kernel[(4,)](transposed, zeros(100), 100, 100, 8)
    _copy_kernel[(4,)](zeros(1).expand(100), zeros(100), 100, 100, 0)
    fault("31 of 32", _copy_kernel, (1,), zeros(1).expand(100), zeros(100), 100, 100)
    gaps = zeros(9)[::4].expand(50, 3)
    fault("29 of 32", _copy_kernel, (1,), gaps, zeros(100), 32, 32)
    fault("load outside", _copy_kernel, (1,), zeros(0), zeros(100), 32, 32)


@triton.jit
def _stray_kernel(x_ptr, y_ptr, distance):
    tl.store(y_ptr, tl.load(x_ptr + distance))


def test_access_that_lands_in_another_tensor():
    storage = zeros(64)
    x, y = storage[:32], storage[32:]
    _stray_kernel[(1,)](x, y, 31)
    fault("load outside x_ptr", _stray_kernel, (1,), x, y, 32)
    fault("load outside x_ptr", _stray_kernel, (1,), y, x, -1)


@triton.jit
def _select_kernel(x_ptr, y_ptr, out_ptr, n):
    at = tl.arange(0, B)
    source = tl.where(at < n, x_ptr + at, y_ptr + (at - n))
    tl.store(out_ptr + at, tl.load(source))


def test_pointers_chosen_lane_by_lane():
    x, y, out = torch.arange(8.0), torch.arange(8.0, 32.0), torch.empty(32)
    _select_kernel[(1,)](x, y, out, 8)
    assert torch.equal(out, torch.arange(32.0))
    fault("load outside x_ptr: 1 of 9", _select_kernel, (1,), x, y, out, 9)
    fault("load outside y_ptr: 1 of 25", _select_kernel, (1,), x, y, out, 7)


@triton.jit
def _made_up_kernel(out_ptr, OTHER: tl.constexpr):
    at = tl.arange(0, 4)
    if OTHER:
        address = out_ptr.to(tl.int64) + at * 4
    else:
        address = at.to(tl.int64)
    tl.store(address.to(tl.pointer_type(tl.float32)), 1.0)


def test_pointers_through_integers():
    out = zeros(4)
    _made_up_kernel[(1,)](out, True)
    assert out.tolist() == [1.0] * 4
    fault("through a pointer that is no argument's", _made_up_kernel, (1,), out, False)


@triton.jit
def _cast_kernel(x_ptr, y_ptr, n, shift):
    at = tl.arange(0, 4)
    words = (x_ptr + shift).to(tl.pointer_type(tl.int32)) + at
    tl.store(y_ptr + at, tl.load(words, mask=at < n, other=0))


def test_pointers_of_another_width():
    x, y = torch.arange(8, dtype=torch.int16), zeros(4, dtype=torch.int32)
    _cast_kernel[(1,)](x, y, 4, 0)
    assert y.tolist() == [65536, 3 * 65536 + 2, 5 * 65536 + 4, 7 * 65536 + 6]
    fault("load outside x_ptr: 1 of 4", _cast_kernel, (1,), x[:7], y, 4, 0)
    fault("misaligned load of 4 bytes at x_ptr", _cast_kernel, (1,), x, y, 3, 1)


@triton.jit
def _overlap_kernel(y_ptr, step):
    tl.store(y_ptr + tl.program_id(0) * step + tl.arange(0, B), 1.0)


def test_two_programs_store_one_element():
    _overlap_kernel[(3,)](zeros(96), 32)
    words = fault("race: store after a store", _overlap_kernel, (3,), zeros(96), 31)
    assert "program (1, 0, 0)" in words and "program number 0: y_ptr, element offset 31" in words


@triton.jit
def _shift_kernel(x_ptr, y_ptr, reads, writes, n):
    """Program p stores block p + writes of y, then loads block p + reads of x."""
    at = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y_ptr + at + writes * B, 1.0, mask=at < n)
    x = tl.load(x_ptr + at + reads * B, mask=at < n)
    tl.device_assert(x >= 0)


def test_one_program_loads_what_another_stores():
    x = zeros(256)
    _shift_kernel[(3,)](x, x[128:], 0, 0, 96)
    fault("race: load after a store by program number 0: x_ptr, element offset 32", *past(x, 0, 1))
    fault("race: store after a load by program number 0: y_ptr, element offset 32", *past(x, 1, 0))
    fault("race: store after a load by several programs", _reader_kernel, (3,), x)


def test_loads_are_remembered_when_there_are_many(monkeypatch):
    monkeypatch.setattr(interpret_sanitize, "PENDING", 40)
    x = zeros(256)
    fault("store after a load by program number 0: y_ptr, element offset 32", *past(x, 1, 0))
    fault("race: store after a load by several programs", _reader_kernel, (3,), x)
    _shift_kernel[(3,)](x, x[128:], 0, 0, 96)


def past(x, reads, writes):
    return _shift_kernel, (3,), x, x, reads, writes, 96


@triton.jit
def _reader_kernel(x_ptr):
    if tl.program_id(0) < 2:
        tl.device_assert(tl.load(x_ptr + tl.arange(0, B)) >= 0)
    else:
        tl.store(x_ptr + tl.arange(0, B), 1.0)


def test_arguments_that_overlap():
    storage = zeros(132)
    fault("race: load after a store", _copy_kernel, (3,), storage[:100], storage[32:], 96, 96)
    fault("race: store after a load", _copy_kernel, (3,), storage[32:], storage[:100], 96, 96)
    fault("lane stores what another loads", _copy_kernel, (1,), storage, storage[1:], 32, 32)
    _copy_kernel[(3,)](storage, storage, 96, 96)
    words = storage.view(torch.bfloat16)  # the same bytes in another width
    fault("lane stores what another loads", _copy_kernel, (1,), storage, words[:100], 100, 100)
    _copy_kernel[(2,)](storage[:64], words[128:], 64, 64)


@triton.jit
def _collide_kernel(y_ptr, step, n):
    lane = tl.arange(0, B)
    tl.store(y_ptr + lane * step // 2, lane.to(tl.float32), mask=lane < n)


def test_lanes_of_one_store_collide():
    _collide_kernel[(1,)](zeros(64), 2, 32)
    _collide_kernel[(1,)](zeros(64), 1, 1)
    fault("several lanes of one store share y_ptr, element", _collide_kernel, (1,), zeros(64), 1, 2)
    fault("several lanes of one store", _collide_kernel, (1,), zeros(64), 0, 32)


@triton.jit
def _through_memory_kernel(x_ptr, BARRIER: tl.constexpr):
    at = tl.arange(0, B)
    tl.store(x_ptr + at, 1.0)
    if BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr + B + at, tl.load(x_ptr + (B - 1 - at)))


def test_load_of_what_was_stored_needs_a_barrier():
    _through_memory_kernel[(1,)](zeros(64), True)
    words = "load of what this program stored, no barrier between: x_ptr, element offset 31"
    fault(words, _through_memory_kernel, (1,), zeros(64), False)


@triton.jit
def _twice_kernel(x_ptr, REVERSED: tl.constexpr, BARRIER: tl.constexpr):
    lane = tl.arange(0, B)
    tl.store(x_ptr + lane, 1.0)
    if BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr + (B - 1 - lane if REVERSED else lane), 2.0)


def test_stores_one_after_another():
    _twice_kernel[(1,)](zeros(32), False, False)
    _twice_kernel[(1,)](zeros(32), True, True)
    fault("lane stores what another stored", _twice_kernel, (1,), zeros(32), True, False)


@triton.jit
def _in_place_kernel(x_ptr, n, REVERSED: tl.constexpr, BARRIER: tl.constexpr):
    at = tl.program_id(0) * B + tl.arange(0, B)
    to = tl.program_id(0) * B + (B - 1 - tl.arange(0, B)) if REVERSED else at
    x = tl.load(x_ptr + at, mask=at < n) + 1
    if BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr + to, x, mask=to < n)


@triton.jit
def _two_steps_kernel(x_ptr):
    lane = tl.arange(0, B)
    x = tl.load(x_ptr + lane)
    tl.debug_barrier()
    x += tl.load(x_ptr + B + lane)
    tl.store(x_ptr + (B - 1 - lane), x)


@triton.jit
def _several_lanes_kernel(x_ptr, TWICE: tl.constexpr):
    lane = tl.arange(0, B)
    if TWICE:
        x = tl.load(x_ptr + B - 1 - lane) + tl.load(x_ptr + lane)
        tl.store(x_ptr + lane, x)
    else:
        tl.store(x_ptr + lane // 2, tl.load(x_ptr + lane // 2), mask=lane % 2 == 1)


def test_update_in_place():
    x = zeros(96)
    _in_place_kernel[(3,)](x, 90, False, False)
    assert x.sum() == 90
    _in_place_kernel[(3,)](x, 96, True, True)
    _two_steps_kernel[(1,)](x)
    for twice in (True, False):
        fault("lane stores what another loads", _several_lanes_kernel, (1,), x, twice)
    fault("lane stores what another loads, no b", _in_place_kernel, (3,), x, 96, True, False)


@triton.jit
def _atomic_kernel(x_ptr, y_ptr, LOAD: tl.constexpr, STORE: tl.constexpr):
    program = tl.program_id(0)
    if LOAD and program == 2:
        tl.store(y_ptr, tl.load(x_ptr))
    if STORE and program == STORE:
        tl.store(x_ptr, 0.0)
    if program < 2:
        tl.atomic_add(x_ptr + tl.arange(0, B) * 0, 1.0)


def test_atomics_meet_only_atomics():
    x, y = zeros(4), zeros(1)
    _atomic_kernel[(3,)](x, y, False, 0)
    assert x[0] == 64
    fault("load after an atomic by program number 1", _atomic_kernel, (3,), x, y, True, 0)
    fault("store after an atomic by program number 1", _atomic_kernel, (3,), x, y, False, 2)
    fault("atomic after a store by program number 1", _mixed_kernel, (3,), x, False)
    fault("atomic after a load by program number 1", _mixed_kernel, (3,), x, True)


@triton.jit
def _mixed_kernel(x_ptr, LOAD: tl.constexpr):
    if tl.program_id(0) == 1:
        if LOAD:
            tl.device_assert(tl.load(x_ptr) >= 0)
        else:
            tl.store(x_ptr, 0.0)
    if tl.program_id(0) == 2:
        tl.atomic_cas(x_ptr, 0.0, 1.0)


def test_outside_atomics():
    fault("atomic outside x_ptr", _atomic_kernel, (1,), zeros(0), zeros(1), False, 0)


@triton.jit
def _descriptor_kernel(x_ptr, y_ptr, rows):
    x = tl.make_tensor_descriptor(x_ptr, [rows, 8], [8, 1], [4, 8])
    y = tl.make_tensor_descriptor(y_ptr, [rows, 8], [8, 1], [4, 8])
    y.store([tl.program_id(0) * 4, 0], x.load([tl.program_id(0) * 4, 0]))


def test_tensor_descriptors():
    x, y = torch.randn(6, 8), torch.empty(6, 8)
    _descriptor_kernel[(2,)](x, y, 6)
    assert torch.equal(x, y)
    fault("load outside x_ptr: 16 of 24 lanes", _descriptor_kernel, (2,), x[:5], y, 7)


@triton.jit
def _host_descriptor_kernel(x, y_ptr):
    y_ptr += tl.arange(0, 4)[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(y_ptr, x.load([0, 0]))


def test_descriptors_made_by_the_host():
    x, y = torch.randn(4, 8), torch.empty(4, 8)
    descriptor = triton.tools.tensor_descriptor.TensorDescriptor.from_tensor(x, [4, 8])
    _host_descriptor_kernel[(1,)](descriptor, y)
    assert torch.equal(x, y)
    descriptor.shape = [5, 8]
    descriptor.base = x[:3]
    fault("load outside x: 8 of 32", _host_descriptor_kernel, (1,), descriptor, y)


def test_a_fault_leaves_nothing_behind():
    fault("load outside", _copy_kernel, (4,), zeros(100), zeros(100), 101, 100)
    _copy_kernel[(4,)](zeros(100), zeros(100), 100, 100)


@pytest.mark.unsanitized  # shows what the check is for
def test_without_it_nothing_is_noticed():
    storage = zeros(64)
    _copy_kernel[(1,)](torch.ones(64), storage[:16], 32, 32)
    assert storage.sum() == 32
    with interpret.sanitized():
        with interpret.sanitized():
            fault("race", _overlap_kernel, (3,), zeros(96), 31)
        fault("race", _overlap_kernel, (3,), zeros(96), 31)
    _overlap_kernel[(3,)](zeros(96), 31)
