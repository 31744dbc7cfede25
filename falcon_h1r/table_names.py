"""The names of the operator tables of `ops`, for the command line, which parses without torch."""

NAMES = ("reference", "torch", "triton")
CPU_ONLY = ()  # tables whose operators run on a CPU alone
