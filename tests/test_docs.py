"""Every command and snippet of the README and the site runs, or says why it does not and is parsed.

A page runs from top to bottom, Python in one namespace, in a folder with ``x.png``, ``y.png``, ``z.png``,
``query.png``, the table ``triplets.csv``, the folders ``photos`` and ``pictures``, and what the quickstart leaves. A
comment directly above a block may say

- ``<!-- not run: REASON -->``: it needs data, hours, a cluster or another package; it is parsed all the same;
- ``<!-- slow: REASON -->``: it takes seconds, and runs with ``-m slow``;
- ``<!-- needs: MODULE -->``: it runs where that optional package is installed.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import shlex
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from lipsim import PerceptualMetric
from lipsim.cli import stage
from lipsim.cli.main import COMMANDS, STAGES
from lipsim.cli.main import main as lipsim_main
from lipsim.cli.parser import OneLineParser
from lipsim.data import BuiltinTriplets
from lipsim.metric import save
from lipsim.metric.files import resolve as metric_file
from lipsim.teachers import SmallViT

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELL = {"bash", "console"}  # of the latter the lines after $, the others are output
TESTED = {"python", "yaml", *SHELL}
SHOWN = {"text", "csv", "json", "html", "bibtex"}
MARKS = {"not run", "slow", "needs"}
_FENCE = re.compile(
    r"(?:^[ ]*<!-- (?P<mark>[a-z ]+): (?P<reason>[^\n]+) -->\n)?"
    r"^(?P<indent>[ ]*)```(?P<language>[^\n]*)\n(?P<code>.*?)^(?P=indent)```[ ]*$",
    re.MULTILINE | re.DOTALL,
)
_SCRIPTS = {
    "scripts/train.py": ["train"],
    "scripts/evaluate.py": ["evaluate"],
    "scripts/cache_teacher.py": ["cache-teacher"],
    "scripts/convert_checkpoint.py": ["convert"],
}
# Not of this package: nothing of theirs is parsed here, and nothing is run.
_OTHERS = {".", "git", "cd", "cp", "mkdir", "unzip", "sbatch", "uvx", "pytest", ".ci/run", "mkdocs", "aws", "rm"}


@dataclass(frozen=True)
class Block:
    """A fenced block: where it is, what it holds and what the comment above it says."""

    page: Path
    line: int
    language: str
    code: str
    mark: str | None
    reason: str | None

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def runs(self, slow: bool) -> bool:
        """Whether it can run here, in the quick tests or the slow ones."""
        if self.mark == "needs":
            return importlib.util.find_spec(str(self.reason)) is not None
        return self.mark is None or (self.mark == "slow" and slow)


class Parsed(BaseException):
    """A command was understood; nothing of this package catches it."""


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        line = text[: match.start("language")].count("\n") + 1
        code = textwrap.dedent(match["code"])
        found.append(Block(page, line, match["language"].split(" ")[0], code, match["mark"], match["reason"]))
    return found


BLOCKS = [block for page in PAGES for block in blocks(page)]


def of(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language]


def pages_of(*languages: str, mark: str | None = None) -> list[Path]:
    """Pages with blocks in these languages; with a mark: that have a block with it."""
    found = {block.page for block in BLOCKS if block.language in languages and mark in (None, block.mark)}
    return sorted(found)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages speak of: three images, folders of images, and the files that the quickstart leaves."""
    folder = tmp_path_factory.mktemp("docs")
    triplets, rng = BuiltinTriplets("test", num_triplets=3, image_size=64), np.random.default_rng(0)
    for name, image in zip(("x", "y", "z"), triplets[0].images(), strict=True):
        save_image(folder / f"{name}.png", image)
    shutil.copy(folder / "x.png", folder / "query.png")
    (folder / "triplets.csv").write_text("reference,left,right,right_vote\nx.png,y.png,z.png,0.2\n")
    for number in range(3):
        for name, image in zip(("reference", "left", "right"), triplets[number].images(), strict=True):
            save_image(folder / "pictures" / f"{name}-{number}.png", image)
    for part, count in (("train", 4), ("val", 3)):
        for label, colour in (("red", (200, 60, 60)), ("green", (60, 200, 60))):
            for number in range(count):
                tile = rng.normal(colour, 30, (66, 72, 3)).clip(0, 255).astype(np.uint8)
                path = folder / "photos" / part / label / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(tile).save(path)
    run = folder / "runs" / "quickstart"
    (run / "teacher").mkdir(parents=True)
    shutil.copy(metric_file("quickstart"), run / "quickstart.safetensors")
    torch.manual_seed(0)
    teacher = PerceptualMetric(SmallViT(image_size=64), 64, anchor=0.0, lipschitz=float("inf"))
    save(teacher, run / "teacher" / "teacher.safetensors")
    shutil.copytree(ROOT / "configs", folder / "configs")
    return folder


def save_image(path: Path, image: torch.Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = (image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    Image.fromarray(pixels).resize((96, 80), Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def at_home(furnished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of that folder as the working directory; what snippets register is forgotten again."""
    from lipsim.metric import encoders

    home = tmp_path / "home"
    shutil.copytree(furnished, home)
    monkeypatch.chdir(home)
    monkeypatch.setenv("MPLBACKEND", "agg")
    matplotlib.use("agg")
    known = dict(encoders._registered)
    yield home
    encoders._registered.clear()
    encoders._registered.update(known)


def test_blocks_say_their_language_and_why_they_do_not_run() -> None:
    for block in BLOCKS:
        assert block.language in TESTED | SHOWN, f"{block.place}: {block.language!r} is neither tested nor output"
        assert block.mark in {None, *MARKS}, f"{block.place}: unknown mark {block.mark!r}"
    for page in PAGES:  # none is overlooked
        fences = re.findall(r"^ *```", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert len(fences) == 2 * len(blocks(page)), f"{page.name}: a block that does not end where it began"


def test_marks_and_commands_are_read(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- slow: hours -->\n```python\na = 1\n```\n"
        '=== "tab"\n\n    <!-- not run: another package -->\n    ```python\n    b = 2\n    ```\n'
        "<!-- not run: too far above -->\n\n```bash\nuv run lipsim audit x  # why\n"
        "A=1 srun --nodes 2 uv run python scripts/train.py \\\n    --data.root d && lipsim info\n```\n"
    )
    slow, tab, bash = blocks(page)
    assert (slow.line, slow.mark, slow.reason, slow.code) == (2, "slow", "hours", "a = 1\n")
    assert (tab.mark, tab.code) == ("not run", "b = 2\n")
    assert bash.mark is None
    console = Block(page, 1, "console", "$ lipsim info > facts.txt\nencoder SLLNetwork\n", None, None)
    assert commands(console) == [["lipsim", "info"]]
    assert [block.runs(slow=False) for block in (slow, tab, bash)] == [False, False, True]
    assert [block.runs(slow=True) for block in (slow, tab, bash)] == [True, False, True]
    found = commands(bash)
    assert found == [["lipsim", "audit", "x"], [*"python scripts/train.py --data.root d".split()], ["lipsim", "info"]]
    assert own(found[1], "") == ["train", "--data.root", "d"]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_nothing_hides_in_indentation(page: Path) -> None:
    """A command in an indented block would be neither run nor parsed."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    hidden = re.findall(r"^ {4,}(?:\$ )?(?:(?:uv run |)(?:lipsim|python3?) |>>> ).*", text, re.MULTILINE)
    assert not hidden, hidden


# --- what runs


def run_page(page: Path, slow: bool) -> None:
    """All blocks that can run here, in their order."""
    space: dict[str, Any] = {"__name__": "__docs__"}
    for block in blocks(page):
        if block.language == "python" and block.runs(slow):
            exec(compile("\n" * block.line + block.code, str(page), "exec"), space)
        elif block.language in SHELL and block.runs(slow):
            for words in commands(block):
                args = own(words, block.place)
                assert args is not None, f"{block.place}: {words[0]} is not run; say so above the block"
                try:
                    status = lipsim_main(args)
                except SystemExit as stop:
                    status = stop.code
                answered_no = args[0] == "same" and status == 1
                assert status in (0, None) or answered_no, f"{block.place}: {' '.join(words)}"


@pytest.mark.parametrize("page", pages_of("python", *SHELL), ids=name_of)
def test_the_page_runs(page: Path, at_home: Path) -> None:
    run_page(page, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_of("python", *SHELL, mark="slow"), ids=name_of)
def test_the_page_runs_with_what_is_slow(page: Path, at_home: Path) -> None:
    run_page(page, slow=True)


# --- Python and YAML


@pytest.mark.parametrize("block", of("python"), ids=lambda block: block.place)
def test_python_names_what_there_is(block: Block) -> None:
    """Also where it does not run: it compiles, and what it takes from this package or an installed one exists."""
    for node in ast.walk(ast.parse("\n" * block.line + block.code, block.place)):
        if isinstance(node, ast.ImportFrom) and node.module and importlib.util.find_spec(node.module.split(".")[0]):
            home = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(home, alias.name), f"{block.place}: no {alias.name} in {node.module}"
        if isinstance(node, ast.Attribute) and (dotted := ast.unparse(node)).startswith("lipsim."):
            resolve(dotted, block)


def resolve(dotted: str, block: Block) -> Any:
    """The object of a name such as ``lipsim.students.SLLNetwork.from_preset``."""
    if re.fullmatch(r"[\w.]+", dotted):
        value: Any = importlib.import_module("lipsim")
        for part in dotted.split(".")[1:]:
            if not hasattr(value, part) and inspect.ismodule(value):
                importlib.import_module(f"{value.__name__}.{part}")
            assert hasattr(value, part), f"{block.place}: no {dotted}"
            value = getattr(value, part)
        return value
    return None


@pytest.mark.parametrize("block", of("yaml"), ids=lambda block: block.place)
def test_yaml_names_what_there_is(block: Block) -> None:
    check_config(yaml.safe_load(block.code), block)


def check_config(value: Any, block: Block) -> None:
    if isinstance(value, dict):
        if "class_path" in value and value["class_path"].startswith("lipsim."):
            parameters = inspect.signature(resolve(value["class_path"], block)).parameters
            assert set(value.get("init_args", {})) <= set(parameters), block.place
        for item in value.values():
            check_config(item, block)
    elif isinstance(value, list):
        for item in value:
            check_config(item, block)


# --- the shell


def commands(block: Block) -> list[list[str]]:
    """The commands of a block in words: without comments, where output goes, variables and what starts them."""
    found = []
    for line in block.code.replace("\\\n", " ").splitlines():
        if block.language == "console" and not line.startswith("$ "):
            continue
        for part in line.removeprefix("$ ").split(" && "):
            words = shlex.split(part, comments=True)
            words = words[: next((i for i, word in enumerate(words) if word in ("|", ">", "2>", "||")), None)]
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            if words[:2] == ["uv", "run"]:
                words = words[2:]
            if words and words[0] in ("srun", "torchrun"):  # with options of theirs
                start = next((i for i, word in enumerate(words) if word in (*_SCRIPTS, "lipsim", "python")), None)
                assert start is not None, f"{block.place}: what does {' '.join(words)} start?"
                words = words[start:]
                words = ["python", *words] if words[0] in _SCRIPTS else words
            if words:
                found.append(words)
    return found


def own(words: list[str], place: str) -> list[str] | None:
    """The arguments of ``lipsim``; None for a command of something else, of which is checked what can be."""
    if words[0] == "lipsim":
        return words[1:]
    if words[0] in ("python", "python3") and words[1] in _SCRIPTS:
        return [*_SCRIPTS[words[1]], *words[2:]]
    if words[0] in ("python", "python3") and words[1].startswith(("benchmarks/", "docs/")):
        source = (ROOT / words[1]).read_text(encoding="utf-8")
        for option in (word for word in words[2:] if word.startswith("--")):
            assert f'"{option.partition("=")[0]}"' in source, f"{place}: {words[1]} has no option {option}"
        return None
    if "install" in words[:4]:
        extras = {name for word in words for name in re.sub(r".*\[(.*)\].*|.*", r"\1", word).split(",") if name}
        known = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE))
        assert extras <= known, f"{place}: no such extra among {extras}"
        return None
    assert words[0] in _OTHERS or words[:2] == ["pip", "wheel"], f"{place}: what is {words[0]}?"
    return None


@pytest.fixture
def parse_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands stop once they have read their options, before anything is made of them."""
    parse_args = OneLineParser.parse_args

    def parse(self: OneLineParser, *args: Any, **options: Any) -> None:
        parse_args(self, *args, **options)
        raise Parsed

    def stop(*args: Any, **options: Any) -> None:
        raise Parsed

    monkeypatch.setattr(OneLineParser, "parse_args", parse)
    monkeypatch.setattr(stage.StageCLI, "before_instantiate_classes", stop)
    monkeypatch.setattr(stage, "read_stage", lambda *args, **options: None)
    monkeypatch.setattr("lipsim.cli.train.quickstart", stop)


def understood(args: list[str]) -> bool:
    """Whether the real parser takes these options; a graphics card counts as there."""
    args = ["cpu" if word.startswith("cuda") else word for word in args]
    try:
        lipsim_main(args)
    except Parsed:
        return True
    except SystemExit as stop:
        return stop.code in (0, None)  # --help, --version
    return False


@pytest.mark.parametrize("page", pages_of(*SHELL), ids=name_of)
def test_commands_are_understood(
    page: Path, at_home: Path, parse_only: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for block in blocks(page):
        if block.language in SHELL:
            for words in commands(block):
                args = own(words, block.place)
                if args is not None:
                    assert understood(args), f"{block.place}: {' '.join(words)}: {capsys.readouterr().err}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_prose_names_commands_and_options_that_exist(
    page: Path, parse_only: None, capsys: pytest.CaptureFixture[str]
) -> None:
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    for span in re.findall(r"`((?:uv run )?lipsim [a-z][^`]*)`", text):
        command, *rest = span.removeprefix("uv run ").removeprefix("lipsim ").split(" ")
        assert command in {*COMMANDS, *STAGES}, f"{page.name}: lipsim {command}"
        options = set(re.findall(r"(?<!\S)\[?(--[a-z][\w-]*)(?![\w.-])", " ".join(rest)))
        if options and command in COMMANDS:
            assert understood([command, "--help"])
            assert options <= set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out)), f"{page.name}: {span}"


# --- files


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    names = re.findall(r"`((?:\.ci|lipsim|tests|docs|benchmarks|configs|scripts)/[\w./-]+)", _FENCE.sub("", text))
    for name in names:
        assert "NAME" in name or "FAMILY" in name or (ROOT / name).exists(), f"{page.name}: {name}"
    if page.parent == ROOT:  # those of the site are checked when it is built
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
            assert (ROOT / link).exists(), f"{page.name}: {link}"
