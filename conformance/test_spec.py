"""Clauses and proofs belong together: each clause of SPEC.md is named by a test, each name in a test is a clause."""

import ast
import re
from collections import Counter
from pathlib import Path

import edm2_core
from conformance.cases import CASES
from conformance.conftest import shortfall

HERE = Path(__file__).parent
SPEC = Path(edm2_core.__file__).parent / "SPEC.md"
CLAUSE = re.compile(r"\b(?:API|MP|EMA|PRE|LOSS|LR|SAMPLE|NET|STEP)-\d+\b")


def clauses() -> list[str]:
    return re.findall(r"^#### (\S+) · ", SPEC.read_text(encoding="utf-8"), re.MULTILINE)


def named_by_tests() -> dict[str, set[str]]:
    """For each test, the clauses that its docstring names before its first colon or line's end."""
    tests = {}
    for path in sorted(HERE.glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                opening = re.split(r":|\n", ast.get_docstring(node) or "")[0]
                tests[f"{path.name}::{node.name}"] = set(CLAUSE.findall(opening))
    return tests


def test_every_clause_is_proved() -> None:
    """API-4: and numbered once."""
    numbered = clauses()
    proved = set().union(*named_by_tests().values(), {case.clause for case in CASES})
    assert len(numbered) == len(set(numbered)) > 30
    assert sorted(set(numbered) - proved) == [], "no test names these clauses"
    assert sorted(proved - set(numbered)) == [], "SPEC.md has no such clauses"


def test_every_test_names_its_clause() -> None:
    """API-4"""
    assert [test for test, named in named_by_tests().items() if not named] == []


def test_a_run_that_proved_nothing_fails() -> None:
    """API-4: all skipped, or golden numbers present and skipped."""
    assert shortfall(Counter(passed=3, skipped=1), []) is None
    assert shortfall(Counter(), []) is None
    assert "every conformance test was skipped" in (shortfall(Counter(skipped=2), []) or "")
    assert "1 skipped though golden numbers are there" in (shortfall(Counter(passed=2, skipped=1), ["a"]) or "")
