"""The rooms of the package: imports go one way, downwards."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lipsim"
# From the ground up; rooms of one level may use each other as long as no files do so in a circle.
LEVELS = (
    ("certificates", "results", "utils"),
    ("data", "teachers", "layers"),
    ("audit", "students", "datamodules"),
    ("metric",),
    ("attacks",),
    ("evaluation", "analysis"),
    ("callbacks", "training"),
    ("cli",),
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
MOST_ENTRIES = 17
MARKERS = {"py.typed"}  # says that the package has types: a file, not a room

Imports = dict[str, set[str]]  # module → modules that it imports anywhere, also within its functions


def read_imports(package: Path) -> Imports:
    """What each file imports; of a name that is a module of the package, that module and not the room around it."""
    files = {_module(path, package): path for path in package.rglob("*.py")}
    trees = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in files.items()}
    return {module: set(_imported(tree, files)) for module, tree in trees.items()}


def _module(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(tree: ast.Module, files: dict[str, Path]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, "relative imports hide which room they are from"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in files else node.module


def _room(module: str) -> str:
    """The room of a module of ours; empty for the package itself."""
    return module.partition(".")[2].partition(".")[0]


def upward(imports: Imports) -> set[tuple[str, str]]:
    """Imports of a room above; the package itself is above all."""
    return {
        (module, other)
        for module, others in imports.items()
        for other in others & imports.keys()
        if _room(module) and LEVEL.get(_room(other), len(LEVELS)) > LEVEL[_room(module)]
    }


def circle(imports: Imports) -> list[str]:
    """Modules that import each other in a circle; empty where there is none."""
    finished: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module in finished:
            return []
        for other in sorted(imports[module] & imports.keys()):
            if found := visit(other, [*path, module]):
                return found
        finished.add(module)
        return []

    return next((found for module in sorted(imports) if (found := visit(module, []))), [])


@pytest.fixture(scope="module")
def imports() -> Imports:
    return read_imports(PACKAGE)


def test_the_package_has_the_rooms_and_no_others() -> None:
    entries = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"} - MARKERS
    assert entries - set(LEVEL) == {"__init__.py"}
    assert len(entries) <= MOST_ENTRIES


def test_imports_go_downwards(imports: Imports) -> None:
    assert upward(imports) == set()


def test_no_files_import_each_other_in_a_circle(imports: Imports) -> None:
    assert circle(imports) == []


def test_certificates_import_nothing_of_ours(imports: Imports) -> None:
    used = {o for m, others in imports.items() if _room(m) == "certificates" for o in others & imports.keys()}
    assert {other for other in used if _room(other) != "certificates"} == set()


def test_what_is_below_an_evaluation_does_without_lightning(imports: Imports) -> None:
    below = [m for m in imports if _room(m) and LEVEL[_room(m)] < LEVEL["evaluation"] and _room(m) != "datamodules"]
    users = {m for m in below if any(o.split(".")[0] in ("lightning", "pytorch_lightning") for o in imports[m])}
    assert users == set()


def test_faults_are_found(tmp_path: Path) -> None:
    files = {
        "__init__": "from lipsim.metric import score",
        "metric/__init__": "from lipsim.metric.score import score",
        "metric/score": "def score():\n    from lipsim.cli import main",
        "cli/__init__": "",
        "cli/main": "from lipsim import metric",
        "layers/__init__": "import lipsim",
    }
    for name, text in files.items():
        path = tmp_path / "lipsim" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = read_imports(tmp_path / "lipsim")
    assert upward(found) == {("lipsim.metric.score", "lipsim.cli.main"), ("lipsim.layers", "lipsim")}
    assert set(circle(found)) == {"lipsim.metric", "lipsim.metric.score", "lipsim.cli.main"}
