"""The mark of tests that compile for the CPU: skipped where torch finds no C++ compiler."""

import pytest

from falcon_h1r.cpu import require_compiler

try:
    require_compiler()
    _reason = ""
except ValueError as error:
    _reason = str(error)
needs_compiler = pytest.mark.skipif(bool(_reason), reason=_reason)
