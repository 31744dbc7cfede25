"""Kernel tests run through the repaired interpreter, every launch checked for bounds and races.

On a GPU (see tests/conftest.py) they run compiled; what tests the interpreter or the compiler, or
counts in the interpreter, is left out.
"""

import os

import interpret
import on_gpu
import pytest

DEVICE = os.environ.get("FALCON_H1R_TEST_DEVICE")
if DEVICE:
    collect_ignore_glob = ["test_interpret*", "test_sanitizer*", "test_traffic*", "test_compile*"]


@pytest.fixture(scope="session", autouse=True)
def _repaired_interpreter():
    if not DEVICE:
        interpret.install()
        yield
        return

    def left_out(*_):
        pytest.skip("looks into the interpreter")

    on_gpu.install(DEVICE)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("counted", "only"):
            patch.setattr(interpret, name, left_out)
        yield


@pytest.fixture(autouse=True)
def _sanitized(request, _repaired_interpreter):
    if DEVICE or request.node.get_closest_marker("unsanitized"):
        yield
    else:
        with interpret.sanitized():
            yield
