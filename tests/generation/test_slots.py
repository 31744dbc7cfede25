"""Who gets a row, when, and what a row costs: histories on a model that says what its rows hold."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_model import CONFIG, VOCAB, MemoryModel, garble_free_rows, said

from falcon_h1r.cost import kv_bytes, state_bytes
from falcon_h1r.cpu.compiled import ROOM
from falcon_h1r.generation import Engine, SamplingParams
from falcon_h1r.generation import slots as slots_module
from falcon_h1r.generation.slots import Slots, plan

STATE = sum(state_bytes(CONFIG, torch.float32).values())
ROW = STATE + kv_bytes(CONFIG, ROOM + 1, torch.float32)  # of up to ROOM tokens


def ids(length: int, seed: int = 0) -> list[int]:
    return [(17 * seed + 5 * i + i * i) % VOCAB for i in range(length)]


def params(new: int = 5, n: int = 1, stops=(), **changes) -> SamplingParams:
    return SamplingParams(max_new_tokens=new, n=n, stop_token_ids=stops, **changes)


def run(engine) -> list:
    steps = []
    for step in engine:
        garble_free_rows(engine)
        steps.append(step)
        assert len(steps) < 10_000, "does not end"
    return steps


class History:
    """An engine, what it was asked, and what must be true after every step."""

    def __init__(self, **options):
        self.model = MemoryModel()
        self.engine = Engine(self.model, **options)
        self.most = options["max_rows"]
        self.budget, self.fixed = options.get("memory_budget"), options.get("fixed_width", False)
        self.chunk = options.get("prefill_chunk", 512)
        self.asked: dict[int, tuple] = {}  # number: prompt, new tokens, stops
        self.queue: list[int] = []  # who has never run, in order
        self.told: dict[int, list[int]] = {}
        self.ended: dict[int, str] = {}
        self.held: list[list[int]] = []
        self.steps = 0

    def add(self, prompt, new: int, n: int, stops=()):
        try:
            numbers = self.engine.add(prompt, params(new, n, stops))
        except ValueError as error:
            tokens = -(-(len(prompt) + new - 1) // ROOM) * ROOM + 1
            row = STATE + kv_bytes(CONFIG, tokens, torch.float32)
            assert self.budget is not None and "memory_budget is" in str(error)
            assert self.budget < row * (self.most + 1 if self.fixed else 1)
            return
        for number in numbers:
            self.asked[number] = (prompt, new, stops)
            self.queue.append(number)
            self.told[number] = []

    def step(self) -> bool:
        before, decoded = self.model.read, len(self.model.widths)
        step = self.engine.step()
        garble_free_rows(self.engine)
        if step is None:
            assert not self.queue and len(self.ended) == len(self.asked)
            return False
        assert step.number == self.steps
        self.steps += 1
        read = self.model.read - before
        assert read <= (self.chunk or 10**9)
        came = step.traces.tolist()
        assert len(set(came)) == len(came) <= self.most
        assert came or read, "a step in which nothing happened"
        new = [number for number in came if not self.told[number]]
        assert new == self.queue[: len(new)], "not first come, first served"
        del self.queue[: len(new)]
        going = [number for number in self.told if self.told[number] and number not in self.ended]
        assert sorted(came) == sorted({*going, *new}), "a trace that runs has a token in each step"
        if len(self.model.widths) > decoded and self.fixed:
            assert self.model.widths[-1] == self.most
        for number, position, token in zip(came, step.positions.tolist(), step.tokens.tolist()):
            assert position == len(self.told[number])
            self.told[number].append(token)
            prompt, most, stops = self.asked[number]
            over = token in stops or len(self.told[number]) == most
            assert (number in step.finished) == over
            if over:
                self.ended[number] = step.finished[number]
                assert step.finished[number] == ("stop" if token in stops else "length")
        if self.budget is not None:
            assert self.model.most_held <= self.budget
        return True

    def end(self, number: int):
        self.engine.end([number], "by hand")
        if number not in self.ended:
            self.ended[number] = "by hand"
            if number in self.queue:
                self.queue.remove(number)

    def hold(self, prompt):
        self.engine.hold(prompt)
        self.held.append(prompt)

    def release(self):
        if self.held:
            self.engine.release(self.held.pop(0))

    def check(self):
        for number, (prompt, new, stops) in self.asked.items():
            whole = said(prompt, new, stops)
            cut = self.ended[number] == "by hand"
            assert self.told[number] == (whole[: len(self.told[number])] if cut else whole)
            out = self.engine.pop(number)
            assert out.tokens.tolist() == self.told[number] and out.reason == self.ended[number]
            assert out.prompt_tokens == len(prompt) and out.logprobs is None and out.text is None


def play(seed: int, events: int = 40) -> History:
    """A random history of 4 prompts, one longer than a chunk, two that need longer rows."""
    chance = random.Random(seed)
    prompts = [ids(3, 1), ids(1, 2), ids(11, 3), ids(70, 4)]
    options = {
        "max_rows": chance.randint(1, 5),
        "prefill_chunk": chance.choice([None, 1, 2, 3, 7]),
        "fixed_width": chance.random() < 0.3,
    }
    if chance.random() < 0.6:
        options["memory_budget"] = int(ROW * chance.uniform(1.0, 9.0))
    history = History(**options)
    for _ in range(events):
        act = chance.choices(("add", "step", "end", "hold", "release"), (4, 9, 1, 1, 1))[0]
        if act == "add":
            new = chance.choice([1, 2, 5, 9, 30, 90])
            stops = tuple(range(0, VOCAB, 9)) if chance.random() < 0.4 else ()
            history.add(chance.choice(prompts), new, chance.choice([1, 1, 2, 5]), stops)
        elif act == "step":
            for _ in range(chance.randint(1, 4)):
                history.step()
        elif act == "end" and history.asked:
            history.end(chance.choice(list(history.asked)))
        elif act == "hold":
            history.hold(chance.choice(prompts))
        elif act == "release":
            history.release()
    left = sum(len(prompt) + new for prompt, new, _ in history.asked.values()) + 10
    for _ in range(2 * left):
        if not history.step():
            break
    assert history.engine.step() is None, "a trace starves"
    history.check()
    return history


@pytest.mark.parametrize("seed", range(60))
def test_any_history_ends_and_says_what_each_trace_says_alone(seed):
    play(seed)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(100, 500, 100))
def test_many_histories(start):
    for seed in range(start, start + 100):
        play(seed, events=80)


# Prompts


@pytest.mark.parametrize("chunk", [None, 1, 3, 7])
@pytest.mark.parametrize("most", [1, 2, 5])
def test_a_prompt_is_read_once_while_a_trace_of_it_waits(most, chunk):
    """Also when those of other prompts stand between its traces, and rows have to grow."""
    model = MemoryModel()
    engine = Engine(model, max_rows=most, prefill_chunk=chunk)
    prompts = [ids(9, 1), ids(4, 2), ids(13, 3)]
    asked = {}
    for _ in range(3):
        for i, prompt in enumerate(prompts):
            for number in engine.add(prompt, params(3 + 4 * i, n=2)):
                asked[number] = (prompt, 3 + 4 * i)
    engine.step()
    for prompt in prompts:  # equal ids in another form
        (number,) = engine.add(torch.tensor(prompt, dtype=torch.int32), params(90))
        asked[number] = (prompt, 90)
    run(engine)
    assert model.read == sum(map(len, prompts))
    if chunk is not None:
        assert max(count for _, count in model.reads) == min(chunk, 13)
    for number, (prompt, new) in asked.items():
        assert engine.output(number).tokens.tolist() == said(prompt, new)
    engine.add(prompts[0])  # nobody waited meanwhile
    run(engine)
    assert model.read == sum(map(len, prompts)) + 9


def test_a_prompt_that_is_held_is_read_once_until_it_is_released():
    model = MemoryModel()
    engine = Engine(model, max_rows=2)
    prompts = [ids(6, i) for i in range(5)]
    for _ in range(2):
        for prompt in prompts:
            engine.hold(prompt)
    for _ in range(3):
        for prompt in prompts:
            engine.add(prompt, params(n=3))
        assert all(len(step.traces) in (0, 1, 2) for step in run(engine))
    assert model.read == 30
    for prompt in prompts:
        engine.release(prompt)
        engine.add(prompt, params())
    run(engine)
    assert model.read == 30
    for prompt in prompts:
        engine.release(prompt)
        with pytest.raises(ValueError, match="prompt: is not held"):
            engine.release(prompt)
    assert not engine._slots.prompts
    engine.add(prompts[0], params())
    run(engine)
    assert model.read == 36


def test_held_prompts_leave_the_rows_of_traces_free():
    """Without a budget they are rows beside max_rows, with one they are rows of it."""
    for budget, held, free in ((None, 6, 4), (5 * ROW, 3, 2)):
        engine = Engine(MemoryModel(), max_rows=4, memory_budget=budget)
        for i in range(held):
            engine.hold(ids(3, i))
            engine.add(ids(3, i), params(2))
            run(engine)
        assert len(engine._slots.prompts) == held and engine.free == free
        engine.add(ids(3, 2), params(n=9))
        assert max(len(step.traces) for step in run(engine)) == free


def test_a_piece_of_a_prompt_is_read_between_two_steps():
    """Those who run do not wait for the rest of it."""
    model = MemoryModel()
    engine = Engine(model, max_rows=3, prefill_chunk=4)
    engine.add(ids(2, 1), params(12))
    engine.add(ids(11, 2), params(3))
    steps = run(engine)
    assert [len(step.traces) for step in steps] == [1] * 3 + [2] * 3 + [1] * 6
    assert model.reads == [(0, 2), (0, 3), (3, 4), (7, 4)]
    engine = Engine(MemoryModel(), prefill_chunk=4)
    engine.add(ids(11, 2), params(3))
    steps = run(engine)
    assert [len(step.traces) for step in steps] == [0, 0, 1, 1, 1]
    empty = steps[0]
    assert empty.number == 0 and empty.finished == empty.text == {} and empty.logprobs is None


def test_a_trace_that_is_withdrawn_frees_its_prompt():
    model = MemoryModel()
    engine = Engine(model, max_rows=1, prefill_chunk=2)
    (first,) = engine.add(ids(7, 1), params())
    engine.step()
    assert engine._slots.prompts
    engine.end([first], "gone")
    assert not engine._slots.prompts and engine.step() is None
    assert engine.pop(first).reason == "gone" and model.read == 1
    engine.add(ids(7, 1), params())
    run(engine)
    assert model.read == 8


# Rows and their memory


def test_finished_rows_are_taken_at_once():
    engine = Engine(MemoryModel(), max_rows=3)
    lengths = [2, 7, 3, 4, 1, 5, 2]
    numbers = [engine.add(ids(4), params(new))[0] for new in lengths]
    steps = run(engine)
    left, expected = list(zip(numbers, lengths)), []
    running: list = []
    while left or running:
        running += [left.pop(0) for _ in range(min(3 - len(running), len(left)))]
        expected.append(sorted(number for number, _ in running))
        running = [(number, new - 1) for number, new in running if new > 1]
    assert [sorted(step.traces.tolist()) for step in steps] == expected


@given(st.integers(1, 9), st.data())
@settings(max_examples=60)
def test_leaving_moves_no_more_rows_than_ended(count, data):
    kept = sorted(data.draw(st.sets(st.integers(0, count - 1))))
    model = MemoryModel()
    table = Slots(model)
    table.resize(count + 2, ROOM)
    table.take_prompt("p")
    for row in range(count):
        table.fork("p")
        table.cache.states[:, row] = row
        table.cache.lengths[row] = row
    moved = []
    with pytest.MonkeyPatch.context() as patch:
        copy = slots_module._copy_row
        patch.setattr(slots_module, "_copy_row", lambda *a: (moved.append(a[1]), copy(*a)))
        order = table.keep(kept)
    assert sorted(order) == kept and table.count == len(kept)
    assert len(moved) <= min(count - len(kept), len(kept))
    for row, old in enumerate(order):
        assert table.cache.lengths[row] == old and bool((table.cache.states[:, row] == old).all())
        assert row == old or row in moved


def test_the_cache_grows_for_longer_traces_and_keeps_what_it_holds():
    model = MemoryModel()
    engine = Engine(model, max_rows=4)
    engine.hold(ids(5, 1))
    short = engine.add(ids(5, 1), params(40, n=2))
    engine.step()
    first = engine.plan()
    long = engine.add(ids(9, 2), params(300))
    run(engine)
    assert engine.plan().tokens == 321 > first.tokens == ROOM + 1
    for number in short:
        assert engine.output(number).tokens.tolist() == said(ids(5, 1), 40)
    assert engine.output(long[0]).tokens.tolist() == said(ids(9, 2), 300)
    engine.add(ids(5, 1), params())
    run(engine)
    assert model.read == 14


def test_under_a_budget_the_old_cache_is_gone_before_the_next_is_made():
    """A longer trace has all of the budget to itself, once the others have ended."""
    model = MemoryModel()
    budget = 6 * ROW
    engine = Engine(model, max_rows=5, memory_budget=budget)
    engine.add(ids(5, 1), params(20, n=9))
    long = (budget - STATE) // kv_bytes(CONFIG, ROOM, torch.float32) * ROOM
    engine.add(ids(5, 2), params(long - 5, n=2))
    engine.add(ids(5, 3), params(20, n=3))
    run(engine)
    assert ROW < model.most_held <= budget
    assert engine._slots.nbytes <= budget


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_plan_is_what_the_cost_formulas_say(dtype):
    for tokens, room in ((2, 65), (65, 65), (66, 129), (1000, 1025)):
        made = plan(CONFIG, dtype, tokens, 9, None)
        state, kv = sum(state_bytes(CONFIG, dtype).values()), kv_bytes(CONFIG, room, dtype)
        assert made == (9, room, state + kv, state, kv, None, "max_rows")
        row = state + kv
        for budget, rows in ((row - 1, 0), (row, 1), (9 * row - 1, 8), (9 * row, 9)):
            made = plan(CONFIG, dtype, tokens, 9, budget)
            assert made.rows == rows and made.budget == budget
            assert made.limit == ("max_rows" if rows == 9 else "memory_budget")


def test_the_cache_is_as_large_as_its_plan():
    for budget in (None, 7 * ROW, 40 * ROW):
        model = MemoryModel()
        engine = Engine(model, max_rows=8, memory_budget=budget)
        engine.add(ids(5), params(50, n=8))
        engine.step()
        made = engine.plan()
        rows = min(9, 10**9 if budget is None else budget // ROW)
        assert made.rows == rows and made.row_bytes == ROW and made.tokens == ROOM + 1
        assert model.held() == engine._slots.nbytes == made.rows * made.row_bytes
        assert engine.free == 0 and engine.plan(66).tokens == 129


def test_a_plan_says_itself_in_words():
    made = plan(CONFIG, torch.float32, 60, 9, None)
    assert str(made) == (
        f"9 rows of {ROW / 1024:.4g} KiB ({STATE} B of state, "
        f"{(ROW - STATE) / 1024:.4g} KiB of keys and values for 65 tokens), limited by max_rows"
    )
    made = plan(CONFIG, torch.float32, 1024, 9, 40_000)
    assert str(made).startswith("memory budget 39.06 KiB: 1 row of 32.")
    assert str(made).endswith("for 1,025 tokens), limited by memory_budget")


def test_few_traces_take_few_rows():
    """max_rows is what may run, not what is set aside."""
    model = MemoryModel()
    engine = Engine(model, max_rows=1000)
    engine.add(ids(5), params(20, n=3))
    engine.step()
    assert model.held() <= 4 * ROW


def test_free_counts_the_rows_that_nobody_waits_for():
    engine = Engine(MemoryModel(), max_rows=5)
    assert engine.free == 5
    numbers = engine.add(ids(5), params(3, n=3))
    assert engine.free == 2
    engine.step()
    assert engine.free == 2
    engine.end(numbers[:2], "enough")
    assert engine.free == 4
    engine.add(ids(5), params(3, n=9))
    assert engine.free == 0
    run(engine)
    assert engine.free == 5


@pytest.mark.parametrize("budget", [None, 9 * ROW, 4 * ROW, 3 * ROW, ROW])
@pytest.mark.parametrize("held", [0, 1, 2, 5])
def test_so_many_as_are_free_do_not_wait(budget, held):
    engine = Engine(MemoryModel(), max_rows=5, memory_budget=budget)
    for i in range(held):
        engine.hold(ids(5, i))
    for i in range(max(1, held)):
        engine.add(ids(5, i), params(1))
        run(engine)
    # Nine rows are no room for a cache of six and a larger one beside it.
    free, rows = engine.free, 10 if budget is None else min(6, budget // ROW)
    assert free == max(1, min(5, rows - max(1, held)))
    engine.add(ids(5, 0), params(9, n=free))
    assert engine.free == 0
    assert len(engine.step().traces) == free


def test_a_fixed_width_is_computed_in_every_step():
    model = MemoryModel()
    engine = Engine(model, max_rows=4, fixed_width=True)
    for i, new in enumerate((3, 9, 2, 6, 7, 1)):
        engine.add(ids(4, i), params(new, n=2))
    run(engine)
    assert model.widths and set(model.widths) == {4}
    model = MemoryModel()
    engine = Engine(model, max_rows=4)
    engine.add(ids(4), params(3))
    run(engine)
    assert model.widths == [1, 1]


def test_a_row_that_stays_free_does_not_outgrow_the_cache():
    """It is computed along in every step of a fixed width, and would count up."""
    engine = Engine(MemoryModel(), max_rows=2, fixed_width=True)
    for i in range(4):
        (number,) = engine.add(ids(4, i), params(50))
        assert len(list(engine)) == 50
        assert engine.pop(number).tokens.tolist() == said(ids(4, i), 50)
