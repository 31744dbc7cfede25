"""What a model does inside: measures of a forward, and comparison with other implementations."""

from .doctor import Diagnosis, diagnose
from .dump import Dump, Inputs, read_dump, take_dump, write_dump
from .operator_check import TableCheck, WrongOperator, check

__all__ = [
    "Diagnosis",
    "Dump",
    "Inputs",
    "TableCheck",
    "WrongOperator",
    "check",
    "diagnose",
    "read_dump",
    "take_dump",
    "write_dump",
]
