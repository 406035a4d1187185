"""Ends a run of the suite that was started without its plugin, on which options and fixtures depend."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.has_plugin("conformance.plugin"):
        raise pytest.UsageError("the conformance suite needs its plugin: add -p conformance.plugin")
