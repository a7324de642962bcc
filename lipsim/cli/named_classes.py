"""Which classes a config may name: what is imported and called because a file says so.

A config is data of somebody else as often as not, and a class that it names is imported, which runs its module, and
called. So it names classes of a few packages, and of those that the user adds by ``--allow MODULE``; everything else is
refused before it is imported. The same holds for options: one rule, whatever the words came by.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from jsonargparse import Namespace, get_loader, set_loader, set_parsing_settings

from lipsim.utils.errors import LipsimError

ALLOWED = ("lipsim", "torch", "lightning", "torchmetrics")
# Parts of these that run code, start processes, download or unpickle files by what they are called with.
DENIED = (
    "lipsim.cli",
    "torch.compiler", "torch.distributed", "torch.export", "torch.fx", "torch.hub", "torch.jit", "torch.library",
    "torch.multiprocessing", "torch.onnx", "torch.package", "torch.serialization", "torch.storage", "torch.testing",
    "torch.utils",
    "lightning.app", "lightning.data", "lightning.fabric.cli", "lightning.fabric.utilities", "lightning.pytorch.cli",
    "lightning.pytorch.demos", "lightning.pytorch.serve", "lightning.pytorch.trainer", "lightning.pytorch.utilities",
)  # fmt: skip
# Parts of the denied parts that arguments of the trainer and of data modules are of.
_NEEDED = ("torch.distributed.fsdp", "torch.distributed.optim", "torch.utils.data")
# Nodes of a config once its references are followed; the largest of this package has some hundred.
MOST_NODES = 100_000
# How deep these lie in each other. Reading is recursive, and Python ends at a thousand calls.
MOST_LEVELS = 100


class NamedClassError(LipsimError):
    """A config or an option names what it may not."""


def take_allowed(args: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """Arguments of a command without ``--allow MODULE``, wherever it stands, and these modules.

    Raises:
        ValueError: an option without a module, or what cannot be the name of one.
    """
    rest, allowed = [], []
    words = iter(args)
    for word in words:
        option, equals, module = word.partition("=")
        if option != "--allow":
            rest.append(word)
            continue
        module = module if equals else next(words, "")
        if not all(part.isidentifier() for part in module.split(".")):
            raise LipsimError(f"expected --allow MODULE, such as --allow mylab.students, got {module!r}")
        if module.partition(".")[0] == "jsonargparse":
            raise LipsimError("--allow jsonargparse would let a config change what configs may name; leave it out")
        allowed.append(module)
    return rest, tuple(allowed)


@contextmanager
def only_named(allowed: Sequence[str] = ()) -> Iterator[None]:
    """Within, parsers of jsonargparse import nothing but what :func:`why_refused` lets pass for what was given to them.

    Its settings are those of the process: afterwards ``allowed`` is refused again, and so is all else.

    Args:
        allowed: modules that the user adds.
    """
    set_loader("yaml", _read_yaml, (yaml.YAMLError,))
    set_parsing_settings(import_path_denylist=["*", *DENIED], import_path_allowlist=[*ALLOWED, *_NEEDED])
    set_parsing_settings(import_path_allowlist=list(allowed))
    try:
        yield
    finally:
        given = [module for module in allowed if module not in (*ALLOWED, *_NEEDED)]
        set_parsing_settings(import_path_denylist=given)


def why_refused(path: str, allowed: Sequence[str] = ()) -> str | None:
    """Why a config may not name something, without importing it; None where it may.

    The longest entry that it begins with decides.

    Args:
        path: import path of it.
        allowed: modules that the user adds.
    """
    verdicts = {**dict.fromkeys(DENIED, False), **dict.fromkeys((*ALLOWED, *_NEEDED, *allowed), True)}
    parts = path.split(".")
    entry = next((e for n in range(len(parts), 0, -1) if (e := ".".join(parts[:n])) in verdicts), None)
    if entry is None:
        return f"it is of none of {', '.join((*ALLOWED, *allowed))}"
    if not verdicts[entry]:
        return f"{entry} runs code, starts processes, downloads or unpickles files"
    if entry not in allowed and any(part.startswith("_") for part in parts):
        return f"it is a private part of {parts[0]}"
    return None


def check_named(config: Any, allowed: Sequence[str] = (), files: Sequence[str] = ()) -> None:
    """Refuse a parsed config that names anything but classes that it may name.

    The parser has kept modules of others from being imported. What is left are names that lead through an allowed
    module to something else, and functions: a config chooses what is made, and calls nothing.

    Args:
        config: what the parser made of all options.
        allowed: modules that the user adds.
        files: configs that it was read from.

    Raises:
        NamedClassError: it does; the message names the option, and the file where it is of one.
    """
    for key, value in _named(config):
        path = value if isinstance(value, str) else _import_path(value)
        reason = why_refused(path, allowed)
        if reason is None:
            found = _found(path) if isinstance(value, str) else value
            home = _import_path(found)
            reason = why_refused(home, allowed)
            if reason is not None:
                reason = f"it is {home}, and {reason}"
            elif not inspect.isclass(found) and not any(_within(name, allowed) for name in (path, home)):
                reason = "it is no class"
        if reason is not None:
            raise NamedClassError(refusal(path, reason, key, _file_with(path, files)))


def refusal(path: str, reason: str, key: str, file: str | None = None) -> str:
    """What is said of a name that is refused.

    Args:
        path: import path of what is named.
        reason: of :func:`why_refused`.
        key: of the option.
        file: the config that names it; None: the command line.
    """
    module = path.rpartition(".")[0] or path
    place = f"option {key} of {file}" if file else f"option {key}"
    return f"{path} ({place}) is not run: {reason}; add --allow {module} where you trust it"


def denied_by_parser(message: str) -> str | None:
    """The import path that a parser's message says is denied, if it does."""
    found = re.search(r"Importing '([^']+)' is not allowed", message)
    return found[1] if found else None


def _named(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The classes and functions that a config names, by the option: import paths, or the things themselves."""
    if isinstance(value, Namespace | Mapping):
        items = vars(value) if isinstance(value, Namespace) else value
        for name, item in items.items():
            inner = f"{key}.{name}" if key else str(name)
            if name == "class_path" and isinstance(item, str):
                yield key, item
            else:
                yield from _named(item, inner)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from _named(item, key)
    elif callable(value) and not isinstance(value, os.PathLike):  # the parser's paths can be called
        yield key, value


def _file_with(path: str, files: Sequence[str]) -> str | None:
    """The file that names something, by its last part: the parser may have put a longer path in the place of it."""
    name = path.rpartition(".")[2]
    return next((file for file in files if name in Path(file).read_text(encoding="utf-8")), None)


def _within(path: str, modules: Iterable[str]) -> bool:
    return any(path == module or path.startswith(f"{module}.") for module in modules)


def _import_path(value: Any) -> str:
    """Where something is defined; of what is neither class nor function, its class."""
    if inspect.ismodule(value):
        return value.__name__
    if not (inspect.isclass(value) or inspect.isroutine(value)):
        value = type(value)
    return f"{value.__module__}.{value.__qualname__}"


def _found(path: str) -> Any:
    """What an import path leads to.

    Raises:
        NamedClassError: nothing.
    """
    parts = path.split(".")
    for count in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:count]))
            for name in parts[count:]:
                found = getattr(found, name)
        except ModuleNotFoundError:
            continue
        except AttributeError:
            break
        return found
    raise NamedClassError(f"there is no {path}")


_plain_yaml = get_loader("yaml")
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _read_yaml(text: str) -> Any:
    """A value in YAML, unless a small text would become a large one by its references, or is nested without end.

    Raises:
        ValueError: it would, or is.
    """
    if "{" in text or "[" in text or "\n" in text:
        try:
            _count(yaml.compose(text, Loader=_Loader), {}, 0)
        except yaml.composer.ComposerError:
            pass  # several documents, which the parser refuses itself
    return _plain_yaml(text)


def _count(node: Any, counted: dict[int, int], level: int) -> int:
    """How many values a node is once its references are followed.

    Args:
        node: of a composed document, where a reference is the node itself once more.
        counted: of the nodes that were seen.
        level: how deep it lies.

    Raises:
        ValueError: they are more than :data:`MOST_NODES`, or deeper than :data:`MOST_LEVELS`.
    """
    if level > MOST_LEVELS:  # within itself, for example
        raise LipsimError(f"expected YAML nested in at most {MOST_LEVELS} levels, got more; write it flatter")
    if id(node) not in counted:
        parts = node.value if isinstance(node, yaml.SequenceNode | yaml.MappingNode) else ()
        inner = (part for item in parts for part in (item if isinstance(item, tuple) else (item,)))
        counted[id(node)] = 1 + sum(_count(part, counted, level + 1) for part in inner)
    if counted[id(node)] > MOST_NODES:
        raise LipsimError(
            f"expected YAML of at most {MOST_NODES:,} values once its references (*) are followed, got more; write out "
            "what is meant"
        )
    return counted[id(node)]
