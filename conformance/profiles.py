"""Hypothesis profiles: ``dev`` while writing, ``ci`` with the same examples each time, ``deep`` before a release."""

from typing import Any

from hypothesis import HealthCheck, Phase, settings

# No deadline, because first calls compile. Drawing configs is slow by Hypothesis' standards. The explain phase tells
# nothing about arithmetic. One failure at a time: the report shows the smallest.
_COMMON: dict[str, Any] = {
    "deadline": None,
    "phases": [phase for phase in Phase if phase is not Phase.explain],
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
    "report_multiple_bugs": False,
}
PROFILES: dict[str, dict[str, Any]] = {
    "dev": {"max_examples": 20},
    "ci": {"max_examples": 30, "derandomize": True, "database": None},
    "deep": {"max_examples": 2000},
}
for _name, _own in PROFILES.items():
    settings.register_profile(_name, **_COMMON, **_own)


def load(name: str) -> None:
    """Select the profile. Call it before tests are imported: Hypothesis reads it when it decorates them."""
    settings.load_profile(name)


def current() -> str:
    return settings.get_current_profile_name()


def fewer(divisor: int, *, least: int = 4) -> settings:
    """Settings for a test as costly as ``divisor`` others: that many times fewer examples, not below ``least``."""
    return settings(max_examples=max(least, settings().max_examples // divisor))
