"""The commands, one file each: its part of the parser, and a function that runs it."""

from . import bench, chat, generate, info

COMMANDS = (generate.add_to, chat.add_to, info.add_to, bench.add_to)
