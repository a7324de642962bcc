"""Arguments of constructors, as an object keeps them."""

from __future__ import annotations

import inspect
import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from lipsim.utils.arguments import has_recorded_arguments, records_arguments


@records_arguments(weights=lambda _: "random")
class _Base(nn.Module):
    config: dict[str, Any]

    def __init__(self, size: int, widths: tuple[int, ...] = (1, 2), weights: str | Path = "w", **options: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(size, 1)


@records_arguments()
class _Derived(_Base):
    def __init__(self, name: str, folder: Path = Path("a/b")) -> None:
        super().__init__(3)


class _Undecorated(_Base):
    def __init__(self) -> None:
        super().__init__(4, bias=True)


def test_the_arguments_of_the_call_and_the_defaults_are_kept_in_plain_types() -> None:
    config = _Base(2, weights=Path("secret"), extra={"a": (1, Path("p"))}).config
    assert config == {"size": 2, "widths": [1, 2], "weights": "random", "extra": {"a": [1, "p"]}}
    assert list(config) == ["size", "widths", "weights", "extra"]
    assert json.loads(json.dumps(config)) == config
    rebuilt = _Base(**config)
    assert rebuilt.config == config
    assert deepcopy(rebuilt).config == config


def test_an_object_keeps_the_arguments_of_its_own_class() -> None:
    assert _Derived("n").config == {"name": "n", "folder": "a/b"}
    assert _Undecorated().config == {"size": 4, "widths": [1, 2], "weights": "random", "bias": True}
    assert has_recorded_arguments(_Derived) and not has_recorded_arguments(_Undecorated)


def test_what_is_kept_does_not_follow_what_was_given() -> None:
    widths = [1, 2]
    found = _Base(1, widths)  # type: ignore[arg-type]
    widths.append(3)
    assert found.config["widths"] == [1, 2]


def test_the_constructor_looks_as_before() -> None:
    assert list(inspect.signature(_Base).parameters) == ["size", "widths", "weights", "options"]
    assert inspect.signature(_Base).parameters["widths"].default == (1, 2)
    with pytest.raises(TypeError, match="missing a required argument: 'size'"):
        _Base()  # type: ignore[call-arg]


def test_arguments_without_a_name_are_refused() -> None:
    class Positional:
        def __init__(self, *sides: int) -> None: ...

    with pytest.raises(ValueError, match="takes sides by position"):
        records_arguments()(Positional)
