"""The names of the operator tables of `ops`, for the command line, which parses without torch."""

NAMES = ("reference", "torch", "inductor", "triton")
CPU_ONLY = ("inductor",)  # tables whose operators run on a CPU alone
