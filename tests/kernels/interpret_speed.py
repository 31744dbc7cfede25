"""Shortcuts for the interpreter: what it makes anew for every value, made once per shape.

Most of an interpreted program's time goes into the types of its values, not into their numbers.
"""

import builtins

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_stock_block_type = tl.block_type.__init__
_types = {}  # shape: what block_type holds of it
_shapes = {}  # shape: what tensor holds of it


def _sizes(shape) -> builtins.tuple[int, ...]:
    values = getattr(shape, "values", shape)
    return builtins.tuple([n.value if isinstance(n, tl.constexpr) else n for n in values])


def _block_type(self, element_ty, shape):
    key = _sizes(shape)
    if key not in _types:
        _stock_block_type(self, element_ty, shape)  # checks the shape
        _types[key] = (self.shape, self.numel)
    self.element_ty = element_ty
    self.shape, self.numel = _types[key]
    self.name = f"<{key}, {element_ty}>"


def _tensor(self, handle, type):
    key = _sizes(type.shape) if type.is_block() else ()
    if key not in _shapes:
        sizes = tl.tuple([tl.constexpr(n) for n in key])
        _shapes[key] = (sizes, tl.constexpr(int(np.prod(key))))
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _shapes[key]


def _splat(self, ret_ty, arg):
    """One number seen from every lane, not copied to it."""
    data = arg.data.reshape(-1)[:1].reshape((1,) * len(ret_ty.shape))
    return TensorHandle(np.broadcast_to(data, _sizes(ret_ty.shape)), arg.dtype.scalar)


def hasten() -> None:
    """Put the shortcuts in place."""
    tl.block_type.__init__ = _block_type
    tl.tensor.__init__ = _tensor
    InterpreterBuilder.create_splat = _splat
