"""The suite can fail: each seeded wrong port is caught by the case that says so, and the right one by none."""

import numpy as np
import pytest

from conformance import measure, wrong_ports
from conformance.cases import PORT_CASES
from conformance.clauses import proves
from conformance.ports import Subject
from conformance.training_port import Fault, TrainingPort
from conformance.wrong_ports import FAULTS
from edm2_core.network import NetworkConfig

pytest.importorskip("torch", reason="the wrong ports train by PyTorch's derivative of the reference")
COMPILED = "compiled"  # of which it has no variant
ASKED = [case.name for case in PORT_CASES if not case.golden and case.name != COMPILED]


@proves("STEP-2")
@pytest.mark.parametrize("name", ASKED)
def test_the_right_port_is_right(name: str) -> None:
    """The port without a fault passes every case."""
    assert wrong_ports.caught(None, name, examples=3) is None


@proves("API-4")
@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_each_wrong_port_is_caught(fault: Fault) -> None:
    """The named case catches it, and its message is complete."""
    said = wrong_ports.caught(fault, fault.caught_by)
    assert said is not None, f"{fault.caught_by} lets {fault.name} pass"
    assert {"function", "inputs", "got", "wanted", "tolerance", "reproduce"} <= set(said.words)


@proves("API-4")
def test_where_float32_itself_is_far_off_a_port_may_be_and_a_wrong_one_may_not() -> None:
    """A pixel norm of this network divides by nearly 0. The comparison with the wider tolerance is the one recorded."""
    gradients = next(case for case in PORT_CASES if case.name == "gradients")
    config = NetworkConfig(
        img_resolution=12, img_channels=2, model_channels=6, channel_mult=(1.5, 1, 2), num_blocks=1,
        attn_resolutions=(), channels_per_head=6, resample_filter=(1, 3, 3, 1), label_balance=0.1, concat_balance=0.1,
        res_balance=0.8786382255717679, attn_balance=0.8902721712927093, sigma_data=0.5, logvar_channels=3,
    )  # fmt: skip
    example, single = {"config": config, "seed": 0}, Subject("float32", TrainingPort(dtype=np.float32))
    with measure.recording(measure.Record()), measure.widened(1 / 8):  # roundings are twice the tolerance, about
        with pytest.raises(measure.Disagreement):
            gradients.check(single, **example)
        with measure.recording(measure.Record()) as record:
            gradients.run(single, example)
        wrong = next(fault for fault in FAULTS if fault.caught_by == gradients.name)
        with pytest.raises(measure.Disagreement):
            gradients.run(Subject(wrong.name, TrainingPort(wrong)), example)
    assert 0 < record.worst <= 1 / 16
