"""Kernel tests run through the repaired interpreter, every launch checked for bounds and races."""

import interpret
import pytest


@pytest.fixture(scope="session", autouse=True)
def _repaired_interpreter():
    interpret.install()


@pytest.fixture(autouse=True)
def _sanitized(request, _repaired_interpreter):
    if request.node.get_closest_marker("unsanitized"):
        yield
    else:
        with interpret.sanitized():
            yield
