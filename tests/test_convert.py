"""`falcon-h1r convert`: what is written is the model; what is refused; nothing half-written."""

import json

import pytest
import torch
from models import make_config, make_model, random_ids, relative_error
from tiny_cli import run, tiny_model, write_checkpoint

from falcon_h1r import FalconH1ForCausalLM
from falcon_h1r.bench import llama_library, llama_peer
from falcon_h1r.checkpoint import fold_multipliers, gguf

gguf_package = pytest.importorskip("gguf")


def load(folder, dtype=torch.float32):
    return FalconH1ForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "model")


def entries(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float64", "float16"])
def test_safetensors_in_another_dtype(capsys, tmp_path, checkpoint, dtype):
    options = ["--dtype", dtype] if dtype else []
    status, out, err = run(
        capsys, "convert", checkpoint, "--to", "safetensors", "--out", tmp_path / "new", *options
    )
    kind = getattr(torch, dtype or "float32")
    assert (status, err) == (0, "")
    found, source = load(tmp_path / "new", dtype=kind), load(checkpoint, dtype=kind)
    assert found.config == source.config
    for (name, a), (_, b) in zip(found.named_parameters(), source.named_parameters(), strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype, name
    stored = json.loads((tmp_path / "new" / "config.json").read_text())
    assert (stored.get("dtype") or stored["torch_dtype"]) == (dtype or "float32")
    assert (tmp_path / "new" / "tokenizer.json").read_bytes() == (
        checkpoint / "tokenizer.json"
    ).read_bytes()
    size = sum(path.stat().st_size for path in (tmp_path / "new").iterdir())
    assert out == (
        f"{checkpoint} -> {tmp_path / 'new'}: safetensors, {size / 1e6:,.1f} MB, "
        f"{dtype or 'float32'}\n"
    )


@torch.no_grad()
def test_folded_it_gives_the_same_logits(capsys, tmp_path, checkpoint):
    argv = ["convert", checkpoint, "--to", "safetensors", "--fold", "--out", tmp_path / "new"]
    status, out, _ = run(capsys, *argv, "--json")
    assert status == 0
    written = json.loads(out)
    assert written["notes"] == ["folded"] and written["format"] == "safetensors"
    assert written["bytes"] == sum(p.stat().st_size for p in (tmp_path / "new").iterdir())
    folded = load(tmp_path / "new")
    assert folded.config.mlp_multipliers == (1.0, 1.0) != tiny_model().config.mlp_multipliers
    ids = random_ids(folded.config, 1, 20)
    assert relative_error(folded(ids), tiny_model()(ids)) < 1e-5
    expected = fold_multipliers(load(checkpoint)).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in folded.state_dict().items())


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_gguf_holds_the_folded_weights(capsys, tmp_path, checkpoint, dtype):
    path = tmp_path / "new.gguf"
    options = ["--dtype", dtype] if dtype else []
    argv = ["convert", checkpoint, "--to", "gguf", "--no-vocabulary", "--out", path, *options]
    status, out, err = run(capsys, *argv)
    assert (status, err) == (0, "")
    gguf.save_gguf(load(checkpoint), tmp_path / "expected.gguf", getattr(torch, dtype or "float32"))
    assert path.read_bytes() == (tmp_path / "expected.gguf").read_bytes()
    size = f"{path.stat().st_size / 1e6:,.1f} MB"
    assert f"{path}: gguf, {size}, {dtype or 'float32'}, folded, without a vocabulary" in out


def test_a_narrow_checkpoint_keeps_its_dtype(capsys, tmp_path, checkpoint):
    narrow = tmp_path / "narrow"
    run(
        capsys, "convert", checkpoint, "--to", "safetensors", "--dtype", "bfloat16", "--out", narrow
    )
    path = tmp_path / "new.gguf"
    status, out, _ = run(
        capsys, "convert", narrow, "--to", "gguf", "--no-vocabulary", "--out", path
    )
    assert status == 0 and "bfloat16" in out
    kinds = {t.name: t.tensor_type.name for t in gguf_package.GGUFReader(path).tensors}
    assert kinds["blk.0.ffn_up.weight"] == "BF16" and kinds["blk.0.ssm_a"] == "F32"
    wide = tmp_path / "wide.gguf"
    argv = ["convert", narrow, "--to", "gguf", "--no-vocabulary", "--dtype", "float32"]
    run(capsys, *argv, "--out", wide)
    kinds = {t.name: t.tensor_type.name for t in gguf_package.GGUFReader(wide).tensors}
    assert kinds["blk.0.ffn_up.weight"] == "F32"
    half = tmp_path / "half"
    run(capsys, "convert", checkpoint, "--to", "safetensors", "--dtype", "float16", "--out", half)
    argv = ["convert", half, "--to", "gguf", "--no-vocabulary", "--out", tmp_path / "half.gguf"]
    status, _, err = run(capsys, *argv)
    assert status == 2 and "stored as float16: give --dtype float32 or bfloat16" in err
    assert run(capsys, *argv, "--dtype", "float32")[0] == 0


@pytest.mark.skipif(bool(llama_library.why_not()), reason=f"llama.cpp: {llama_library.why_not()}")
@torch.no_grad()
def test_llama_cpp_reads_the_file(capsys, tmp_path):
    """The embedded model: the same likeliest tokens, and logits to float32's accuracy."""
    path = tmp_path / "pico.gguf"
    assert run(capsys, "convert", "--to", "gguf", "--no-vocabulary", "--out", path)[0] == 0
    from falcon_h1r.commands.common import DEFAULT_MODEL, locate

    model = load(locate(DEFAULT_MODEL))
    ids = random_ids(model.config, 1, 30)
    peer = llama_peer.LlamaPeer(
        model, kv_dtype=torch.float32, threads=1, max_length=40, file=str(path)
    )
    try:
        found = torch.from_numpy(peer.read(ids[0].tolist(), every=True))
    finally:
        peer.close()
    assert relative_error(found, model(ids)[0]) < 1e-5


def test_a_tokenizer_goes_into_the_file_or_is_refused(capsys, tmp_path, checkpoint, monkeypatch):
    path = tmp_path / "new.gguf"
    argv = ["convert", checkpoint, "--to", "gguf", "--out", path]
    status, out, err = run(capsys, *argv)
    assert (status, out) == (2, "") and not path.exists()
    assert "none of the released Falcon-H1 tokenizers" in err and err.count("\n") == 1
    assert "with --no-vocabulary the file is written without" in err
    seen = []
    monkeypatch.setattr(
        "falcon_h1r.checkpoint.save_gguf",
        lambda model, out, dtype, folder: (seen.append(folder), out.write_bytes(b"GGUF")),
    )
    assert "with its vocabulary" in run(capsys, *argv)[1] and seen == [checkpoint]
    (checkpoint / "tokenizer.json").unlink()
    assert "without a vocabulary" in run(capsys, *argv, "--force")[1] and seen[1] is None


def test_what_exists_stays_unless_it_may_go(capsys, tmp_path, checkpoint):
    file, folder, empty = tmp_path / "x.gguf", tmp_path / "x", tmp_path / "empty"
    empty.mkdir()
    forms = {
        file: ["convert", checkpoint, "--to", "gguf", "--no-vocabulary", "--out", file],
        folder: ["convert", checkpoint, "--to", "safetensors", "--out", folder],
    }
    for path, argv in forms.items():
        assert run(capsys, *argv)[0] == 0
        before = (path / "model.safetensors" if path.is_dir() else path).read_bytes()
        status, out, err = run(capsys, *argv, "--dtype", "bfloat16")
        assert (status, out) == (2, "") and f"{path} exists; --force replaces it" in err
        held = path / "model.safetensors" if path.is_dir() else path
        assert held.read_bytes() == before
        assert run(capsys, *argv, "--dtype", "bfloat16", "--force")[0] == 0
        assert len(held.read_bytes()) < 0.8 * len(before)
    assert run(capsys, *forms[folder][:-1], empty)[0] == 0, "an empty folder is no loss"
    foreign = tmp_path / "letter.txt"
    foreign.write_text("dear reader")
    for argv in forms.values():
        status, _, err = run(capsys, *argv[:-1], foreign, "--force")
        assert status == 2 and str(foreign) in err and foreign.read_text() == "dear reader"
    dangling = tmp_path / "link"
    dangling.symlink_to(tmp_path / "nowhere")
    assert run(capsys, *forms[file][:-1], dangling)[0] == 2
    names = {"empty", "letter.txt", "link", "model", "x", "x.gguf"}
    assert set(entries(tmp_path)) == names, "nothing half-written"


def test_a_checkpoint_can_be_replaced_by_its_own_conversion(capsys, checkpoint):
    before = load(checkpoint).state_dict()
    argv = ["convert", checkpoint, "--to", "safetensors", "--out", checkpoint, "--force"]
    assert run(capsys, *argv)[0] == 0
    after = load(checkpoint).state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_a_failure_on_the_way_leaves_nothing(capsys, tmp_path, checkpoint, monkeypatch, kind):
    from falcon_h1r.checkpoint import saver

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf, "folded_value", full)
    monkeypatch.setattr(saver, "bytes_of", full)
    options = ["--no-vocabulary"] if kind == "gguf" else []
    status, out, err = run(
        capsys, "convert", checkpoint, "--to", kind, "--out", tmp_path / "new", *options
    )
    assert (status, out) == (2, "") and "No space left on device" in err
    assert entries(tmp_path) == ["model"]


def test_a_home_folder_is_meant(capsys, tmp_path, checkpoint, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    argv = ["convert", checkpoint, "--to", "safetensors", "--out", "~/new"]
    assert run(capsys, *argv)[0] == 0 and (tmp_path / "new").is_dir()
    assert "exists" in run(capsys, *argv)[2]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--out", "x"], "required: --to"),
        (["--to", "gguf"], "required: --out"),
        (["--to", "onnx", "--out", "x"], "invalid choice: 'onnx'"),
        (["--to", "gguf", "--out", "x", "--dtype", "float16"], "--dtype is float16, GGUF files"),
        (["--to", "gguf", "--out", "x", "--dtype", "float64"], "--dtype is float64, GGUF files"),
        (["--to", "gguf", "--out", "x", "--fold"], "--fold: a GGUF file is always folded"),
        (["--to", "safetensors", "--out", "x", "--no-vocabulary"], "only with --to gguf"),
        (["no/such/folder", "--to", "gguf", "--out", "x"], "no/such/folder"),
        (["--to", "gguf", "--out", "x", "--revision", "main"], "the embedded h1r-pico has none"),
        (["--to", "gguf", "--no-vocabulary", "--out", "missing/x"], "missing/x"),
    ],
)
def test_refusals(capsys, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    status, out, err = run(capsys, "convert", *argv)
    assert (status, out) == (2, "") and message in err and err.count("\n") == 1
    assert err.startswith("falcon-h1r: error: ") and not entries(tmp_path)


def test_a_model_that_gguf_cannot_carry(capsys, tmp_path):
    make_model(make_config("all_biases")).save_pretrained(tmp_path / "model")
    argv = ["convert", tmp_path / "model", "--to", "gguf", "--out", tmp_path / "x.gguf"]
    status, out, err = run(capsys, *argv)
    assert (status, out) == (2, "") and "llama.cpp has no attention_bias" in err
    assert entries(tmp_path) == ["model"]
