"""What torch.compile's compiler, Inductor, is told beside the arithmetic."""

import torch
from torch import Tensor


def in_cpu_graph(tensor: Tensor) -> bool:
    """Whether this is compiled for a CPU without gradients, for which some operators have forms."""
    compiling = torch.compiler.is_compiling()
    return compiling and tensor.device.type == "cpu" and not torch.is_grad_enabled()


def as_buffer(tensor: Tensor) -> Tensor:
    """The same values; compiled, they are written to memory, in sequence, before they are used.

    Inductor computes what leads to a tensor again at each of its uses, unless it is a buffer, and
    a view of explicit strides needs one.
    """
    if not in_cpu_graph(tensor):
        return tensor
    # Not `contiguous`, which asks whether it is one: the answer would become part of the graph.
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    return tensor.as_strided(tensor.shape, tensor.stride())
