"""What all launchers share: configurations by name, device and dtype checks, the device guard."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checks import normal
from falcon_h1r_kernels.launch import Config, check_inputs, operator, pick
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.library import CustomOpDef
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpreterBuilder

ROOT = Path(__file__).resolve().parents[2]
WIDE, NARROW = (torch.float32,), (torch.bfloat16, torch.float16)
CONFIGS = (
    Config("narrow", {"BLOCK": 1}, 4, 2, "", NARROW),
    Config("any", {"BLOCK": 2}, 8, 3, ""),
    Config("wide", {"BLOCK": 3}, 8, 1, "", WIDE),
)


def test_the_first_configuration_that_serves_is_taken():
    assert pick(CONFIGS, torch.bfloat16).name == "narrow"
    assert pick(CONFIGS, torch.float32).name == "any"
    assert pick(CONFIGS, torch.float32, "wide").options == {
        "BLOCK": 3,
        "num_warps": 8,
        "num_stages": 1,
    }
    with pytest.raises(ValueError, match=r"'narrow' for torch.float32; .* any, wide"):
        pick(CONFIGS, torch.float32, "narrow")


def test_devices_and_dtypes_are_checked(monkeypatch):
    x = normal(2)
    check_inputs("op", x, None, x.bfloat16())
    with pytest.raises(ValueError, match="op: tensors on cpu and on meta"):
        check_inputs("op", x, None, x.to("meta"))
    with pytest.raises(ValueError, match=r"op: torch.float64 is not served .* only bfloat16"):
        check_inputs("op", x.double())
    monkeypatch.setattr(InterpreterBuilder, "exact_bfloat16", False)
    with pytest.raises(ValueError, match="computes bfloat16 wrongly"):
        check_inputs("op", x, x.bfloat16())


def test_an_operator_runs_on_the_device_of_its_first_tensor(monkeypatch):
    entered = []

    class Guard:
        def __init__(self, tensor):
            self.tensor = tensor

        def __enter__(self):
            entered.append(self.tensor)

        def __exit__(self, *error):
            entered.append(None)

    monkeypatch.setattr(torch.cuda, "device_of", Guard)

    @operator("test_guard")
    def launch(x: torch.Tensor, factor: float) -> torch.Tensor:
        assert len(entered) == 1
        return x * factor

    x = normal(3)
    assert torch.equal(launch(x, 2.0), 2 * x)
    assert entered[0] is not None and entered[1] is None


@pytest.fixture
def twice():
    """An operator that writes in place, and how often it went through the dispatcher."""
    ran = []

    @operator("test_twice", mutates_args={"x"})
    def launch(x: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        x.numpy()[:] *= 2  # as a kernel writes: unseen by torch
        return x.clone() if y is None else x + y

    @launch.register_fake
    def _(x, y):
        return torch.empty_like(x)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            ran.append(function)
            return function(*args, **(kwargs or {}))

    return launch, Watch, ran


def test_plain_calls_go_past_the_dispatcher(twice, monkeypatch):
    launch, _, _ = twice
    monkeypatch.setattr(CustomOpDef, "__call__", None)
    x = normal(3)
    expected, version = 2 * x, x._version
    with torch.no_grad():
        assert torch.equal(launch(x, Parameter(torch.zeros(3))), expected)
    assert torch.equal(x, expected) and x._version > version
    with torch.inference_mode():
        launch(torch.ones(3), None)


def test_all_other_calls_do_not(twice):
    """Gradients, modes, tensors without memory, subclasses."""
    launch, Watch, ran = twice
    with Watch():
        launch(normal(3), torch.zeros(3))
    # By name: what `torch.ops` holds may be the operator of an earlier test's definition.
    assert "falcon_h1r::test_twice" in [function.name() for function in ran]
    with FakeTensorMode():
        assert type(launch(torch.empty(3), torch.empty(3))) is FakeTensor
    assert launch(torch.empty(3, device="meta"), torch.empty(3, device="meta")).is_meta
    y = torch.zeros(3, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"no autograd formula|no backward"):
        launch(normal(3), y).sum().backward()


def test_a_write_in_place_is_seen_by_autograd(twice):
    launch, _, _ = twice
    x, w = normal(3), torch.ones(3, requires_grad=True)
    product = x * w
    with torch.no_grad():
        launch(x, None)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_a_cpu_without_the_interpreter_is_refused():
    code = (
        "import torch; from falcon_h1r_kernels.rms_norm import rms_norm\n"
        "try: rms_norm(torch.ones(2, 4), torch.ones(4), 1e-5)\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": "kernels"},
    )
    assert "need a GPU, or TRITON_INTERPRET=1" in done.stdout, done.stderr
