"""The ports under test, by name; each is driven only through the PORT object of ``backends.NAME.port``."""

from collections.abc import Iterable
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest

FRAMEWORKS = {"torch": "torch", "jax": "jax", "mlx": "mlx"}  # our ports and the package without which they cannot run
COMPILED = ("jax",)  # each new network takes seconds to compile: not for hundreds of random ones


@lru_cache
def load(name: str) -> Any:
    """The port called ``name`` here, or the object at ``module:attribute`` anywhere."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module if attribute else f"backends.{module}.port"), attribute or "PORT")


def _absent(framework: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(framework) is None, reason=f"{framework} is not installed")


def _each(names: Iterable[str]) -> pytest.MarkDecorator:
    """A port whose framework is not installed skips and says so; one that is broken fails."""
    params = [pytest.param(name, id=name, marks=_absent(FRAMEWORKS[name])) for name in names]
    return pytest.mark.parametrize("port", params, indirect=True)


each_port = _each(FRAMEWORKS)
each_eager_port = _each(name for name in FRAMEWORKS if name not in COMPILED)
