"""What the API reference changes in docstrings before they are read as Markdown: examples are code, roles are names."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|mod|meth|attr|data):`(~?)([\w.]+)`")


class Docstrings(griffe.Extension):
    def on_instance(self, *, obj: Any, **_: Any) -> None:
        """Called for each module, class and function once it is read."""
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(_name, _fenced(obj.docstring.value))


def _name(role: re.Match[str]) -> str:
    tilde, target = role.groups()
    return f"`{target.rpartition('.')[2] if tilde else target.lstrip('.')}`"


def _fenced(text: str) -> str:
    """``text`` with a fence around each doctest, from its first >>> to the next blank line."""
    return re.sub(r"^>>> (?:.+\n?)+", lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", text, flags=re.MULTILINE)
