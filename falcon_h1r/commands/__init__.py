"""The commands, one file each: its part of the parser, and a function that runs it."""

from . import bench, chat, convert, dissect, doctor, generate, info, parity, replay, think, walk

COMMANDS = (
    generate.add_to,
    chat.add_to,
    info.add_to,
    convert.add_to,
    bench.add_to,
    walk.add_to,
    dissect.add_to,
    parity.add_to,
    doctor.add_to,
    replay.add_to,
    think.add_to,
)
