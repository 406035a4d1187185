"""The ports under test, by name; each is driven only through the PORT object of ``backends.NAME.port``."""

from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest

FRAMEWORKS = {"torch": "torch"}  # our ports and the package without which they cannot run


@lru_cache
def load(name: str) -> Any:
    """The port called ``name`` here, or the object at ``module:attribute`` anywhere."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module if attribute else f"backends.{module}.port"), attribute or "PORT")


def _absent(framework: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(framework) is None, reason=f"{framework} is not installed")


# a port whose framework is not installed skips and says so; one that is broken fails
each_port = pytest.mark.parametrize(
    "port",
    [pytest.param(name, id=name, marks=_absent(framework)) for name, framework in FRAMEWORKS.items()],
    indirect=True,
)
