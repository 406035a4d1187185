"""Ends a run of the suite that was started without its plugin, on which options and fixtures depend."""

import pytest


def pytest_collection(session: pytest.Session) -> None:
    if not session.config.pluginmanager.has_plugin("conformance.plugin"):
        raise pytest.UsageError("the conformance suite needs its plugin: add -p conformance.plugin")
