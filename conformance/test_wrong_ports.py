"""The suite can fail: each seeded wrong port is caught by the case that says so, and the right one by none."""

import pytest

from conformance import wrong_ports
from conformance.cases import PORT_CASES
from conformance.training_port import Fault, TrainingPort
from conformance.wrong_ports import FAULTS

pytest.importorskip("torch", reason="the wrong ports train by PyTorch's derivative of the reference")
ASKED = [case.name for case in PORT_CASES if not case.golden and hasattr(TrainingPort, case.needs[0])]


@pytest.mark.parametrize("name", ASKED)
def test_the_right_port_is_right(name: str) -> None:
    """STEP-2: the wrong ones without their fault."""
    assert wrong_ports.caught(None, name, examples=3) is None


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_each_wrong_port_is_caught(fault: Fault) -> None:
    """API-4: by the case that the page names, in words that stand alone."""
    said = wrong_ports.caught(fault, fault.caught_by)
    assert said is not None, f"{fault.caught_by} lets {fault.name} pass"
    assert {"function", "inputs", "got", "wanted", "tolerance", "reproduce"} <= set(said.words)
