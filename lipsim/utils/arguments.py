"""Constructors that record what they were called with, so that an object can be described and built again."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import PurePath
from typing import Any, TypeVar
from weakref import WeakSet

from lipsim.utils.errors import LipsimError

Class = TypeVar("Class", bound=type)
_recording: WeakSet[type] = WeakSet()


def records_arguments(**stored_as: Callable[[Any], Any]) -> Callable[[Class], Class]:
    """Have a class keep the arguments of its constructor, defaults included, in the attribute ``config``.

    In their order and in the plain types of JSON where they have them: a tuple becomes a list, a path a string. Where
    one such class derives from another, an object keeps the arguments that it was made with, those of its own class.

    Args:
        **stored_as: for the arguments of these names, a function that gives what is kept in their place.

    Raises:
        ValueError: an argument of the constructor has no name to keep it under.

    >>> @records_arguments(secret=lambda _: None)
    ... class Box:
    ...     def __init__(self, sides, secret, depth=2):
    ...         pass
    >>> Box((3, 4), secret="word").config
    {'sides': [3, 4], 'secret': None, 'depth': 2}
    """

    def decorate(cls: Class) -> Class:
        construct = cls.__init__  # type: ignore[misc]
        signature = inspect.signature(construct)
        _, *parameters = signature.parameters.values()
        nameless = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL)]
        if nameless:
            raise LipsimError(
                f"{cls.__name__}.__init__ takes {', '.join(nameless)} by position; give its arguments names, to be "
                "recorded under"
            )

        @functools.wraps(construct)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
            if "config" not in vars(self):  # else this is the constructor of a base
                given = signature.bind(self, *args, **kwargs)
                given.apply_defaults()
                config: dict[str, Any] = {}
                for parameter in parameters:
                    value = given.arguments[parameter.name]
                    if parameter.kind is parameter.VAR_KEYWORD:
                        config |= {name: _plain(extra) for name, extra in value.items()}
                    elif parameter.name in stored_as:
                        config[parameter.name] = _plain(stored_as[parameter.name](value))
                    else:
                        config[parameter.name] = _plain(value)
                object.__setattr__(self, "config", config)  # a module takes no attributes before its constructor ran
            construct(self, *args, **kwargs)

        cls.__init__ = wrapper  # type: ignore[misc]
        _recording.add(cls)
        return cls

    return decorate


def has_recorded_arguments(cls: type) -> bool:
    """Whether :func:`records_arguments` is on this very class, and not only on a base of it."""
    return cls in _recording


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, PurePath) else value
