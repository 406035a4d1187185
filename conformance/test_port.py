"""Every port against its oracles: each case of the table, asked as often as the profile says."""

import pytest

from conformance import measure
from conformance.cases import PORT_CASES
from conformance.contract import PortCase
from conformance.ports import Subject


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in PORT_CASES])
def test_port(port: Subject, case: PortCase, record: measure.Record) -> None:
    """The clauses of its case."""
    record.examples = case.prove(port)
    assert record.comparisons, f"{case.name} compared nothing"
