"""README and docs: every block runs or parses, every link leads somewhere, sizes are kept."""

import ast
import re
import shlex

import pytest
import torch
from docs.blocks import PAGES, ROOT, Runner, blocks_of, same

from falcon_h1r.cli import build_parser

NAMES = [str(path.relative_to(ROOT)) for path in PAGES]
ONE_LAYER = ROOT / "docs" / "one_layer.md"
README_LINES, README_COLUMNS, ONE_LAYER_LINES, RECIPE_LINES = 200, 160, 150, 6


@pytest.fixture
def page(tmp_path, monkeypatch):
    """Run blocks in a scratch folder, without a network; the default dtype is put back."""
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "TRITON_INTERPRET"):
        monkeypatch.setenv(name, "1")
    dtype = torch.get_default_dtype()

    def run(blocks):
        runner = Runner(tmp_path)
        for block in blocks:
            runner.run(block)

    yield run
    torch.set_default_dtype(dtype)


def runnable(name: str, slow: bool):
    """The blocks to run. Slow ones need what the quick ones before them left."""
    blocks = [block for block in blocks_of(ROOT / name) if block.runs]
    return blocks if slow else [block for block in blocks if "slow" not in block.notes]


@pytest.mark.parametrize("name", [n for n in NAMES if runnable(n, slow=False)])
def test_the_blocks_of_a_page_run(name, page):
    page(runnable(name, slow=False))


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NAMES if runnable(n, True) != runnable(n, False)])
def test_the_slow_blocks_of_a_page_run(name, page):
    page(runnable(name, slow=True))


@pytest.mark.parametrize("name", NAMES)
def test_blocks_that_do_not_run_parse(name):
    for block in blocks_of(ROOT / name):
        if block.language == "python":
            compile(block.text, block.place, "exec")
        if "not run" in block.notes:
            assert len(block.notes["not run"]) > 5, f"{block.place}: give the reason"
        for command, _ in block.commands if block.language in ("console", "shell") else ():
            parse(command, block.place)


@pytest.mark.parametrize("name", NAMES)
def test_measurements_stay_in_the_scratch_folder(name):
    """Without --out, `bench` adds to the results of the checkout."""
    blocks = [block for block in blocks_of(ROOT / name) if block.runs]
    commands = [command for block in blocks for command, _ in block.commands]
    assert all("--out" in c for c in commands if c.startswith("falcon-h1r bench"))


@pytest.mark.parametrize("name", NAMES)
def test_commands_in_the_prose_parse(name):
    for span in re.findall(r"`((?:falcon-h1r|python) [^`\n]+)`", prose_of(ROOT / name)):
        if len(span.split()) > 2 and span.split()[1] != "COMMAND":
            parse(span, name)


def prose_of(path) -> str:
    return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.S | re.M)


def parse(command: str, place: str) -> None:
    """Every command of a line goes to the parser that would get it."""
    words = shlex.split(command, comments=True)
    while words:
        end = next((i for i, w in enumerate(words) if w in ("|", "&&", ">", "<")), len(words))
        one, words = words[:end], words[end + 1 :]
        match one:
            case ["falcon-h1r", *arguments]:
                try:
                    build_parser().parse_args(arguments)
                except SystemExit as end:
                    assert not end.code, f"{place}: {command}"
            case ["python", script, *arguments] if script.endswith(".py"):
                assert (ROOT / script).is_file(), f"{place}: no {script}"
                options = {a for a in arguments if a.startswith("--") and a != "--"}
                unknown = options - strings_of(script)
                assert not unknown, f"{place}: {script} has no {unknown}"
            case ["python", "-m", "pytest", *arguments]:
                paths = [a for a in arguments if a.startswith("tests")]
                assert all((ROOT / path).exists() for path in paths), f"{place}: {paths}"


def strings_of(script: str) -> set[str]:
    """All texts in a script, and in those that define options for it."""
    folder = (ROOT / script).parent
    sources = [ROOT / script, *folder.glob("pico_*.py"), ROOT / "falcon_h1r/commands/bench.py"]
    nodes = [node for path in sources for node in ast.walk(ast.parse(path.read_text()))]
    values = [node.value for node in nodes if isinstance(node, ast.Constant)]
    return {value for value in values if isinstance(value, str)}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    path = ROOT / name
    text = path.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        if not target.startswith(("http://", "https://", "#")):
            file, _, anchor = target.partition("#")
            assert (path.parent / file).exists(), f"{name} points to {target}"
            assert not anchor or anchor in anchors(path.parent / file), f"{name} points to {target}"


def anchors(path) -> list[str]:
    """The names by which GitHub links to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return [re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings]


@pytest.mark.parametrize("name", NAMES)
def test_files_named_in_the_prose_exist(name):
    path = r"`([\w./-]+/[\w.-]+\.(?:py|md|json|jsonl|png|svg))`"
    for span in re.findall(path, prose_of(ROOT / name)):
        found = (ROOT / span).exists() or (ROOT / "falcon_h1r" / span).exists()
        assert found, f"{name} names {span}"


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= README_LINES
    assert not [line for line in lines if len(line) > README_COLUMNS]


def test_the_readme_has_one_test_command():
    text = (ROOT / "README.md").read_text()
    assert text.count("<!-- test command -->") == 1
    block = re.search(r"<!-- test command -->\n```\w*\n(.*)\n```", text)
    assert "pytest" in block[1]


def test_recipes_are_short():
    """Five recipes, each of one block of code and what it prints."""
    text = (ROOT / "README.md").read_text()
    section = re.search(r"^## Five recipes\n(.*?)^## ", text, re.S | re.M)[1]
    recipes = re.split(r"^### ", section, flags=re.M)[1:]
    assert len(recipes) == 5
    for recipe in recipes:
        code = re.findall(r"^```(?:python|console|shell)\n(.*?)^```", recipe, re.S | re.M)
        lines = [line for block in code for line in block.splitlines() if line.strip()]
        typed = [l for l in lines if l.startswith("$ ")] if "```console" in recipe else lines
        assert 1 <= len(typed) <= RECIPE_LINES, recipe


def test_one_layer_is_short_and_plain():
    """At most 150 lines of torch and safetensors make the model; only the check imports others."""
    model, check = ONE_LAYER.read_text().split("## 9. Is it right?")
    code = "".join(re.findall(r"^```python\n(.*?)^```", model, re.S | re.M))
    assert len(code.splitlines()) <= ONE_LAYER_LINES
    imported = set(re.findall(r"^(?:from|import) (\w+)", code, re.M))
    assert imported == {"json", "importlib", "pathlib", "torch", "safetensors"}
    assert "transformers" in check


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages == set(re.findall(r"\]\((\w+\.md)\)", index))


def test_every_command_is_on_the_commands_page():
    page = (ROOT / "docs" / "commands.md").read_text()
    [subparsers] = [a for a in build_parser()._actions if hasattr(a, "choices") and a.choices]
    missing = [name for name in subparsers.choices if f"## {name}" not in page]
    assert not missing


@pytest.mark.parametrize(
    "expected, printed, equal",
    [
        ("25 tokens, 100.0 tokens/s", "25 tokens, 7.5 tokens/s", True),
        ("25 tokens, 100.0 tokens/s", "26 tokens, 100.0 tokens/s", False),
        ("in 0.07 s; seed 8500; stop", "in 12.3 s; seed 1; stop", True),
        ("in 0.07 s; seed 8500; stop", "in 0.07 s; seed 8500; length", False),
        ("error 3e-07", "error 1.2e-07", True),
        ("error 3e-07", "error 3e-03", False),
        ("rms 1.237", "rms 1.236", True),
        ("rms 1.237", "rms 1.4", False),
        ("a  b", "a b", True),
        ("1,071,048", "1,071,049", False),
        ("model.py:146", "model.py:151", True),
        ("first\n...\nlast", "first\n1\n2\nlast", True),
        ("first\n...\nlast", "first\n1\n2\n", False),
        ("...\nmiddle 2\n...", "1\nmiddle 2\n3", True),
        ("...\nmiddle 2\n...", "1\nmiddle 3\n3", False),
        ("name shape 17 ...", "name shape 17 128 float32", True),
        ("name shape 17 ...", "name shape 18 128 float32", False),
    ],
)
def test_what_an_output_stands_for(expected, printed, equal):
    assert same(expected, printed) is equal
