"""Reading and writing results.json: what a run measured, one section a callback, readable without this package."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

from lipsim.results.environment import versions
from lipsim.results.schema import SCHEMA, Results, Sections
from lipsim.results.validate import problem
from lipsim.utils.errors import LipsimError
from lipsim.utils.files import parse_json, write_json

NAMES: tuple[str, ...] = tuple(Sections.__annotations__)
_REMEDY = "remove it and run the test again"


def update_results(path: Path, sections: Sections) -> None:
    """Write sections into a results file; the file is replaced as a whole.

    Other sections stay, except those that name other weights (``weights_sha256``) or other data (``data_sha256``).
    Numbers that are not finite become null.

    Raises:
        ValueError: the file is there and is no results file of this schema, or a section is not as the schema says.
    """
    new = {name: _finite(content) for name, content in sections.items()}
    wrong = problem(new, Sections, extra=False)
    if wrong is not None:
        raise LipsimError(f"cannot write {path}: {wrong}")
    kept = contents(read_results(path)) if path.is_file() else {}
    for content in new.values():
        for key in ("weights_sha256", "data_sha256"):
            if key in content:
                own = content[key]
                kept = {name: old for name, old in kept.items() if old.get(key, own) == own}
    _write(path, {**kept, **new}, versions())


def keep_sections(path: Path, names: Collection[str]) -> None:
    """Remove all other sections from a results file; the file is replaced as a whole.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no results file of this schema.
    """
    results = read_results(path)
    _write(path, {name: content for name, content in contents(results).items() if name in names}, results["versions"])


def _write(path: Path, sections: Mapping[str, Mapping[str, Any]], packages: Mapping[str, str]) -> None:
    ordered = {name: sections[name] for name in NAMES if name in sections}  # the same file, in whatever order they came
    write_json(path, {"schema": SCHEMA, **ordered, "versions": packages})


def read_results(path: Path) -> Results:
    """Read a results file, and check that it is as the schema says.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be parsed, is damaged, or was written by an older or a newer version.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "results.json"
        ...     update_results(file, {"durations": {"seconds": {"teacher": 12.5}}})
        ...     read_results(file)["durations"]["seconds"]
        {'teacher': 12.5}
    """
    if not path.is_file():
        raise FileNotFoundError(f"no results at {path}; a test run writes them")
    try:
        results = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also bytes that are no UTF-8
        raise LipsimError(f"{path} is no JSON ({error}); {_REMEDY}") from error
    schema = results.get("schema") if isinstance(results, dict) else None
    if type(schema) is not int:
        raise LipsimError(f"{path} is no results file: it has no schema number; {_REMEDY}")
    if schema > SCHEMA:
        raise LipsimError(f"{path} has schema {schema} of a newer lipsim, expected {SCHEMA}; read it with that version")
    if schema < SCHEMA:
        raise LipsimError(f"{path} has schema {schema} of an older lipsim, expected {SCHEMA}; {_REMEDY}")
    wrong = problem(results, Results)
    if wrong is not None:
        raise LipsimError(f"{path} is damaged, {wrong}; {_REMEDY}")
    return cast(Results, results)


def contents(results: Results) -> dict[str, Mapping[str, Any]]:
    """The sections that are there, by name."""
    found = cast(Mapping[str, Mapping[str, Any]], results)
    return {name: found[name] for name in NAMES if name in found}


def data_hashes(results: Results) -> list[Mapping[str, str]]:
    """Of each section that was measured on data, the fingerprint of each set and part."""
    return [content["data_sha256"] for name, content in contents(results).items() if "data_sha256" in content]


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def eps_label(eps: float) -> str:
    """How tables write a budget: ``36/255`` where it is a whole number of 255ths below 1, else the number.

    Example:
        >>> eps_label(36 / 255), eps_label(1.0)
        ('36/255', '1')
    """
    steps = round(eps * 255)
    return f"{steps}/255" if 0 < steps < 255 and abs(eps * 255 - steps) < 1e-9 else f"{eps:.12g}"
