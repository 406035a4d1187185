"""Clauses and cases belong together: each clause is one row of the contract and has cases, each case its clauses."""

import pytest

from conformance import cases
from conformance.cases import CONTRACT, CORE_CASES, PORT_CASES
from conformance.ports import MEMBERS


def test_the_contract_is_the_specification() -> None:
    """API-4: every clause once, in order."""
    assert [row.number for row in CONTRACT] == list(cases.spec_clauses())
    assert all(row.draws and row.oracle and row.tolerance for row in CONTRACT)


@pytest.mark.parametrize("row", CONTRACT, ids=[row.number for row in CONTRACT])
def test_every_clause_is_proved(row: cases.Clause) -> None:
    """API-4: by a case or a test; of a port too, if the clause says what a port needs for it."""
    assert cases.cases_of(row.number), "no case proves this clause"
    of_ports = [case for case in PORT_CASES if row.number in case.clauses.split()]
    assert {need for case in of_ports for need in case.needs} >= set(row.needs)


def test_every_case_names_its_clause() -> None:
    """API-4: one that SPEC.md has; names of cases are theirs alone."""
    named = {
        **{f"function {case.name}": (case.clause,) for case in CORE_CASES},
        **{f"port {case.name}": tuple(case.clauses.split()) for case in PORT_CASES},
        **cases.property_tests(),
    }
    assert len(named) == len(CORE_CASES) + len(PORT_CASES) + len(cases.property_tests())
    assert [name for name, clauses in named.items() if not clauses] == []
    assert {clause for clauses in named.values() for clause in clauses} <= set(cases.spec_clauses())
    assert {need for case in PORT_CASES for need in case.needs} == set(MEMBERS)


def test_the_specification_shows_its_cases() -> None:
    """API-4: as ``python -m conformance --contract`` writes them."""
    assert cases.with_cases(cases.spec_text()) == cases.spec_text()
