"""Values as JSON has them against types: TypedDicts, mappings, lists, unions, literals, numbers and text."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

_NAMES: dict[Any, str] = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    type(None): "null",
}


def problem(value: Any, expected: Any, *, extra: bool = True, at: str = "") -> str | None:
    """The first way in which a value is not of a type, in words; None where it is.

    Args:
        value: of ``json.loads``.
        expected: the type.
        extra: whether records may have fields that their class does not know, as files of later versions do.
        at: where in a file the value is.
    """
    return next(_problems(value, expected, extra, at), None)


def _problems(value: Any, expected: Any, extra: bool, at: str) -> Iterator[str]:
    origin, arguments = get_origin(expected), get_args(expected)
    if origin in (Union, types.UnionType):
        if all(problem(value, option, extra=extra) for option in arguments):
            # Of what is null or something else, what is wrong with the something else.
            if value is not None and len(others := [a for a in arguments if a is not type(None)]) == 1:
                yield from _problems(value, others[0], extra, at)
            else:
                yield _expected(at, " or ".join(map(_name, arguments)), value)
    elif is_typeddict(expected):
        if not isinstance(value, dict):
            yield _expected(at, "an object", value)
            return
        hints = get_type_hints(expected)
        for missing in sorted(expected.__required_keys__ - value.keys()):
            yield f"{_inside(at, missing)} is missing"
        for key, item in value.items():
            if key in hints:
                yield from _problems(item, hints[key], extra, _inside(at, key))
            elif not extra:
                yield f"{_inside(at, key)} is unknown"
    elif origin is dict:
        if not isinstance(value, dict):
            yield _expected(at, "an object", value)
            return
        for key, item in value.items():
            yield from _problems(item, arguments[1], extra, _inside(at, key))
    elif origin is list:
        if not isinstance(value, list):
            yield _expected(at, "a list", value)
            return
        for number, item in enumerate(value):
            yield from _problems(item, arguments[0], extra, f"{at}[{number}]")
    elif origin is Literal:
        if not any(value == choice and type(value) is type(choice) for choice in arguments):
            yield _expected(at, _name(expected), value)
    else:
        # True is an int in Python, and 1 a float in JSON.
        fits = type(value) in (int, float) if expected is float else type(value) is expected
        if not fits:
            yield _expected(at, _name(expected), value)


def _inside(at: str, key: str) -> str:
    return f"{at}.{key}" if at else key


def _name(expected: Any) -> str:
    if get_origin(expected) is Literal:
        return " or ".join(map(repr, get_args(expected)))
    if get_origin(expected) is list:
        return "a list"
    return _NAMES.get(expected, "an object")


def _expected(at: str, expected: str, value: Any) -> str:
    text = repr(value)
    return f"{at or 'the whole'}: expected {expected}, got {text if len(text) <= 40 else text[:37] + '...'}"
