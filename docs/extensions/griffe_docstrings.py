"""An extension of griffe: what it has to know of this package to show docstrings and public names as they are meant."""

from __future__ import annotations

import re
from typing import Any

from griffe import Alias, Extension, GriffeLoader, Module, Object

_ROLE = re.compile(r":(func|class|mod|meth|attr|data|exc):`~?\.?([\w.]+)`")
_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)  # the plural is a section, the singular a box of running text
_BARE = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)  # an example in no section


class Docstrings(Extension):
    """Roles become links, examples stay as they are, and functions hide the modules of their name."""

    def on_package(self, *, pkg: Module, loader: GriffeLoader, **_: Any) -> None:
        """Called once all of a package is read."""
        if pkg.name == "lipsim":
            _translate(pkg)
            loader.resolve_aliases(implicit=True, external=False)
            for room in pkg.modules.values():
                _prefer_functions(room)


def _translate(obj: Object) -> None:
    if obj.docstring is not None:
        text = _ROLE.sub(lambda match: _link(*match.groups(), obj), obj.docstring.value)
        obj.docstring.value = _BARE.sub(r"```pycon\n\g<0>\n```", _EXAMPLE.sub("Examples:", text))
    for member in obj.members.values():
        if not isinstance(member, Alias):
            _translate(member)


def _link(role: str, name: str, obj: Object) -> str:
    """A link where the reference has the name, and the name alone where it has not."""
    if name.startswith("lipsim."):
        path = name
    elif role in ("meth", "attr") and "." not in name:  # of the class itself
        path = f"{obj.path if obj.is_class or obj.parent is None else obj.parent.path}.{name}"
    else:
        path = f"{obj.module.path}.{name}"
    return f'<autoref identifier="{path}" optional><code>{name}</code></autoref>'


def _prefer_functions(room: Module) -> None:
    """``lipsim.attacks.pgd`` is the function, and not the module that it comes from."""
    for name in map(str, room.exports or []):
        module = room.members.get(name)
        if isinstance(module, Module) and name in module.members:
            room.members[name] = Alias(name, module.members[name], parent=room)
