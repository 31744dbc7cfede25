from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from checkpoint.tiny_checkpoints import write_checkpoint
from models import make_config, make_model

from falcon_h1r import FalconH1Config, FalconH1ForCausalLM


@pytest.fixture(scope="session")
def config() -> FalconH1Config:
    """All multipliers differ from 1, two groups, all biases on: nothing left out goes unnoticed."""
    return make_config("all_biases", num_hidden_layers=2)


@pytest.fixture(scope="session")
def model(config) -> FalconH1ForCausalLM:
    """bfloat16, with float32 A_log, D and dt_bias."""
    return make_model(config, dtype=torch.bfloat16)


@pytest.fixture(scope="session")
def _pristine(model, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pristine")
    write_checkpoint(root / "single", model)
    write_checkpoint(root / "sharded", model, shards=3)
    return root


@pytest.fixture
def single(_pristine, tmp_path) -> Path:
    """A folder with one model.safetensors; the test may damage it."""
    return Path(shutil.copytree(_pristine / "single", tmp_path / "single"))


@pytest.fixture
def sharded(_pristine, tmp_path) -> Path:
    """A folder with three shards and an index; the test may damage it."""
    return Path(shutil.copytree(_pristine / "sharded", tmp_path / "sharded"))
