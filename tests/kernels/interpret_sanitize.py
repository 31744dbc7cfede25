"""Races: what programs of one launch, or threads of one program, must not do to each other.

Programs run in any order and at once, so an element that one of them writes belongs to it alone:
no other may write it, nor read it before or after. Threads of one program meet only at barriers: an
element just stored may not be loaded before one, nor stored by another lane, be it in one store.
Atomic operations may meet each other, and nothing else. One program may read elements and then
write them in place, provided the same lane does both or a barrier lies between.
"""

from bisect import bisect_right

import numpy as np
from interpret_memory import zeros

PENDING = 1 << 22  # loads noted before they are written into an array
MANY = np.iinfo(np.int32).max  # more than one program


class _Marks:
    """What happened to the units of one region: arrays, made when first needed."""

    def __init__(self, units: int):
        self.units = units
        self.pending, self.waiting = [], 0  # loads not yet in `reader`: program, units
        self.recent, self.recent_time = [], 0  # loads since the last barrier: units, lanes
        self.written = self.updated = False
        self._arrays = {}

    def __getattr__(self, name):
        # stored, storing: time and lane of the last store; updated_at: time of the last atomic;
        # reader: the program that loaded it, or MANY; loaded, lane: time and lane of the last
        # load; scratch: lanes.
        if name not in ("stored", "storing", "updated_at", "reader", "loaded", "lane", "scratch"):
            raise AttributeError(name)
        if name not in self._arrays:
            self._arrays[name] = zeros(self.units, np.int32)
        return self._arrays[name]

    def note_loads(self) -> None:
        """Write the pending loads into `reader`."""
        for program, index in self.pending:
            before = self.reader[index]
            other = (before != 0) & (before != program)
            self.reader[index] = np.where(other, MANY, np.int32(program))
        self.pending, self.waiting = [], 0


class Sanitizer:
    """Raises MemoryFault at the first race.

    Time counts programs and barriers; a program owns a span.
    """

    def __init__(self):
        self.time = self.began = 0
        self.starts = []
        self.marks = {}

    def begin_program(self, program: int) -> None:
        self.program = program
        self.time += 1
        self.began = self.time
        self.starts.append(self.time)

    def barrier(self) -> None:
        self.time += 1

    def dot(self, flops: int) -> None:
        pass

    def _of(self, argument) -> _Marks:
        if argument.region not in self.marks:
            self.marks[argument.region] = _Marks(argument.region.units)
        return self.marks[argument.region]

    def load(self, memory, argument, index, lanes, active, itemsize) -> None:
        marks = self._of(argument)
        if marks.written:
            time = marks.stored[index]
            if time.any():
                self._not_others(memory, argument, index, time, "load", "a store")
                if (time == self.time).any():
                    at = memory.element(argument, int(index[time == self.time][0]))
                    raise memory.fault(
                        f"load of what this program stored, no barrier between: {at}"
                    )
        if marks.updated:
            self._not_others(memory, argument, index, marks.updated_at[index], "load", "an atomic")
        marks.pending.append((self.program, index))
        if marks.recent_time != self.time:
            marks.recent, marks.recent_time = [], self.time
        marks.recent.append((index, lanes, active))
        marks.waiting += index.size
        if marks.waiting > PENDING:
            marks.note_loads()

    def store(self, memory, argument, index, lanes, active, itemsize) -> None:
        marks = self._of(argument)
        lanes = _lanes(index, lanes, active)
        self._no_collision(memory, argument, index, marks)
        if marks.written:
            time = marks.stored[index]
            self._not_others(memory, argument, index, time, "store", "a store")
            wrong = (time == self.time) & (marks.storing[index] != lanes)
            if wrong.any():
                at = memory.element(argument, int(index[wrong][0]))
                raise memory.fault(f"lane stores what another stored, no barrier between: {at}")
        if marks.updated:
            self._not_others(memory, argument, index, marks.updated_at[index], "store", "an atomic")
        self._not_read(memory, argument, index, marks, "store")
        self._same_lane(memory, argument, index, lanes, marks)
        marks.stored[index], marks.storing[index] = self.time, lanes
        marks.written = True

    def atomic(self, memory, argument, index, lanes, active, itemsize) -> None:
        marks = self._of(argument)
        if marks.written:
            self._not_others(memory, argument, index, marks.stored[index], "atomic", "a store")
        self._not_read(memory, argument, index, marks, "atomic")
        marks.updated_at[index] = self.time
        marks.updated = True

    def _no_collision(self, memory, argument, index, marks) -> None:
        if (index[1:] > index[:-1]).all():
            return
        lane = np.arange(index.size, dtype=np.int32)
        marks.scratch[index] = lane
        wrong = marks.scratch[index] != lane
        if wrong.any():
            at = memory.element(argument, int(index[wrong][0]))
            raise memory.fault(f"several lanes of one store share {at}")

    def _same_lane(self, memory, argument, index, lanes, marks) -> None:
        if marks.recent_time != self.time:
            return
        for loaded, *loading in marks.recent:
            loading = _lanes(loaded, *loading)
            again = (marks.loaded[loaded] == self.time) & (marks.lane[loaded] != loading)
            marks.loaded[loaded] = self.time
            marks.lane[loaded] = loading
            marks.lane[loaded[again | (marks.lane[loaded] != loading)]] = -1  # several
        marks.recent = []
        wrong = (marks.loaded[index] == self.time) & (marks.lane[index] != lanes)
        if wrong.any():
            at = memory.element(argument, int(index[wrong][0]))
            raise memory.fault(f"lane stores what another loads, no barrier between: {at}")

    def _not_others(self, memory, argument, index, time, kind, earlier) -> None:
        wrong = (time != 0) & (time < self.began)
        if wrong.any():
            other = bisect_right(self.starts, int(time[wrong][0])) - 1
            at = memory.element(argument, int(index[wrong][0]))
            raise memory.fault(f"race: {kind} after {earlier} by program number {other}: {at}")

    def _not_read(self, memory, argument, index, marks, kind) -> None:
        marks.note_loads()
        reader = marks.reader[index]
        wrong = (reader != 0) & (reader != self.program)
        if wrong.any():
            first = int(reader[wrong][0])
            who = "several programs" if first == MANY else f"program number {first - 1}"
            at = memory.element(argument, int(index[wrong][0]))
            raise memory.fault(f"race: {kind} after a load by {who}: {at}")


def _lanes(index, lanes, active: int) -> np.ndarray:
    """The lane of each unit in `index`; None for `lanes` means that all of them are active."""
    lanes = np.arange(active) if lanes is None else lanes
    return np.repeat(lanes, index.size // active)
