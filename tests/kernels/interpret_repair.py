"""Repairs of Triton's interpreter, so that it computes what a GPU would.

Stock, numpy stands for every type it lacks with raw bits: bfloat16 and float8 are rounded by
truncation and then added, compared and multiplied as integers. Here they are the number types of
ml_dtypes, whose operations round each result to nearest even, so every operation is right at once.
The other repairs: tl.dot rounds float32 operands to tf32 where it would on a GPU and refuses sizes
that a GPU refuses; lanes that a load without `other` masks off hold NaN, as nothing defines them;
comparisons are booleans even when a scalar is splat; asserts fire, integer overflow among them.
"""

import dataclasses

import ml_dtypes
import numpy as np
import triton.language as tl
from triton.backends.nvidia.compiler import min_dot_size
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as stock
from triton.runtime.autotuner import Autotuner
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, ScanOps, TensorHandle

NARROW = {
    tl.bfloat16: np.dtype(ml_dtypes.bfloat16),
    tl.float8e5: np.dtype(ml_dtypes.float8_e5m2),
    tl.float8e4nv: np.dtype(ml_dtypes.float8_e4m3fn),
    tl.float8e5b16: np.dtype(ml_dtypes.float8_e5m2fnuz),
    tl.float8e4b8: np.dtype(ml_dtypes.float8_e4m3fnuz),
}
COMPARISONS = {
    np.less,
    np.less_equal,
    np.greater,
    np.greater_equal,
    np.equal,
    np.not_equal,
}
OVERFLOWING = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
POINTER = np.dtype(np.uint64)
_stock_np_dtype = stock._get_np_dtype
_np_dtypes = {}


def np_dtype(ty) -> np.dtype:
    """The numpy type of a Triton type (or of the elements of a block type)."""
    element = ty.element_ty if isinstance(ty, tl.block_type) else ty
    if isinstance(element, tl.pointer_type):
        return POINTER
    if element not in _np_dtypes:
        _np_dtypes[element] = NARROW.get(element) or _stock_np_dtype(element)
    return _np_dtypes[element]


def _raw(data: np.ndarray) -> np.ndarray:
    """`data`, or its bits where the interpreter's C++ half does not know the type."""
    return data.view(f"u{data.itemsize}") if data.dtype in NARROW.values() else data


def _fold(op, tensors, axis):
    """Combine slices along `axis` one after another; yields each running tuple of numpy arrays."""
    slices = [np.moveaxis(t.handle.data, axis, 0) for t in tensors]
    total = None
    for parts in zip(*slices):
        parts = [op.to_tensor(part, t.dtype) for part, t in zip(parts, tensors)]
        if total is None:
            total = parts
        else:
            total = op.combine_fn.fn(*total, *parts)
            total = total if isinstance(total, (tuple, tl.tuple)) else (total,)
        yield [t.handle.data.reshape(s.shape[1:]) for t, s in zip(total, slices)]


def _generic_reduce(self, tensors):
    """tl.reduce with any function: whole slices at a time (stock: element by element)."""
    shape = tensors[0].handle.data.shape
    axis = self.axis
    if axis is None:
        tensors = [self.to_tensor(t.handle.data.reshape(-1), t.dtype) for t in tensors]
        axis = 0
    *_, results = _fold(self, tensors, axis)
    if self.keep_dims:
        kept = [1 if self.axis in (None, k) else n for k, n in enumerate(shape)]
        results = [result.reshape(kept) for result in results]
    return [self.to_tensor(result, t.dtype) for result, t in zip(results, tensors)]


def _generic_scan(self, tensors):
    """tl.associative_scan with any function: whole slices at a time (stock: by element)."""
    steps = zip(*_fold(self, tensors, self.axis))
    return [self.to_tensor(np.stack(s, self.axis), t.dtype) for s, t in zip(steps, tensors)]


def _to_odd(data_f64: np.ndarray) -> np.ndarray:
    """float64 to float32, odd last bit where inexact: rounding that once more rounds but once."""
    data = data_f64.astype(np.float32)
    exact = np.isnan(data_f64) | (data == data_f64)
    data = np.where(np.abs(data) > np.abs(data_f64), np.nextafter(data, np.float32(0)), data)
    return (data.view(np.uint32) | ~exact).view(np.float32)


def convert(data: np.ndarray, to: np.dtype, toward_zero: bool = False) -> np.ndarray:
    """`data` as numpy type `to`, rounded to nearest even, or toward zero.

    float8 saturates at its largest finite value, as the conversion instructions of GPUs do.
    """
    if data.dtype in NARROW.values():
        data = data.astype(np.float32)  # exact
    if to not in NARROW.values() and not toward_zero:
        return data.astype(to)
    exact = data
    if data.dtype == np.float64 and to in NARROW.values():
        data = _to_odd(data)
    if to.itemsize == 1:
        largest = np.float32(ml_dtypes.finfo(to).max)
        data = np.clip(data.astype(np.float32), -largest, largest)
    result = data.astype(to)
    if toward_zero:
        bits = result.view(f"u{to.itemsize}")
        away = np.abs(result.astype(np.float64)) > np.abs(exact.astype(np.float64))
        result = (bits - away.astype(bits.dtype)).view(to)
    return result


def round_to_tf32(data_f32: np.ndarray) -> np.ndarray:
    """float32 with the 10 mantissa bits of tf32: to nearest, ties away from zero (cvt.rna.tf32)."""
    bits = data_f32.view(np.uint32)
    rounded = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(data_f32), rounded, data_f32)


def product(a: np.ndarray, b: np.ndarray, precision) -> np.ndarray:
    """a @ b accumulated in float32 (integers: int32, float64: float64)."""
    if a.dtype == np.float64:
        return np.matmul(a, b)
    if np.issubdtype(a.dtype, np.integer):
        return np.matmul(a.astype(np.float64), b.astype(np.float64)).astype(np.int32)  # exact
    modes = stock._ir.INPUT_PRECISION
    if a.dtype != np.float32 or precision == modes.IEEE:
        return np.matmul(a.astype(np.float32), b.astype(np.float32))
    high_a, high_b = round_to_tf32(a), round_to_tf32(b)
    if precision == modes.TF32:
        return np.matmul(high_a, high_b)
    if precision != modes.TF32x3:
        raise NotImplementedError(f"tl.dot with input_precision {precision}")
    low_a, low_b = round_to_tf32(a - high_a), round_to_tf32(b - high_b)
    return np.matmul(high_a, low_b) + np.matmul(low_a, high_b) + np.matmul(high_a, high_b)


def mask_of(mask) -> np.ndarray:
    """The lanes of a mask: a value of the interpreter or, in Triton 3.6, sometimes an array."""
    return mask if isinstance(mask, np.ndarray) else mask.data


def contiguous(handle) -> TensorHandle:
    """The same value without strides, which the atomics of Triton 3.6 overlook."""
    return TensorHandle(np.ascontiguousarray(handle.data), handle.dtype)


class Repaired:
    """Methods that replace those of InterpreterBuilder; `handle.data` is always a numpy array."""

    def get_bf16(self, value):  # absent from Triton 3.6
        return TensorHandle(np.array([value], dtype=NARROW[tl.bfloat16]), tl.bfloat16)

    def cast_impl(self, src, dst_type):
        return TensorHandle(convert(src.data, np_dtype(dst_type)), dst_type.scalar)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if tl.float8e4b15 in (src.dtype.scalar, dst_type.scalar):
            raise NotImplementedError("float8e4b15 is not repaired")
        toward_zero = rounding_mode == stock._ir.ROUNDING_MODE.RTZ
        return TensorHandle(convert(src.data, np_dtype(dst_type), toward_zero), dst_type.scalar)

    def binary_op(self, lhs, rhs, op):
        ty = lhs.dtype.scalar
        if op in COMPARISONS:
            return TensorHandle(op(lhs.data, rhs.data), tl.int1)
        return TensorHandle(op(lhs.data, rhs.data).astype(np_dtype(ty), copy=False), ty)

    def create_minnumf(self, lhs, rhs):
        return self.binary_op(lhs, rhs, np.fmin)

    def create_maxnumf(self, lhs, rhs):
        return self.binary_op(lhs, rhs, np.fmax)

    def create_clampf(self, arg, lo, hi, propagate_nans):
        if propagate_nans == stock._ir.PROPAGATE_NAN.NONE:
            return self.create_minnumf(self.create_maxnumf(arg, lo), hi)
        return self.binary_op(self.binary_op(arg, lo, np.maximum), hi, np.minimum)

    def create_fma(self, x, y, z):
        wide = [t.data.astype(np.float64) for t in (x, y, z)]
        native = getattr(stock._interpreter, "fma_fp64", None)
        if z.data.dtype == np.float64 and native is not None:
            result = native(*np.broadcast_arrays(*wide))
        else:  # the product is exact, so only the sum's last bit can be rounded twice
            result = wide[0] * wide[1] + wide[2]
        return TensorHandle(convert(result, z.data.dtype), z.dtype.scalar)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        result = product(a.data, b.data, input_precision) + d.data
        return TensorHandle(result.astype(d.data.dtype, copy=False), d.dtype.scalar)

    def create_masked_load(self, ptrs, mask, other, *options, **more):
        ty = ptrs.get_element_ty()
        dtype = np_dtype(ty)
        if other is None:
            undefined = np.nan if ty.is_floating() else 0
            data = np.full(ptrs.data.shape, undefined, dtype=dtype)
        else:
            data = other.data
        bits = _raw(data)
        loaded = stock._interpreter.load(ptrs.data, mask_of(mask), bits, bits.dtype)
        return TensorHandle(loaded.view(dtype), ty)

    def create_masked_store(self, ptrs, value, mask, *options, **more):
        return stock._interpreter.store(ptrs.data, _raw(value.data), mask_of(mask))

    def create_atomic_rmw(self, op, ptr, val, mask, sem, scope):
        if val.data.dtype not in NARROW.values():
            ptr, val, mask = (contiguous(handle) for handle in (ptr, val, mask))
            return _stock_atomic_rmw(self, op, ptr, val, mask, sem, scope)
        if op != stock._ir.ATOMIC_OP.FADD:
            raise NotImplementedError(f"atomic {op} of {val.dtype}")
        before = np.zeros(ptr.data.shape, val.data.dtype)
        for lane in zip(*np.nonzero(mask.data)):  # one by one: lanes may share an address
            address, active = ptr.data[lane].reshape(1), np.ones(1, bool)
            zero = np.zeros(1, "u2")
            old = stock._interpreter.load(address, active, zero, zero.dtype).view(before.dtype)
            stock._interpreter.store(address, _raw(old + val.data[lane]), active)
            before[lane] = old[0]
        return TensorHandle(before, val.dtype.scalar)


_stock_atomic_rmw = InterpreterBuilder.create_atomic_rmw


def _check_overflow(self, lhs, rhs, binary_op):
    """Assert that an integer result fits its type; what a debug build does on a GPU, but faster."""
    ty = lhs.type.scalar
    if ty.int_bitwidth >= 64 or not self.builder.options.debug:
        return
    exact = OVERFLOWING[binary_op.__name__](lhs.handle.data, rhs.handle.data, dtype=np.int64)
    if ty.get_int_min_value() <= exact.min() and exact.max() <= ty.get_int_max_value():
        return
    raise OverflowError(f"{ty} overflow in {binary_op.__name__}: {exact.min()} to {exact.max()}")


def _run_once(call, quantiles=None, **options):
    """An autotuner's benchmark without a clock: every configuration runs, the first one wins."""
    call()
    return [1.0] * len(quantiles or [0])


def repair() -> None:
    """Replace what is wrong, once and for the whole process."""
    if getattr(InterpreterBuilder, "exact_bfloat16", False):
        return
    stock._get_np_dtype = np_dtype
    for name, method in vars(Repaired).items():
        if not name.startswith("__"):
            setattr(InterpreterBuilder, name, method)
    builder = stock.interpreter_builder
    builder.options = dataclasses.replace(builder.options, debug=True)
    builder.codegen_fns["min_dot_size"] = min_dot_size(None)
    ReduceOps.generic_reduce, ScanOps.generic_scan = _generic_reduce, _generic_scan
    TritonSemantic.binary_op_sanitize_overflow_impl = _check_overflow
    Autotuner.do_bench = property(lambda self: self._do_bench or _run_once)
    InterpreterBuilder.exact_bfloat16 = True
