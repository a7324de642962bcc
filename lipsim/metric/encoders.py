"""The encoder classes that the file of a metric may name: those of this package, and others that were registered."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TypeVar, overload

from torch import nn

from lipsim.utils.arguments import has_recorded_arguments, records_arguments
from lipsim.utils.errors import LipsimError

# Each with its room, which is loaded when a file names it: some take seconds to import.
_OURS = {
    "FoldedNetwork": "lipsim.students",
    "JoinedEncoder": "lipsim.metric.combinations",
    "OrthogonalProjection": "lipsim.students",
    "OrthogonalShiftNetwork": "lipsim.students",
    "SLLNetwork": "lipsim.students",
    "ScatteringNetwork": "lipsim.students",
    "ScatteringTransform": "lipsim.students",
    "TorchlipNetwork": "lipsim.students",
    "DreamSim": "lipsim.teachers",
    "EfficientNetLite": "lipsim.teachers",
    "Ensemble": "lipsim.teachers",
    "SmallViT": "lipsim.teachers",
}
_registered: dict[str, type[nn.Module]] = {}

Class = TypeVar("Class", bound=type[nn.Module])


@overload
def register_encoder(cls: Class) -> Class: ...


@overload
def register_encoder(*, name: str) -> Callable[[Class], Class]: ...


def register_encoder(cls: Class | None = None, *, name: str | None = None) -> Class | Callable[[Class], Class]:
    """Let files of metrics hold encoders of a class of one's own (a decorator, with or without a name).

    A file has the name, the weights and the arguments of the constructor, which are recorded from now on in the
    attribute ``config`` (unless the class does so itself with :func:`lipsim.utils.arguments.records_arguments`); they
    have to be JSON. :func:`lipsim.load` finds the class where the module that registers it has been imported before: a
    file chooses among registered names and imports nothing.

    Args:
        cls: an ``nn.Module`` from images ``(N, 3, S, S)`` to features ``(N, D)``; see
            :class:`lipsim.layers.encoder.Encoder`.
        name: what files call it; default the name of the class. Put your package before it where others may choose the
            same.

    Raises:
        ValueError: another class has this name, or arguments of the constructor have none.

    >>> from lipsim.metric import register_encoder
    >>> from lipsim.layers import OrthogonalLinear
    >>> @register_encoder(name="docs.Flat")
    ... class Flat(nn.Sequential):
    ...     def __init__(self, image_size: int, out_features: int = 8):
    ...         super().__init__(nn.Flatten(), OrthogonalLinear(3 * image_size**2, out_features))
    ...         self.image_size, self.out_features = image_size, out_features
    >>> Flat(4).config
    {'image_size': 4, 'out_features': 8}
    """

    def register(cls: Class) -> Class:
        chosen = cls.__name__ if name is None else name
        other = _registered.get(chosen)
        # The same class again, as when a cell of a notebook runs twice, takes the place of itself.
        same = other is not None and (other.__module__, other.__qualname__) == (cls.__module__, cls.__qualname__)
        if chosen in _OURS or (other is not None and not same):
            raise LipsimError(f"an encoder called {chosen!r} is registered already; register {cls} by another name")
        registered = cls if has_recorded_arguments(cls) else records_arguments()(cls)
        _registered[chosen] = registered
        return registered

    return register if cls is None else register(cls)


def registered_names() -> list[str]:
    """All names that a file may choose from."""
    return [*_OURS, *_registered]


def is_of_this_package(name: str) -> bool:
    """Whether a name is one that this package gave."""
    return name in _OURS


def encoder_class(name: str) -> type[nn.Module]:
    """The class of one of :func:`registered_names`, whose room is loaded where it is not yet."""
    if name in _registered:
        return _registered[name]
    cls: type[nn.Module] = getattr(importlib.import_module(_OURS[name]), name)
    return cls


def encoder_name(encoder: nn.Module) -> str | None:
    """The name of an encoder's class in files; None where it has none, as a subclass of one that has."""
    cls = type(encoder)
    name = next((name for name, registered in _registered.items() if registered is cls), None)
    if name is None and cls.__name__ in _OURS and encoder_class(cls.__name__) is cls:
        return cls.__name__
    return name
