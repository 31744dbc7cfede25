"""Compiled functions called again as the launches of their kernels. Truth: the functions, eager."""

import pytest
import torch
from compiler import needs_compiler
from torch import Tensor

from falcon_h1r.cpu import launches
from falcon_h1r.cpu.launches import Replay, inductor

pytestmark = needs_compiler
WEIGHTS = [
    torch.randn(40, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
    for i in range(3)
]


def in_loops(x: Tensor, weight: Tensor, state: Tensor) -> Tensor:
    """Several buffers, two of one shape; the state changes in place."""
    y, z = ((part * x).sum(-1, keepdim=True) for part in (weight, weight.mT))
    state.add_(y.mT)
    return (x + (weight * state).sum(0) + (y * z.flip(0)).mT).tanh()


def of_a_library(x: Tensor, weight: Tensor, state: Tensor) -> Tensor:
    state.add_(1)
    return (x @ weight + state).tanh()


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()


@pytest.fixture
def planned(monkeypatch):
    """For each recorded call how many kernels it launches, None if it asks for something else."""
    found, plan = [], launches._launches

    def noted(*arguments):
        result = plan(*arguments)
        found.append(None if result is None else len(result[0]))
        return result

    monkeypatch.setattr(launches, "_launches", noted)
    return found


def compiled(function):
    return torch.compile(function, backend=inductor, fullgraph=True, dynamic=False)


def run(calls, x: Tensor, states: list[Tensor]) -> Tensor:
    for call, weight, state in zip(calls, WEIGHTS, states):
        x = call(x, weight, state)
    return x


def states() -> list[Tensor]:
    return [torch.zeros(1, 40, dtype=torch.float64) for _ in WEIGHTS]


def inputs(count: int) -> list[Tensor]:
    return list(
        torch.randn(count, 1, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    )


def spoil(replay: Replay) -> None:
    """No call may read what an earlier one left in the buffers, the chain's last output aside."""
    for buffers in replay._buffers:
        for tensor in buffers.values():
            tensor.fill_(torch.nan)


CHAINS = {
    "loops": ([in_loops] * 3, [1, 1, 1]),
    "a library's": ([of_a_library] * 3, [None] * 3),
    "both": ([in_loops, of_a_library, in_loops], [1, None, 1]),
}


@pytest.mark.parametrize("chain", CHAINS)
@torch.no_grad()
def test_chains_of_calls(chain, planned):
    functions, kernels = CHAINS[chain]
    true, held, replay = states(), states(), Replay()
    forms = [compiled(function) for function in functions]
    recorded = [
        lambda x, *arguments, form=form: replay.record(form, x, *arguments) for form in forms
    ]
    given = inputs(4)
    for step, x in enumerate(given):
        expected = run(functions, x, true)
        if step == 0:
            found = run(recorded, x, held)
        else:
            spoil(replay)
            found = replay.play(x)
        assert replay.whole and all(map(torch.equal, given, inputs(4)))  # left as they were
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(held, true)
        assert replay.owns(found) == (step > 0 and kernels[-1] is not None)
    assert planned == kernels


@torch.no_grad()
def test_each_call_reads_one_buffer_and_writes_another():
    """A call whose output depends on all of its input must not write over what it reads."""

    def reversed_sum(x: Tensor, weight: Tensor, state: Tensor) -> Tensor:
        return x.flip(-1) + state

    form, replay, held = (
        compiled(reversed_sum),
        Replay(),
        [torch.randn(1, 40, dtype=torch.float64) for _ in WEIGHTS],
    )
    first, second = inputs(2)
    run([lambda *arguments: replay.record(form, *arguments)] * 3, first, held)
    found = replay.play(second)
    torch.testing.assert_close(found, run([reversed_sum] * 3, second, held))


@torch.no_grad()
def test_tensors_change_and_numbers_stay():
    """A view of a tensor follows its content; a length is part of what was recorded."""

    def part(x: Tensor, weight: Tensor, reach: Tensor) -> Tensor:
        return x + weight[: len(reach)].sum(0)

    form, x, weight = compiled(part), torch.zeros(1, 40, dtype=torch.float64), WEIGHTS[0].clone()
    for length in (7, 11):
        reach, replay = torch.empty(40)[:length], Replay()
        torch._dynamo.mark_dynamic(reach, 0)
        replay.record(form, x, weight, reach)
        for _ in range(2):
            weight.mul_(1.5)
            torch.testing.assert_close(replay.play(x), part(x, weight, reach))


@torch.no_grad()
def test_what_is_no_graph_is_not_recorded():
    replay = Replay()
    out = replay.record(
        in_loops,
        torch.ones(1, 40, dtype=torch.float64),
        WEIGHTS[0],
        torch.zeros(1, 40, dtype=torch.float64),
    )
    torch.testing.assert_close(
        out,
        in_loops(
            torch.ones(1, 40, dtype=torch.float64),
            WEIGHTS[0],
            torch.zeros(1, 40, dtype=torch.float64),
        ),
    )
    assert not replay.whole


@torch.no_grad()
def test_an_error_while_recording_leaves_nothing_watching():
    def refuses(x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Replay().record(refuses, torch.ones(1, 40, dtype=torch.float64))
    assert not hasattr(launches._watching, "calls")
