"""Every port against its oracles: each case of the table, asked as often as the profile says."""

import pytest

from conformance import measure
from conformance.cases import PORT_CASES
from conformance.contract import PortCase
from conformance.ports import Subject


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in PORT_CASES])
def test_port(edm2_port: Subject, case: PortCase, edm2_record: measure.Record) -> None:
    edm2_record.examples = case.prove(edm2_port)
    assert edm2_record.comparisons, f"{case.name} compared nothing"
