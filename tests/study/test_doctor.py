"""The doctor on planted faults: which one, how sure, and when it does not know."""

import inspect
import json
import math

import pytest
import torch
import torch.nn.functional as F
from models import load, make_config, make_model, random_ids
from tiny_cli import run, tiny_model, write_checkpoint

from falcon_h1r.commands.common import locate
from falcon_h1r.ops import TORCH
from falcon_h1r.study import diagnose
from falcon_h1r.study.adversarial import ADVERSARIAL, random_model
from falcon_h1r.study.doctor import confidence
from falcon_h1r.study.doctor_check import calibrate
from falcon_h1r.study.doctor_evidence import distance, probes, values_dtype
from falcon_h1r.study.dump import Dump, Inputs, take_dump, write_dump
from falcon_h1r.study.faults import Patient
from falcon_h1r.study.faults_list import FAULTS, find
from falcon_h1r.study.peers import TransformersPeer


@pytest.fixture(scope="module")
def model():
    return random_model(ADVERSARIAL)


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


FEW = [
    find(name)
    for name in (
        "key_multiplier dropped",
        "ssm_in_multiplier dropped",
        "ssm_in_multiplier before the norm",
        "rope interleaved",
        "D skip missing",
        "state lost between calls",
        "clamp of dt missing in decode",
        "padding enters the mixer",
        "gated norm not grouped",
        "head taken from the embedding",
    )
]


def port_of(model, *names, dtype=torch.float32):
    """A function as a user would write it."""
    patient = Patient(model, [find(name) for name in names], dtype=dtype)

    def port(input_ids, attention_mask=None, pieces=None):
        return patient(input_ids, attention_mask, pieces)

    return port


# --- two at once ---------------------------------------------------------------------------------


@pytest.mark.slow  # half a minute: the doctor tries every fault, or every two
def test_a_pair_is_found(model):
    port = port_of(model, "D skip missing", "rope interleaved")
    found = diagnose(port, model, faults=FEW)
    assert found.status == "two faults" and set(found.faults) == {
        "D skip missing",
        "rope interleaved",
    }
    assert found.confidence > 0.8 and not found.alternatives
    alone = diagnose(port, model, faults=FEW, pairs=False)
    assert alone.status == "unknown fault" and alone.faults == ()


# --- kinds of evidence ----------------------------------------------------------------------------


def test_the_port_is_given_what_it_takes(model):
    asked = []

    def port(input_ids):
        asked.append(tuple(input_ids.shape))
        return model(input_ids).detach()

    found = diagnose(port, model, faults=FEW)
    assert found.status == "no fault" and len(asked) == 1 and found.evidence == ["prefill"]
    assert found.hidden["state lost between calls"] == "needs chunked evidence"
    assert found.hidden["padding enters the mixer"] == "needs padded evidence"
    assert found.hidden["clamp of dt missing in decode"] == "needs decode evidence"
    whole = diagnose(port_of(model), model, faults=FEW)
    assert whole.status == "no fault" and not whole.hidden
    assert whole.evidence == ["prefill", "chunked", "decode", "padded"]
    assert set(inspect.signature(port_of(model)).parameters) >= {"attention_mask", "pieces"}


@pytest.mark.parametrize("name", ["padding enters the mixer", "state lost between calls"])
def test_faults_that_one_prefill_does_not_show(model, name):
    found = diagnose(port_of(model, name), model, faults=FEW)
    assert found.status == "fault" and found.faults == (name,)
    assert found.hints[name] == find(name).hint


def test_equal_faults_are_named_together_in_bfloat16(model):
    """A multiplier before the norm is one dropped, but for eps."""
    port = port_of(model, "attention_in_multiplier dropped", dtype=torch.bfloat16)
    few = [*FEW, find("attention_in_multiplier dropped")]
    few.append(find("attention_in_multiplier before the norm"))
    found = diagnose(port, model, torch.bfloat16, few)
    named = {found.faults, *found.alternatives}
    assert named == {
        ("attention_in_multiplier dropped",),
        ("attention_in_multiplier before the norm",),
    }


def test_narrow_arithmetic_is_recognised(model):
    """Ours returns float32 logits of a bfloat16 model: the doctor tries both."""
    found = diagnose(port_of(model, dtype=torch.bfloat16), model, faults=FEW, pairs=False)
    assert (found.status, found.dtype) == ("no fault", "bfloat16")
    values = torch.randn(50)
    assert values_dtype([values]) == torch.float32
    assert values_dtype([values.bfloat16().float()]) == torch.bfloat16
    assert values_dtype([values.half().float()]) == torch.float16


def test_a_dump_with_some_inner_tensors(model):
    patient = Patient(model, [find("gated norm not grouped")])
    inputs = Inputs(random_ids(model.config, 2, 30))
    names = ["layers.1.mamba.gate.out", "layers.2.self_attn.q_proj"]
    dump = take_dump(patient, patient.model, inputs, names)
    found = diagnose(dump, model, faults=FEW)
    assert found.faults == ("gated norm not grouped",) and found.evidence == ["falcon_h1r"]


def test_several_dumps_together(model):
    """A prefill that is right and a decode that is not."""
    ids = random_ids(model.config, 1, 20)
    patient = Patient(model, [find("clamp of dt missing in decode")])
    dumps = [
        Dump(given, {"logits": patient(*given)}, torch.float32, label)
        for label, given in (("a", Inputs(ids)), ("b", Inputs(ids, pieces=(10,) + (1,) * 10)))
    ]
    assert diagnose(dumps[0], model, faults=FEW).status == "no fault"
    found = diagnose(dumps, model, faults=FEW)
    assert found.faults == ("clamp of dt missing in decode",) and found.evidence == ["a", "b"]


# --- what is not in the list ----------------------------------------------------------------------


def strange(model):
    """GELU for SiLU in the MLP: no fault of the list."""

    def swiglu(gate, up, multiplier=1.0):
        return up * F.gelu(gate * multiplier)

    patient = Patient(model, ops=TORCH._replace(swiglu=swiglu))
    return patient


def test_an_unknown_fault_is_called_unknown(model):
    patient = strange(model)
    found = diagnose(lambda input_ids: patient(input_ids), model, faults=FEW)
    assert found.status == "unknown fault" and found.faults == () and not found.first_divergence
    assert "dump that holds some" in str(found)
    dump = take_dump(patient, patient.model, probes(model.config)["prefill"])
    found = diagnose(dump, model, faults=FEW, pairs=False)
    assert found.status == "unknown fault"
    assert found.first_divergence.startswith("layers.0.feed_forward.swiglu: out (")


def test_a_fault_in_one_layer_only_is_unknown(model):
    other = random_model(ADVERSARIAL)
    other.model["layers"][1].ssm_out_multiplier = 1.0
    dump = take_dump(_Plain(other), other, probes(ADVERSARIAL)["prefill"])
    found = diagnose(dump, model, faults=FEW, pairs=False)
    assert found.status == "unknown fault"
    assert found.first_divergence.startswith("layers.1.block: sum of the branches")


class _Plain:
    """`take_dump` of a model as it is."""

    def __init__(self, model):
        self.model, self.parts = model, Patient(model).parts

    def __call__(self, ids, mask=None, pieces=None, observe=None):
        with torch.no_grad(), observe(self.model):
            return self.model(ids)


def test_what_is_not_finite_is_far_and_not_an_error(model):
    def port(input_ids):
        logits = model(input_ids).detach().clone()
        logits[0, 3, 5] = math.nan
        return logits

    assert diagnose(port, model, faults=FEW, pairs=False).status == "unknown fault"
    one = torch.ones(3)
    assert distance(torch.tensor([1, math.inf, 1]), one, one) == 1e9
    nan = torch.tensor([1, math.nan, 2.0])
    assert distance(nan, nan, one) == 0
    assert distance(one * 3, one, one * 2) == 1.0 and distance(one, torch.ones(2), one) == 1e9


# --- faults planted in transformers ---------------------------------------------------------------


def drop_keys(peer):
    for layer in peer.model.layers:
        layer.self_attn.key_multiplier = 1.0


def drop_skip(peer):
    for layer in peer.model.layers:
        layer.mamba.D = torch.nn.Parameter(torch.zeros_like(layer.mamba.D))


def drop_dt(peer):
    for layer in peer.model.layers:
        vector = layer.mamba.mup_vector.clone()
        vector[..., -layer.mamba.num_heads :] = 1.0
        layer.mamba.mup_vector = vector


def flip_gate(peer):
    for layer in peer.model.layers:
        layer.mamba.norm.norm_before_gate = not layer.mamba.norm.norm_before_gate


def one_group(peer):
    for layer in peer.model.layers:
        layer.mamba.norm.n_groups = 1


def reverse_taps(peer):
    for layer in peer.model.layers:
        weight = layer.mamba.conv1d.weight
        layer.mamba.conv1d.weight = torch.nn.Parameter(weight.data.flip(-1))


def no_limit(peer):
    for layer in peer.model.layers:
        layer.mamba.time_step_limit = (0.0, math.inf)


def scale_missing(peer):
    for layer in peer.model.layers:
        layer.self_attn.scaling = 1.0


def down_missing(peer):
    for layer in peer.model.layers:
        layer.feed_forward.down_multiplier = 1.0


THERE = {
    "key_multiplier dropped": drop_keys,
    "D skip missing": drop_skip,
    "ssm_multipliers[dt] dropped": drop_dt,
    "gate and norm in the other order": flip_gate,
    "gated norm not grouped": one_group,
    "convolution taps reversed": reverse_taps,
    "clamp of dt missing": no_limit,
    "softmax scale missing": scale_missing,
    "mlp_multipliers[down] dropped": down_missing,
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", THERE)
def test_a_fault_planted_in_transformers(tmp_path, name, dtype):
    """From its logits, and from a file with some of its tensors."""
    from falcon_h1r.study.budget import rounded
    from falcon_h1r.study.dump import read_dump

    model = random_model(ADVERSARIAL, seed=2)
    narrow = rounded(model, getattr(torch, dtype))
    peer = TransformersPeer(narrow, THERE[name])
    inputs = probes(model.config)["prefill"]
    few = [*FEW, *(find(fault) for fault in THERE)]
    few = list({fault.name: fault for fault in few}.values())

    def port(input_ids):
        return peer(Inputs(input_ids))

    found = diagnose(port, model, faults=few, pairs=False)
    if (name, dtype) == ("clamp of dt missing", "bfloat16"):
        assert found.status == "no fault" and "below the noise" in found.hidden[name]
        return
    assert (found.status, found.dtype) == ("fault", dtype), str(found)
    assert name in {found.faults[0], *(faults[0] for faults in found.alternatives)}
    tensors = peer.trace(inputs)
    some = {key: tensors[key] for key in list(tensors)[::7]}
    write_dump(tmp_path / "d.safetensors", Dump(inputs, some, narrow.dtype, "transformers"))
    dump = read_dump(tmp_path / "d.safetensors", model.config)
    found = diagnose(dump, model, faults=few, pairs=False)
    assert name in {found.faults[0], *(faults[0] for faults in found.alternatives)}, str(found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_as_it_is_has_no_fault(dtype):
    from falcon_h1r.study.budget import rounded

    model = make_model(make_config(), ops=TORCH)
    peer = TransformersPeer(rounded(model, getattr(torch, dtype)))
    found = diagnose(lambda input_ids: peer(Inputs(input_ids)), model, faults=FEW)
    assert found.status == "no fault", str(found)


def test_the_known_error_of_transformers_is_found(model):
    """It forgets time_step_limit in cached steps; its right padding is no matter for logits."""
    peer = TransformersPeer(model)

    def port(input_ids, attention_mask=None, pieces=None):
        mask = None if attention_mask is None else attention_mask != 0
        return peer(Inputs(input_ids, mask, pieces))

    found = diagnose(port, model, faults=FEW)
    assert found.faults == ("clamp of dt missing in decode",), str(found)


# --- confidence, output, command ------------------------------------------------------------------


def test_confidence_follows_the_margin():
    shares = [confidence(margin) for margin in (-1.0, 0.0, 1.0, 5.0, 50.0)]
    assert shares == sorted(shares) and shares[0] == 0 and 0.9 < shares[-1] < 1


def test_calibration_counts(model):
    class Answer:
        def __init__(self, margin):
            self.margin, self.faults = margin, ("x",)

    class One:
        def __init__(self, margin, right):
            self.answer, self.right = Answer(margin), right

    cases = [One(0.05, False), *(One(5.0, True) for _ in range(8))]
    steps = dict(calibrate(cases))
    assert steps[0.0] == round(9 / 11, 4) and steps[0.1] == steps[4.0] == 0.9 and steps[8.0] == 0.5


def test_a_real_model():
    """h1r-pico in bfloat16: most of what ports forget is found from its logits."""
    pico = load(locate("h1r-pico"), dtype=torch.float32)
    few = [*FEW, find("ssm_multipliers[C] dropped"), find("embedding_multiplier dropped")]
    ids = random_ids(pico.config, 1, 40)
    for name in ("ssm_multipliers[C] dropped", "key_multiplier dropped", "D skip missing"):
        patient = Patient(pico, [find(name)], dtype=torch.bfloat16)
        dump = Dump(Inputs(ids), {"logits": patient(ids)}, torch.bfloat16)
        found = diagnose(dump, pico, faults=few, pairs=False)
        assert found.faults == (name,), str(found)
    assert "there is one group" in str(diagnose(dump, pico, pairs=False, faults=FAULTS[-40:]))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("doctor") / "tiny")


def test_the_command(capsys, checkpoint, tmp_path):
    model = tiny_model()
    ids = random_ids(model.config, 1, 24)
    for name, faults in (("good", []), ("bad", [find("B and C exchanged")])):
        logits = Patient(model, faults)(ids)
        write_dump(tmp_path / f"{name}.npz", Dump(Inputs(ids), {"logits": logits}))
    arguments = ("doctor", "--model", checkpoint, "--no-pairs", "--dump")
    status, out, err = run(capsys, *arguments, tmp_path / "good.npz")
    assert (status, err) == (0, "") and "\nno fault" in out
    status, out, _ = run(capsys, *arguments, tmp_path / "bad.npz")
    assert status == 1 and "\nfault: B and C exchanged (confidence 0." in out
    assert find("B and C exchanged").hint in out and "cannot be seen (needs padded" in out
    status, out, _ = run(capsys, *arguments, tmp_path / "bad.npz", "--json")
    document = json.loads(out)
    assert status == 1 and document["faults"] == ["B and C exchanged"]
    left = {tuple(c["faults"]): c["residual"] for c in document["candidates"]}
    assert left["B and C exchanged",] < 1e-5 < 0.01 < document["residual"]


def test_the_list(capsys):
    status, out, _ = run(capsys, "doctor", "--list")
    assert status == 0 and len(out.splitlines()) == len(FAULTS)
    status, out, _ = run(capsys, "doctor", "--list", "--json")
    assert [row["name"] for row in json.loads(out)] == [fault.name for fault in FAULTS]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--dump FILE is missing"),
        (["--dump", "missing.npz"], "no such file"),
        (["--dump", "x.npz", "--write-calibration", "c.json"], "only with --self-test"),
        (["--dump", "x.npz", "--dtype", "int8"], "invalid choice"),
    ],
)
def test_refusals(capsys, checkpoint, argv, message):
    status, out, err = run(capsys, "doctor", "--model", checkpoint, *argv)
    assert (status, out) == (2, "") and message in err and err.count("\n") == 1


def test_bad_evidence_is_refused(model):
    with pytest.raises(ValueError, match="expected logits"):
        diagnose(lambda input_ids: model(input_ids)[:, :-1].detach(), model)
    with pytest.raises(ValueError, match="holds no tensor"):
        diagnose(Dump(Inputs(random_ids(model.config, 1, 5)), {}), model)


def test_logits_with_a_graph_are_taken_as_they_are(model):
    live = random_model(ADVERSARIAL)
    assert diagnose(lambda input_ids: live(input_ids), model, faults=FEW[:2]).status == "no fault"
