"""The drawing of the block: every tensor and multiplier in it, and arrows that begin and end."""

import re
from pathlib import Path
from runpy import run_path
from xml.etree import ElementTree

import pytest
import torch
from models import make_config, make_model

from falcon_h1r.study.block_picture import BOXES, block_svg, multipliers_of
from falcon_h1r.study.dissect import dissect
from falcon_h1r.tap_table import AXES, MODEL_TAPS, MULTIPLIERS, TAPS, config_value


@pytest.fixture(scope="module")
def drawn():
    model = make_model(make_config("two_groups"), dtype=torch.float64)
    out = dissect(model, [1, 2, 3], branch_switches=False)
    walk = {box.tap: out.walk[f"layers.0.{box.tap}"] for box in BOXES}
    return model.config, walk


@pytest.mark.parametrize("width", [358, 760])
def test_names_axes_and_multipliers_are_in_it(drawn, width):
    config, walk = drawn
    text = block_svg(walk, config, width=width, title="a < b", paper=True)
    root = ElementTree.fromstring(text)
    assert root.get("viewBox").split()[2] == str(width) and len(text) < 200_000
    groups = {node.get("data-tap"): node for node in root.iter() if node.get("data-tap")}
    assert list(groups) and set(groups) == {box.tap for box in BOXES}
    joined = "".join(root.itertext()).replace(" ", "")
    for key in set(MULTIPLIERS) - {"lm_head_multiplier"}:
        assert f"×{key}{config_value(config, key):.3g}" in joined, key
    for box in BOXES:
        inside = "".join(groups[box.tap].itertext()).replace(" ", "")
        assert box.tap in inside.split(":", 1)[1]
        for axis, size in zip(walk[box.tap]["axes"], walk[box.tap]["shape"]):
            assert axis in "bls" or f"{axis}{size}" in inside, (box.tap, axis)
    assert len(re.findall('class="tip"', text)) >= sum(len(box.paths) for box in BOXES) - 1


def test_each_box_comes_from_boxes_before_it_by_known_taps():
    known = {tap.name for tap in (*TAPS, *MODEL_TAPS)}
    seen = {"embed_tokens"}
    for box in BOXES:
        assert {name for path in box.paths for name in path.split()} | {box.tap} <= known
        assert {path.split()[0] for path in box.paths} <= seen
        seen.add(box.tap)
    acting = [key for box in BOXES for key in box.multipliers]
    assert set(acting) == set(MULTIPLIERS) - {"lm_head_multiplier"}
    assert {axis for tap in (*TAPS, *MODEL_TAPS) for axis in tap.axes.split()} <= set(AXES)


def test_the_embedding_acts_before_the_first_layer_alone():
    config = make_config()
    assert multipliers_of(BOXES[0], config) == {"embedding_multiplier": 5.6}
    assert multipliers_of(BOXES[0], config, layer=1) == {}


def test_the_picture_in_tools_is_what_the_script_makes(tmp_path):
    path = Path(__file__).resolve().parents[2] / "tools"
    script = run_path(str(path / "study_pictures.py"))
    script["block"](tmp_path / "block.svg")
    drawn = (tmp_path / "block.svg").read_text(encoding="utf-8")
    assert drawn == (path / "pictures" / "block.svg").read_text(encoding="utf-8")
