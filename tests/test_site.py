"""The site: it builds without a warning, has every public name with its description, and needs no other host."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest

import lipsim

pytest.importorskip("material")
pytest.importorskip("mkdocstrings_handlers.python")

ROOT = Path(__file__).parents[1]
ROOMS = sorted(name for name in lipsim.__all__ if inspect.ismodule(getattr(lipsim, name)))
# What a page loads of its own accord; links that a reader may follow are not among it.
_LOADS = re.compile(
    r"<(?:script|img|iframe|source)[^>]*\ssrc=[\"']?(?:https?:)?//|<link[^>]*\shref=[\"']?(?:https?:)?//"
)


def test_public_classes_and_functions_are_described() -> None:
    for module in (lipsim, *(importlib.import_module(f"lipsim.{room}") for room in ROOMS)):
        for name in getattr(module, "__all__", []):
            value = getattr(module, name)
            if inspect.isclass(value) or inspect.isfunction(value) or inspect.ismodule(value):
                assert (value.__doc__ or "").strip(), f"{module.__name__}.{name}"


@pytest.mark.no_cover  # it runs nothing of the package, and all of mkdocs
def test_the_site_builds_and_is_whole(tmp_path: Path) -> None:
    """One test, as building takes seconds: without a warning, such as a link to nothing or a page in no menu."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        config = load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path))
        config.plugins.on_startup(command="build", dirty=False)
        build(config)
    _every_public_name_is_in_the_reference(tmp_path)
    _pages_load_nothing_from_elsewhere(tmp_path)
    _formulas_and_docstrings_are_translated(tmp_path)


def _every_public_name_is_in_the_reference(site: Path) -> None:
    own = [name for name in lipsim.__all__ if name not in (*ROOMS, "__version__")]
    rooms = {"lipsim": ("reference/index.html", own)}
    for room in ROOMS:
        names = getattr(importlib.import_module(f"lipsim.{room}"), "__all__", [])
        rooms[f"lipsim.{room}"] = (f"reference/{room}/index.html", names)
    missing = []
    for module, (page, names) in rooms.items():
        shown = set(re.findall(r'id="([\w.]+)"', (site / page).read_text(encoding="utf-8")))
        missing += [f"{module}.{name}" for name in names if f"{module}.{name}" not in shown]
    assert not missing, f"no description of {missing}"


def _pages_load_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        found = _LOADS.search(page.read_text(encoding="utf-8"))
        assert found is None, f"{page.relative_to(site)}: {found and found[0]}"
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import )[\"']?(?:https?:)?//", style.read_text(encoding="utf-8")), style


def _formulas_and_docstrings_are_translated(site: Path) -> None:
    theory = (site / "theory/index.html").read_text(encoding="utf-8")
    assert theory.count("<math ") > 20
    assert "\\(" not in theory and "\\[" not in theory
    for page in (site / "reference").rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r":(?:func|class|mod|meth|attr|data|exc):", text), page
        assert "<blockquote>" not in text, f"{page}: an example became a quotation"
