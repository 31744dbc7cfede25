"""What every launcher shares: named configurations, and the checks before a launch.

A kernel's `CONFIGS` is its whole tuning space: named entries, each with the reason it is there. A
launch takes the entry that the caller names, or else the kernel's own rule on the shape, or else
the first that serves the dtype; nothing is timed or tuned behind the caller's back, so a result
never depends on the machine's mood and no tuner ever runs on live state.
"""

import functools
import inspect
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.library import CustomOpDef
from torch.nn import Parameter
from triton import knobs

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Config(NamedTuple):
    """One way to launch a kernel. `dtypes`: those it serves; `meta`: its constexpr parameters."""

    name: str
    meta: dict
    num_warps: int
    num_stages: int
    reason: str
    dtypes: tuple[torch.dtype, ...] = DTYPES

    @property
    def options(self) -> dict:
        """Everything that a launch takes by keyword."""
        return {**self.meta, "num_warps": self.num_warps, "num_stages": self.num_stages}


def pick(configs: Sequence[Config], dtype: torch.dtype, name: str = "") -> Config:
    """The configuration called `name`, or the first that serves `dtype`.

    Raises ValueError for an unknown name, or one that does not serve the dtype.
    """
    serving = [config for config in configs if dtype in config.dtypes]
    if not name:
        return serving[0]
    for config in serving:
        if config.name == name:
            return config
    known = ", ".join(config.name for config in serving)
    raise ValueError(f"no configuration {name!r} for {dtype}; there are: {known}")


# Kernels that count inside a row in int32, and how many of the last axes are a row's; the first
# axis of several is the batch, which all count in int64. Other kernels take strides of any size.
NARROW = {
    "causal_conv1d": 1,
    "causal_conv1d_step": 2,
    "conv_ssd_step": 2,
    "gated_rms_norm": 1,
    "rms_norm": 1,
    "rope": 1,
    "ssd_step": 2,
}


def operator(name: str, mutates_args: Collection[str] = ()) -> Callable:
    """Register a launcher as the operator `falcon_h1r::name`, run on its first argument's device.

    Triton launches on the current GPU, which need not be the one that holds the tensors. The first
    argument must be a tensor. Autograd through the operator raises.
    """

    def register(launch: Callable):
        @functools.wraps(launch)
        def on_its_device(first: Tensor, *rest):
            with torch.cuda.device_of(first):
                return launch(first, *rest)

        made = torch.library.custom_op(f"falcon_h1r::{name}", mutates_args=mutates_args)(
            on_its_device
        )
        made.__class__ = DirectOperator
        made.launch, made.narrow = on_its_device, NARROW.get(name, 0)
        if not mutates_args:
            made.register_autograd(functools.partial(_refuse_gradient, name))
        names = list(inspect.signature(launch).parameters)
        made.mutated = [names.index(argument) for argument in mutates_args]
        return made

    return register


def _refuse_gradient(name: str, ctx, *gradients):
    raise RuntimeError(
        f"{name}: the kernels have no backward; take gradients under another operator table (TORCH)"
    )


class DirectOperator(CustomOpDef):
    """An operator that goes past the dispatcher when nobody there has anything to do.

    Compilers, tracers, fake tensors and autograd need the registered operator. A plain call under
    `torch.no_grad` does not, and the way through it is several times the work of a launch on the
    CPU, which decides the speed of a decode step in small batches.
    """

    def __call__(self, *args):
        if not isinstance(args[0], Tensor):
            raise ValueError(f"{self._name}: {type(args[0]).__name__} is no tensor")
        if not _is_plain(args):
            if self.narrow and not torch.compiler.is_compiling():
                check_reach(self._name, args, self.narrow)
            return super().__call__(*args)
        if self.narrow:
            check_reach(self._name, args, self.narrow)
        out = self.launch(*args)
        for index in self.mutated:
            if not args[index].is_inference():
                torch.autograd.graph.increment_version(args[index])
        return out


def check_reach(operator: str, args: Sequence, axes: int) -> None:
    """Raise ValueError where an offset along the last axes of a tensor does not fit into int32."""
    for value in args:
        if isinstance(value, Tensor) and value.ndim:
            row = -min(axes, max(value.ndim - 1, 1))
            sizes, steps = value.shape[row:], value.stride()[row:]
            if sum(size * step for size, step in zip(sizes, steps)) >= 2**31:
                raise ValueError(
                    f"{operator}: sizes {tuple(sizes)} at strides {steps}; the kernels need "
                    f"channels x stride < 2^31: make the tensor contiguous"
                )


def _is_plain(args: Sequence) -> bool:
    """Whether a call is of plain tensors alone: no gradient, subclass, mode or compiler."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    grad = torch.is_grad_enabled()
    for value in args:
        if isinstance(value, Tensor) and (
            type(value) not in (Tensor, Parameter)
            or value.is_meta
            or (grad and value.requires_grad)
        ):
            return False
    return True


def check_inputs(operator: str, *tensors: Tensor | None, dtypes=DTYPES) -> None:
    """Raise ValueError unless kernels can take these tensors; None entries are passed over.

    The first tensor decides the device and must be of one of `dtypes`; others that hold real
    numbers may be of any that the kernels take. Tensors on a CPU need
    Triton's interpreter. The stock interpreter computes with the raw bits of bfloat16 and rounds
    to it by truncation, without a word, so bfloat16 is refused there unless it was repaired (the
    repair marks its builder with `exact_bfloat16`).
    """
    first = tensors[0]
    for tensor in tensors:
        if tensor is not None and tensor.device != first.device:
            raise ValueError(f"{operator}: tensors on {first.device} and on {tensor.device}")
        if tensor is first or (tensor is not None and tensor.is_floating_point()):
            served = dtypes if tensor is first else DTYPES
            if tensor.dtype not in served:
                names = ", ".join(str(dtype).removeprefix("torch.") for dtype in served)
                raise ValueError(
                    f"{operator}: {tensor.dtype} is not served by the kernels, only {names}"
                )
    if first.device.type == "cpu" and not _is_fake(first):
        if not knobs.runtime.interpret:
            raise ValueError(
                f"{operator}: Triton kernels need a GPU, or TRITON_INTERPRET=1 in the environment "
                f"to run, slowly, on a CPU"
            )
        narrow = [t for t in tensors if t is not None and t.dtype is torch.bfloat16]
        if narrow and not _interpreter_is_exact():
            raise ValueError(
                f"{operator}: Triton's interpreter computes bfloat16 wrongly; use float32"
            )


def check_rows(operator: str, name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless `tensor` is None or integers of `shape`."""
    if tensor is None:
        return
    if tensor.shape != shape or tensor.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"{operator}: {name} is {tuple(tensor.shape)} {tensor.dtype}, "
            f"expected {shape} of int64 or int32"
        )


def check_in_place(operator: str, name: str, tensor: Tensor) -> None:
    """Raise ValueError if elements of a tensor that is updated in place may share memory."""
    reach = 0  # of the axes with smaller strides: a step along the next one must pass it
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size > 1:
            if stride <= reach:
                what = "is expanded" if stride == 0 else "overlaps itself"
                raise ValueError(f"{operator}: {name} {what}, and cannot be updated in place")
            reach += (size - 1) * stride


def check_limit(operator: str, low: float, high: float) -> None:
    """Raise ValueError unless a limit of step sizes is an interval."""
    if not low <= high:
        raise ValueError(f"{operator}: dt_limit ({low}, {high}), expected the smaller bound first")


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether the stretches of memory from first to last element meet; fake tensors have none."""

    def stretch(t: Tensor) -> tuple[int, int]:
        last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))
        return t.data_ptr(), t.data_ptr() + (last + 1) * t.itemsize

    if _is_fake(a) or _is_fake(b) or not a.numel() or not b.numel():
        return False
    (a_start, a_end), (b_start, b_end) = stretch(a), stretch(b)
    return a_start < b_end and b_start < a_end


def _is_fake(tensor: Tensor) -> bool:
    """True for tensors without memory, with which launchers are compiled ahead of time."""
    return isinstance(tensor, torch._subclasses.FakeTensor) or tensor.is_meta


def _interpreter_is_exact() -> bool:
    from triton.runtime.interpreter import InterpreterBuilder

    return getattr(InterpreterBuilder, "exact_bfloat16", False)


def next_power_of_2(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least `n` and `least`."""
    return max(triton.next_power_of_2(n), least)
