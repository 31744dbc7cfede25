"""For all tests: fixed seeds, hypothesis without luck or clocks, uninitialised memory of NaN.

Triton decides at import whether a process interprets kernels or compiles them: this one interprets,
and tests of compilation start processes of their own.

    FALCON_H1R_TEST_DEVICE=cuda python -m pytest tests/kernels

runs the tests of the kernels compiled, on a GPU (tests/kernels/on_gpu.py).
"""

import functools
import os

if "FALCON_H1R_TEST_DEVICE" not in os.environ:
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from hypothesis import settings

settings.register_profile("repository", deadline=None, derandomize=True, max_examples=20)
settings.load_profile("repository")


@pytest.fixture(autouse=True, scope="session")
def terminal_that_takes_colours():
    """Whatever the tests were started from, which may say NO_COLOR or be no terminal."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TERM", "xterm-256color")
        patch.delenv("NO_COLOR", raising=False)
        yield


def pytest_configure(config):
    # Workers of pytest-xdist share the cores: with all threads in each they wait for one another.
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _poisoned_memory():
    """What `torch.empty` returns may hold anything; here it holds NaN (integers: the largest one).

    So a result that depends on memory nobody wrote cannot pass for right by finding zeros there.
    """

    def poisoned(make):
        @functools.wraps(make)
        def wrapper(*args, **kwargs):
            tensor = make(*args, **kwargs)
            if torch.compiler.is_compiling():  # a graph may not hold the fill
                return tensor
            if tensor.layout is torch.strided and not tensor.is_quantized:
                with torch.no_grad():
                    if tensor.is_floating_point() or tensor.is_complex():
                        tensor.fill_(torch.nan)
                    elif tensor.dtype is not torch.bool:
                        tensor.fill_(torch.iinfo(tensor.dtype).max)
            return tensor

        return wrapper

    # `with torch.device("meta")` lists the factory functions when first used: it must see the real
    # ones, or a 34B model built on "meta" below this fixture takes 135 GB of true memory.
    with torch.device("meta"):
        assert torch.empty(1).is_meta
    with pytest.MonkeyPatch.context() as patch:
        for owner, names in (
            (torch, ("empty", "empty_like", "empty_strided", "empty_permuted")),
            (torch.Tensor, ("new_empty", "new_empty_strided")),
        ):
            for name in names:
                patch.setattr(owner, name, poisoned(getattr(owner, name)))
        yield
