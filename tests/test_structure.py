"""House rules a test can hold: import direction, budgets, the `kernels` name, what is shipped."""

import ast
import inspect
import re
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
    [
        "checks",
        "config_keys",
        "documents",
        "files",
        "precision",
        "presets",
        "table_names",
        "tables",
    ],
    ["json_file"],
    ["norm", "rope", "tensor_file"],
    ["attention", "chunk", "conv", "ssd", "mlp", "cache_file"],
    ["gradients", "cache", "mamba2"],
    ["operator_gradients", "scan"],
    ["block", "cpu"],
    ["ops"],
    ["checkpoint"],
    ["config"],
    ["cost", "model", "tap_table", "derived"],
    ["taps"],
    ["text"],
    ["generation"],
    ["reasoning"],
    ["training"],
    ["bench"],
    ["study"],
    ["commands"],
    ["cli"],
    ["__main__"],
]
# Pairs of files that import each other, and are to be parted.
FILE_LINES = 400
LAYER_LINES = 700
# Whole files, and what runs of them in a prefill and a step.
LAYER_ROOMS = "attention mamba2 mlp block norm rope ssd scan chunk conv cache precision ops".split()
LAYER_FILE_LINES = 1300
FRAMES_TO_SCAN = 6


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def nodes_that_run(tree: ast.AST):
    """All nodes, function bodies included, without what stands under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        yield node
        yield from nodes_that_run(node)


def file_of(module: tuple[str, ...]) -> Path | None:
    """The file of a module of falcon_h1r such as ("falcon_h1r", "text", "think")."""
    place = PACKAGE.joinpath(*module[1:])
    found = (place / "__init__.py", place.with_suffix(".py"))
    return next((file for file in found if module[:1] == ("falcon_h1r",) and file.is_file()), None)


def imported_files(path: Path) -> set[Path]:
    """Files of falcon_h1r that a file imports anywhere, function bodies included.

    With a file of another folder comes the folder's __init__.py, which Python runs before it.
    """
    package = ("falcon_h1r", *path.relative_to(PACKAGE).parts[:-1])
    modules = []
    for node in nodes_that_run(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules += [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            inner = [(*base, alias.name) for alias in node.names]
            modules += [module if file_of(module) else base for module in inner]
    files = {file_of(module) for module in modules}
    for module in modules:
        parents = [module[:length] for length in range(2, len(module))]
        files |= {file_of(parent) for parent in parents if parent != package[: len(parent)]}
    return files - {None, path}


def circles(graph: dict) -> list[list]:
    """The strongly connected parts of a graph {node: nodes} that have more than one node."""

    def reach(start) -> set:
        seen, todo = set(), [start]
        while todo:
            for node in graph.get(todo.pop(), ()):
                if node not in seen:
                    seen.add(node)
                    todo.append(node)
        return seen

    reached = {node: reach(node) for node in graph}
    parts = {
        frozenset({node, *(other for other in reached[node] if node in reached.get(other, ()))})
        for node in graph
    }
    return sorted(sorted(part) for part in parts if len(part) > 1)


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
        for target in sorted({room_of(file) for file in imported_files(path)})
        if target != room_of(path) and level_of[target] >= level_of[room_of(path)]
    ]
    assert not wrong, wrong


def test_no_file_imports_itself_by_way_of_others():
    graph = {
        str(path.relative_to(PACKAGE)): {str(f.relative_to(PACKAGE)) for f in imported_files(path)}
        for path in source_files()
    }
    assert not circles(graph), circles(graph)


def test_the_graph_sees_imports_in_functions_and_circles():
    graph = {path: imported_files(path) for path in source_files()}
    config, hub = PACKAGE / "config.py", PACKAGE / "checkpoint" / "hub.py"
    assert PACKAGE / "checkpoint" / "__init__.py" in graph[config]  # from inside a method
    assert PACKAGE / "config.py" not in graph[PACKAGE / "checkpoint" / "loader.py"]  # for types
    assert circles(graph | {hub: graph[hub] | {config}}) != circles(graph)


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


# LogProb is an operator's result and its kernel's; neither may import the other. To be renamed: the
# others.
SHARED_NAMES = set(
    "LogProb Budget Candidate Case Operator Parts Peer Plan Report Row Step Truth Verdict".split()
)


def test_a_class_name_has_one_meaning():
    places = {}
    for folder in (PACKAGE, ROOT / "kernels", ROOT / "tools", ROOT / "benchmarks"):
        for path in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef):
                    places.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    several = {name: found for name, found in places.items() if len(found) > 1}
    assert set(several) <= SHARED_NAMES, several


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


def test_frames_from_generate_to_the_loop_over_chunks():
    """`next_state` is called in each turn of the loop, by the frame that holds it."""
    depths = []

    def record(frame):
        if frame.f_code.co_name != "next_state":
            return
        frame, ours = frame.f_back, 0
        assert frame.f_code.co_name == "ssd_scan"
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
    codes = set()

    def record(frame):
        path = Path(frame.f_code.co_filename)
        if room_of(path) in LAYER_ROOMS or path == PACKAGE / "cpu" / "step.py":
            codes.add(frame.f_code)

    _run_and_record(record)
    names = {code.co_name for code in codes}
    assert {"ssd_scan", "ssd_step", "causal_conv1d_step", "decode_attention", "plan"} <= names
    lines = 0
    for code in codes:
        if not code.co_name.startswith("<"):
            lines += len(inspect.getsourcelines(code)[0])
    assert lines <= LAYER_LINES, lines


def test_lines_of_the_layers_files():
    files = [PACKAGE / f"{name}.py" for name in LAYER_ROOMS]
    lines = sum(len(file.read_text().splitlines()) for file in files)
    assert lines <= LAYER_FILE_LINES, lines


def test_only_the_cpu_room_knows_a_compiler():
    words = re.compile(r"is_compiling|torch\.library|as_buffer|torch\._dynamo|torch\._inductor")
    found = {
        room_of(path)
        for path in source_files()
        if words.search(path.read_text())
        and room_of(path) != "bench"  # which measures the compiler
    }
    assert found == {"cpu"}


def test_files_are_published_in_one_way():
    found = {
        str(path.relative_to(ROOT))
        for folder in (PACKAGE, ROOT / "tools", ROOT / "benchmarks")
        for path in folder.rglob("*.py")
        if re.search(r"os\.replace\(|\.rename\(|partial\.replace\(", path.read_text())
    }
    assert found == {"falcon_h1r/files.py"}


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
