"""Examples in the docstrings of edm2_core run, and its public functions say what they do."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import edm2_core

MODULES = [name for _, name, _ in pkgutil.walk_packages(edm2_core.__path__, "edm2_core.")]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("name", MODULES)
def test_public_functions_and_classes_are_documented(name):
    module = importlib.import_module(name)
    own = [value for value in vars(module).values() if getattr(value, "__module__", None) == name]
    public = [one for one in own if inspect.isroutine(one) or inspect.isclass(one) if not one.__name__.startswith("_")]
    members = [
        member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        for one in public
        if inspect.isclass(one) and not getattr(one, "_is_protocol", False)
        for key, member in vars(one).items()
        if not key.startswith("_") and (isinstance(member, property | classmethod) or inspect.isfunction(member))
    ]
    assert [one.__qualname__ for one in (*public, *members) if not one.__doc__] == []
