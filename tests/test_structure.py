"""House rules a test can hold: import direction, budgets, the `kernels` name, what is shipped."""

import ast
import inspect
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from models import make_config, make_model, random_ids

from falcon_h1r.generation import SamplingParams, generate

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "falcon_h1r"

# A room may import rooms above it. A name may be a file or a folder of falcon_h1r/.
ROOMS = [
    ["inductor", "precision", "presets"],
    ["config", "norm", "rope"],
    ["attention", "conv", "ssd", "mlp", "cost"],
    ["mamba2"],
    ["block", "cache"],
    ["ops"],
    ["model", "tap_table", "derived"],
    ["taps"],
    ["int8", "onednn"],
    ["checkpoint"],
    ["text"],
    ["generation"],
    ["reasoning"],
    ["bench"],
    ["study"],
    ["commands"],
    ["cli"],
    ["__main__"],
]
# Entry points of the public surface that lead down on purpose, inside the function that is called.
DOWNWARD = {("config", "checkpoint"), ("model", "checkpoint")}
FILE_LINES = 400
LAYER_LINES = 700
FRAMES_TO_SCAN = 6


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms of falcon_h1r that a file imports anywhere, function bodies included."""
    depth = len(path.relative_to(PACKAGE).parts)
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            inside = node.level == depth or (node.module or "").split(".")[0] == "falcon_h1r"
            if not inside:
                continue
            parts = (node.module or "").removeprefix("falcon_h1r").strip(".").split(".")
            rooms |= {parts[0]} if parts[0] else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            rooms |= {a.name.split(".")[1] for a in node.names if a.name.startswith("falcon_h1r.")}
    return rooms


def source_files() -> list[Path]:
    return sorted(
        path
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py" or path.parent != PACKAGE
    )


def test_every_file_has_a_room():
    known = {name for level in ROOMS for name in level}
    assert {room_of(path) for path in source_files()} == known


def test_imports_go_one_way():
    level_of = {name: index for index, level in enumerate(ROOMS) for name in level}
    wrong = [
        f"{path.relative_to(ROOT)} imports {target}"
        for path in source_files()
        for target in sorted(imported_rooms(path) & set(level_of))
        if target != room_of(path)
        and level_of[target] >= level_of[room_of(path)]
        and (room_of(path), target) not in DOWNWARD
    ]
    assert not wrong, wrong


def test_kernels_never_import_the_model():
    for path in (ROOT / "kernels").rglob("*.py"):
        names = [
            name
            for node in ast.walk(ast.parse(path.read_text()))
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        ]
        assert not any(name.split(".")[0] == "falcon_h1r" for name in names), path


def test_no_file_is_long():
    long = {
        str(path.relative_to(ROOT)): count
        for folder in (PACKAGE, ROOT / "kernels", ROOT / "tools", ROOT / "benchmarks")
        for path in folder.rglob("*.py")
        if (count := len(path.read_text().splitlines())) > FILE_LINES
    }
    assert not long, long


def _run_and_record(record):
    """Generate two tokens with a chunked prefill and a decode step; record(frame) at each call."""
    model = make_model(make_config())
    ids = random_ids(model.config, 2, 12)

    def profiler(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            record(frame)

    sys.setprofile(profiler)
    try:
        generate(model, ids, SamplingParams(max_new_tokens=2, stop_token_ids=()))
    finally:
        sys.setprofile(None)


def test_frames_from_generate_to_the_scan():
    depths = []

    def record(frame):
        if frame.f_code.co_name != "ssd_chunked":
            return
        ours = 0
        while frame is not None:
            ours += frame.f_code.co_filename.startswith(str(PACKAGE))
            if frame.f_code.co_name == "generate":
                break
            frame = frame.f_back
        depths.append(ours)

    _run_and_record(record)
    assert depths and max(depths) <= FRAMES_TO_SCAN, depths


def test_lines_to_understand_one_layer():
    """Every function that runs in a prefill and a step of one block, cache and operators included,
    with its docstring, plus the constructors of the layer's modules."""
    model_rooms = {
        "precision",
        "norm",
        "rope",
        "attention",
        "conv",
        "ssd",
        "mamba2",
        "mlp",
        "block",
        "cache",
    }
    codes = set()

    def record(frame):
        if room_of(Path(frame.f_code.co_filename)) in model_rooms:
            codes.add(frame.f_code)

    _run_and_record(record)
    names = {code.co_name for code in codes}
    assert {"ssd_chunked", "ssd_step", "causal_conv1d_step", "decode_attention", "plan"} <= names
    lines = 0
    for code in codes:
        if not code.co_name.startswith("<"):
            lines += len(inspect.getsourcelines(code)[0])
    assert lines <= LAYER_LINES, lines


def test_importing_the_package_does_nothing_else():
    """No Triton, transformers or hub at import; no thread or gradient setting touched."""
    code = (
        "import sys, torch; before = (torch.get_num_threads(), torch.is_grad_enabled(),"
        "torch.get_default_dtype()); loaded = set(sys.modules); import falcon_h1r;"
        "new = {name.split('.')[0] for name in set(sys.modules) - loaded};"
        "assert not new & {'triton', 'transformers', 'huggingface_hub', 'tqdm'}, new;"
        "assert before == (torch.get_num_threads(), torch.is_grad_enabled(),"
        "torch.get_default_dtype())"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_name_kernels_is_left_to_its_owner():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    spec = find_spec("kernels")
    assert spec is None or spec.origin is None or ROOT not in Path(spec.origin).parents


@pytest.mark.parametrize("folder", ["tools", "benchmarks"])
def test_scripts_shadow_no_module(folder):
    """A script's folder comes first on sys.path: `inspect.py` there would break `import torch`."""
    taken = set(sys.stdlib_module_names) | {
        "kernels",
        "torch",
        "triton",
        "transformers",
        "falcon_h1r",
    }
    assert not {path.stem for path in (ROOT / folder).glob("*.py")} & taken


@pytest.mark.slow
def test_wheel_and_sdist_hold_what_they_should(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "falcon_h1r",
        "falcon_h1r_kernels",
    }
    assets = {name.rpartition("/")[2] for name in names if "assets/h1r-pico/" in name}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= assets
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r}); import falcon_h1r, falcon_h1r_kernels;"
        "assert 'site' in falcon_h1r.__file__;"
        "from falcon_h1r.cli import main; sys.exit(main(['generate', 'What is 2+3?']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and "\\boxed{5}" in done.stdout, (done.stdout, done.stderr)
    (sdist,) = tmp_path.glob("*.tar.gz")
    assert sdist.stat().st_size < 15e6


def test_the_embedded_checkpoint_is_small():
    folder = PACKAGE / "assets" / "h1r-pico"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 12e6
