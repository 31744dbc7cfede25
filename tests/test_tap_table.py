"""The table of taps: which multiplier acts on which tensor, who makes a tensor, its axes."""

import pytest
import torch
from models import make_config, make_model, random_ids, same_weights

from falcon_h1r.tap_table import AXES, MODEL_TAPS, MULTIPLIERS, TAPS, config_value, tap_of
from falcon_h1r.taps import record

ALL = (*MODEL_TAPS[:2], *TAPS, *MODEL_TAPS[2:])


def test_every_multiplier_of_the_config_is_in_it():
    config = make_config()
    names = {name for name in vars(config) if "multiplier" in name}
    expected = set()
    for name in names:
        value = getattr(config, name)
        many = isinstance(value, tuple)
        expected |= {f"{name}[{i}]" for i in range(len(value))} if many else {name}
    assert set(MULTIPLIERS) == expected and len(MULTIPLIERS) == 14


@pytest.fixture(scope="module")
def recorded():
    model = make_model(make_config("two_groups"), dtype=torch.float64)
    ids = random_ids(model.config, 2, 9)
    with torch.no_grad(), record(model, layers=[0]) as recording:
        model(ids)
    return model, ids, dict(recording)


@pytest.mark.parametrize("key", MULTIPLIERS)
@torch.no_grad()
def test_a_multiplier_first_shows_where_the_table_says(recorded, key):
    model, ids, before = recorded
    name, _, place = key.removesuffix("]").partition("[")
    value = 1.5 * config_value(model.config, key)
    if place:
        values = list(getattr(model.config, name))
        values[int(place)] = value
        value = tuple(values)
    changed = same_weights(model, **{name: value})
    with record(changed, layers=[0]) as after:
        changed(ids)
    moved = [tap for tap in before if not torch.equal(before[tap], after[tap])]
    assert key in tap_of(moved[0]).multipliers, (key, moved[0])


def test_every_axis_has_a_name():
    assert {axis for tap in ALL for axis in tap.axes.split()} == set(AXES)


def test_every_tensor_has_a_maker():
    for tap in ALL:
        module, what = tap.maker
        assert module and what, tap.name
    makers = {tap.name: tap.maker for tap in ALL}
    assert makers["mamba.scan.state"] == ("mamba.ssd_scan", "state")
    assert makers["self_attn.rope.k"] == ("self_attn.rope", "k")
    assert makers["self_attn.in"] == ("block", "attention_in_multiplier")
    assert makers["logits"] == ("model", "lm_head_multiplier")
    assert makers["final_layernorm"] == ("final_layernorm", "output")
