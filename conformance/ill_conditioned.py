"""Wider tolerances for ill-conditioned examples, on which float32 itself is far from the exact answer.

The tolerances of :mod:`.tolerance` hold for all but about one in a thousand random networks. Where they do not hold,
the suite evaluates the reference in float32 on the same example. How far that is off is unavoidable rounding, and a
port may be off :data:`FACTOR` times as far. A case asks its question through :func:`checked`, which does this.
"""

from collections.abc import Callable
from contextlib import suppress

import numpy as np

from conformance import measure
from conformance.oracle import OracleMissing
from conformance.ports import NotImplementedByPort, Subject
from conformance.training_port import TrainingPort

FACTOR = 16.0
"""How many times the error of the reference in float32 is allowed.

Normalizing d numbers of rms r amplifies their rounding by 1 / r, and random networks of few channels have some where r
is small. The errors of the reference and of the port are then two draws of one distribution; with three degrees of
freedom, the narrowest head, one is 16 times the other once in 2400 such networks, F(3, 3) > 16^2.
"""

Question = Callable[[Subject], None]
"""Asks a port one example; raises Disagreement where an answer is outside its tolerance."""


def checked(ask: Question, subject: Subject, /) -> None:
    """Ask ``subject``. If an answer is outside its tolerance and the example is ill-conditioned, ask again with wider
    tolerances; that second result is the one recorded."""
    record = measure.Record()
    try:
        with measure.recording(record):
            ask(subject)
    except measure.Disagreement as error:
        factor = FACTOR * worst_of_float32(ask)
        if not error.ratio <= factor < np.inf:
            raise
        record = measure.Record()
        with measure.recording(record), measure.widened(factor):
            ask(subject)
    finally:
        measure.record(record)


def worst_of_float32(ask: Question, /) -> float:
    """The largest error over tolerance of the reference computed in float32; 0 if it cannot answer."""
    with (
        measure.recording(measure.Record()) as record,
        suppress(measure.Disagreement, NotImplementedByPort, OracleMissing),
    ):
        ask(Subject("float32", TrainingPort(dtype=np.float32)))
    return record.worst
