"""The clauses of SPEC.md, and the decorator with which a test names those that it proves."""

import re
from collections.abc import Callable
from importlib.resources import files
from typing import Any, TypeVar

Test = TypeVar("Test", bound=Callable[..., Any])


def proves(*clauses: str) -> Callable[[Test], Test]:
    """Decorator: the test proves these clauses. It is the outermost decorator.

    @proves("EMA-3")
    @given(lengths)
    def test_first_update_copies(s): ...
    """

    def mark(test: Test) -> Test:
        setattr(test, "clauses", clauses)  # noqa: B010
        return test

    return mark


def clauses_of(test_or_case: Any) -> tuple[str, ...]:
    """The clauses of a test with :func:`proves`, or of a case of a table; none for anything else."""
    return getattr(test_or_case, "clauses", ())


def spec_text() -> str:
    return files("edm2_core").joinpath("SPEC.md").read_text(encoding="utf-8")


def spec_clauses() -> dict[str, str]:
    """The titles of SPEC.md's clauses by number, in order."""
    return dict(re.findall(r"^#### (\S+) · (.*)$", spec_text(), re.MULTILINE))
