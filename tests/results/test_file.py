"""results.json: read once against its schema, written whole, documented field by field."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args, get_type_hints, is_typeddict

import pytest
from sections import attacked_section, certified_section

from lipsim.results import SCHEMA, read_results, update_results
from lipsim.results.file import NAMES
from lipsim.results.schema import Environment, Results, Sections
from lipsim.results.validate import problem
from lipsim.utils.errors import LipsimError

DOCS = Path(__file__).parents[2] / "docs" / "results_json.md"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "results.json"
    update_results(file, {"certified": certified_section({"builtin": [0.5]}, [1.0])})
    update_results(file, {"attacked": attacked_section({"metric": (0.9, {"1": 0.75})}, [1.0])})
    return file


def test_what_is_written_is_read(path: Path) -> None:
    results = read_results(path)
    assert results["schema"] == SCHEMA and "torch" in results["versions"]
    assert results["certified"] == certified_section({"builtin": [0.5]}, [1.0])
    assert results["attacked"]["sets"]["builtin"]["metrics"]["metric"]["attacked"] == {"1": 0.75}
    first = path.read_bytes()
    update_results(path, {"certified": results["certified"]})  # whatever is written again
    assert path.read_bytes() == first and list(path.parent.iterdir()) == [path]


DAMAGE: dict[str, tuple[Any, str]] = {
    "certified.eps": ("1", r"certified\.eps: expected a list, got '1'"),
    "certified.sets.builtin.majority": ("high", r"certified\.sets\.builtin\.majority: expected a number, got 'high'"),
    "certified.sets.builtin.certified.1": ([], r"certified\.sets\.builtin\.certified\.1: expected a number"),
    "certified.sets.builtin.num_triplets": (9.5, r"num_triplets: expected a whole number, got 9\.5"),
    "certified.sets.builtin.curve.joint": ([None, "x"], r"curve\.joint\[1\]: expected a number, got 'x'"),
    "certified.sets": ({"builtin": 3}, r"certified\.sets\.builtin: expected an object, got 3"),
    "certified.anchor": (True, r"certified\.anchor: expected a number, got True"),
    "attacked.norm": ("2", r"attacked\.norm: expected 2 or 'inf' or 0, got '2'"),
    "attacked.suite": (1, r"attacked\.suite: expected true or false, got 1"),
    "attacked.sets.builtin.metrics": (None, r"builtin\.metrics: expected an object, got None"),
    "attacked": ([], r"attacked: expected an object, got \[\]"),
    "versions": ({"torch": 2}, r"versions\.torch: expected text, got 2"),
}


@pytest.mark.parametrize("place", DAMAGE)
def test_damage_is_named_in_one_line(place: str, path: Path) -> None:
    value, message = DAMAGE[place]
    content = json.loads(path.read_text())
    *parents, last = place.split(".")
    part = content
    for key in parents:
        part = part[key]
    for changed, expected in (({last: value}, message), ({}, rf"{re.escape(place)} is missing")):
        damaged = copy.deepcopy(part)
        part.pop(last, None)
        part |= changed
        path.write_text(json.dumps(content))
        optional = not changed and (place in NAMES or last == "1")  # sections, and labels of budgets
        if optional:
            read_results(path)
        else:
            with pytest.raises(LipsimError, match=expected) as caught:
                read_results(path)
            assert "\n" not in str(caught.value) and "run the test again" in str(caught.value)
        part.clear()
        part |= damaged


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no JSON"),
        (b'{"schema": 2, "certi', "is no JSON"),
        (b"\xff\xfe", "is no JSON"),
        (b"[]", "no schema number"),
        (b"{}", "no schema number"),
        (b'{"schema": "2"}', "no schema number"),
        (b'{"schema": true}', "no schema number"),
        (b'{"schema": 1, "certified": {}}', f"schema 1 of an older lipsim, expected {SCHEMA}; remove it and run"),
        (b'{"schema": 99}', f"schema 99 of a newer lipsim, expected {SCHEMA}; read it with that version"),
        (b'{"schema": 2}', "versions is missing"),
    ],
)
def test_other_files_are_refused_in_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_bytes(content)
    for use in (read_results, lambda path: update_results(path, {"durations": {"seconds": {}}})):
        with pytest.raises(LipsimError, match=message) as caught:
            use(file)
        assert "\n" not in str(caught.value)
    assert file.read_bytes() == content


def test_fields_that_are_added_later_are_passed_over(path: Path) -> None:
    content = json.loads(path.read_text())
    content["certified"]["later"] = content["later"] = 1
    path.write_text(json.dumps(content))
    read_results(path)


def test_what_the_schema_does_not_know_is_not_written(path: Path) -> None:
    before = path.read_bytes()
    section = certified_section({"builtin": [0.5]}, [1.0])
    for wrong, message in (({**section, "later": 1}, "certified.later is unknown"), ({}, "is missing")):
        with pytest.raises(LipsimError, match=message):
            update_results(path, {"certified": wrong})  # type: ignore[typeddict-item]
    assert path.read_bytes() == before


def test_numbers_that_are_not_finite_are_null(path: Path) -> None:
    section = certified_section({"builtin": [float("nan")]}, [1.0])
    section["lipschitz"] = float("inf")
    update_results(path, {"certified": section})
    assert "NaN" not in path.read_text() and "Infinity" not in path.read_text()
    found = read_results(path)["certified"]
    assert found["lipschitz"] is found["sets"]["builtin"]["certified"]["1"] is None
    assert found["sets"]["builtin"]["curve"]["joint"] == [None]


def test_sections_of_other_weights_or_data_go(path: Path) -> None:
    update_results(path, {"durations": {"seconds": {"test": 1.0}}})
    for changed in ({"weights_sha256": "other"}, {"data_sha256": {"builtin": "other"}}):
        section = {**read_results(path)["certified"], **changed}
        update_results(path, {"attacked": attacked_section({}, [1.0], **_source_of(section))})
        update_results(path, {"certified": section})  # type: ignore[typeddict-item]
        assert set(read_results(path)) == {"schema", "versions", "certified", "attacked", "durations"}
    update_results(path, {"certified": certified_section({"builtin": [0.5]}, [1.0])})
    assert set(read_results(path)) == {"schema", "versions", "certified", "durations"}


def _source_of(section: Any) -> dict[str, Any]:
    return {key: section[key] for key in ("weights_sha256", "data_sha256")}


class _Record(TypedDict):
    kind: Literal["a", 2]
    values: list[float] | None


def test_values_against_types() -> None:
    assert problem({"kind": 2, "values": [1, 0.5]}, _Record) is None is problem({"kind": "a", "values": None}, _Record)
    assert problem({"kind": 2.0, "values": None}, _Record) == "kind: expected 'a' or 2, got 2.0"
    assert problem({"kind": "a", "values": [1, True]}, _Record) == "values[1]: expected a number, got True"
    assert problem({"kind": "a"}, _Record) == "values is missing"
    assert problem(3, _Record) == "the whole: expected an object, got 3"
    assert problem(None, int | str) == "the whole: expected a whole number or text, got None"


def _records(kind: Any) -> list[Any]:
    """A record and those within it."""
    if not is_typeddict(kind):
        return [found for part in get_args(kind) for found in _records(part)]
    return [kind, *(found for hint in get_type_hints(kind).values() for found in _records(hint))]


def test_every_field_is_documented_and_no_other() -> None:
    text = DOCS.read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `(\w+)`", text, re.MULTILINE))
    fields = {field for kind in (*_records(Results), Environment) for field in get_type_hints(kind)}
    assert documented == fields
    assert f"Schema {SCHEMA}." in text
    assert set(NAMES) == set(get_type_hints(Sections))


def test_no_mapping_has_both_names_and_facts() -> None:
    """A mapping is a record with fields, or goes from names to values of one kind."""
    for kind in _records(Results):
        for hint in get_type_hints(kind).values():
            for part in (hint, *get_args(hint)):
                if part in (dict, Any, object) or getattr(part, "__origin__", None) is dict:
                    assert get_args(part) and get_args(part)[0] is str and get_args(part)[1] is not Any
