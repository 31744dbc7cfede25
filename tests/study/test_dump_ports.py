"""The scripts that write other engines' tensors: those of a right engine are ours."""

import subprocess
import sys
from pathlib import Path

import pytest
from models import make_config, make_model, rms_error

from falcon_h1r.bench import llama_library
from falcon_h1r.bench.peers import import_error
from falcon_h1r.checkpoint import save
from falcon_h1r.study.dump import read_dump, take_dump
from falcon_h1r.study.faults import Patient

TOOLS = Path(__file__).resolve().parents[2] / "tools"
NO_LLAMA = import_error("xllamacpp") or llama_library.why_not()
if not NO_LLAMA and not import_error("llama_cpp"):
    NO_LLAMA = "llama-cpp-python is installed, whose tensors the script does not read"


@pytest.mark.parametrize(
    ("engine", "per_layer"),
    [
        ("transformers", 12),
        pytest.param(
            "llama_cpp",
            8,
            marks=pytest.mark.skipif(bool(NO_LLAMA), reason=f"llama.cpp: {NO_LLAMA}"),
        ),
    ],
)
def test_what_a_right_engine_dumps_is_ours(tmp_path, engine, per_layer):
    model = make_model(make_config())
    save(model, tmp_path / "model")
    script, out = TOOLS / f"dump_{engine}.py", tmp_path / "dump.safetensors"
    subprocess.run([sys.executable, script, tmp_path / "model", out], check=True)
    dump = read_dump(out, model.config)
    assert len(dump.tensors) == per_layer * model.config.num_hidden_layers + 1
    ours = take_dump(Patient(model), model, dump.inputs, list(dump.tensors)).tensors
    for name, tensor in dump.tensors.items():
        assert rms_error(tensor, ours[name]) < 1e-5, name
