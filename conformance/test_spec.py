"""Clauses and cases belong together: each clause is one row of the contract and has cases, each case its clauses."""

import pytest

from conformance import cases
from conformance.cases import CONTRACT, CORE_CASES, PORT_CASES
from conformance.clauses import proves, spec_clauses
from conformance.contract import Clause
from conformance.ports import MEMBERS


@proves("API-4")
def test_the_contract_is_the_specification() -> None:
    """Every clause is in the contract once, in order."""
    assert [row.number for row in CONTRACT] == list(spec_clauses())
    assert all(row.draws and row.oracle and row.tolerance for row in CONTRACT)


@proves("API-4")
@pytest.mark.parametrize("row", CONTRACT, ids=[row.number for row in CONTRACT])
def test_every_clause_is_proved(row: Clause) -> None:
    """Each clause has a case or a test, and a case of its port member if it names one."""
    assert cases.cases_of(row.number), "no case proves this clause"
    assert row.member is None or row.member in {case.member for case in PORT_CASES if row.number in case.clauses}


@proves("API-4")
def test_every_case_names_its_clauses() -> None:
    """Each case and test names clauses that SPEC.md has; no two cases share a name."""
    clauses = {
        **{f"function {case.name}": case.clauses for case in CORE_CASES},
        **{f"port {case.name}": case.clauses for case in PORT_CASES},
        **cases.property_tests(),
    }
    assert len(clauses) == len(CORE_CASES) + len(PORT_CASES) + len(cases.property_tests())
    assert [name for name, numbers in clauses.items() if not numbers] == []
    assert {number for numbers in clauses.values() for number in numbers} <= set(spec_clauses())
    assert {case.member for case in PORT_CASES} == set(MEMBERS)
