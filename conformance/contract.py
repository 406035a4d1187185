"""What is a case? One statement of the specification, with what to draw, whom to ask, and how to say what is wrong."""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from conformance import measure, profiles, tolerance
from conformance import strategies as draw
from conformance.oracle import OracleMissing
from conformance.ports import MEMBERS, NotImplementedByPort, Subject
from edm2_core.network import NetworkConfig

Example = Mapping[str, Any]


@dataclass(frozen=True)
class Clause:
    """A row of the contract: how one clause of SPEC.md is proved, in words that a report can show.

    ``draws`` is what is drawn, ``oracle`` what it is held against, ``tolerance`` how close, ``needs`` the members of a
    port without which nothing is proved of it (none: the clause is about ``edm2_core``, through which ports compute).
    """

    number: str
    draws: str
    oracle: str
    tolerance: str
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class PortCase:
    """A question to a port. ``draws`` are the arguments of ``check`` by name, each one that JSON can hold.

    ``clauses`` are numbers of SPEC.md; ``oracle`` and ``tolerance`` words, whose numbers are in ``check``; ``needs``
    members of the port; ``cost`` how many others it costs; ``golden`` whether it wants the golden numbers.
    """

    name: str
    clauses: str
    draws: Mapping[str, st.SearchStrategy[Any]]
    check: Callable[..., None]
    oracle: str
    tolerance: str
    needs: tuple[str, ...]
    cost: int = 1
    golden: bool = False

    def run(self, subject: Subject, example: Example) -> None:
        """Ask once. Raises Disagreement, with everything that a reader needs, where the port is wrong or fails."""
        try:
            self._compare(subject, example)
        except measure.Disagreement as error:
            error.words = self._words(subject, example) | error.words | self._again(subject, example)
            raise
        except (NotImplementedByPort, OracleMissing):
            raise
        except Exception as error:
            words = self._words(subject, example) | {"got": f"{type(error).__name__}: {error}", "wanted": "an answer"}
            again = self._again(subject, example)
            raise measure.Disagreement(f"{subject.name} raised {type(error).__name__}", words | again) from error

    def _compare(self, subject: Subject, example: Example) -> None:
        """``check``; once more, and that counts, with wider tolerances where the example is ill-conditioned."""
        made = measure.Record()
        try:
            with measure.recording(made):
                self.check(subject, **example)
        except measure.Disagreement as error:
            wider = tolerance.ILL_CONDITIONED * self._worst_of_float32(example)
            if not error.ratio <= wider < np.inf:
                raise
            made = measure.Record()
            with measure.recording(made), measure.widened(wider):
                self.check(subject, **example)
        finally:
            measure.record(made)

    def _worst_of_float32(self, example: Example) -> float:
        """The worst error over tolerance when the reference, in float32, is asked; 0: it cannot be."""
        from conformance.training_port import TrainingPort  # which wants what ports run with

        alone = (measure.Disagreement, NotImplementedByPort, OracleMissing)
        with measure.recording(measure.Record()) as record, suppress(*alone):
            self.check(Subject("float32", TrainingPort(dtype=np.float32)), **example)
        return record.worst

    def prove(self, subject: Subject) -> int:
        """Ask as often as the profile says; returns how often. A port that compiles each network is asked less often;
        about few networks in ``dev``, and where a case is dear in ``ci`` too."""
        few = subject.compiles and profiles.current() != "deep"
        narrow = few and (self.cost > 2 or profiles.current() == "dev")
        narrowed = draw.few(dearest=self.cost > 5) if narrow else {}
        draws = {name: narrowed.get(name, how) for name, how in self.draws.items()}
        own = profiles.fewer(self.cost * (10 if few else 1), least=2 if few else 4)
        if few:  # smaller examples would be compiled one by one
            own = settings(own, phases=[phase for phase in own.phases if phase is not Phase.shrink])
        count = 0

        @own
        @given(st.fixed_dictionaries(draws))
        def ask(example: Example) -> None:
            nonlocal count
            count += 1
            self.run(subject, example)

        ask()
        return count

    def _words(self, subject: Subject, example: Example) -> dict[str, str]:
        function = f"{subject.name}: {self.needs[0]}{MEMBERS[self.needs[0]]}"
        said = "; ".join(f"{name} = {_shown(value)}" for name, value in example.items())
        return {"function": function, "inputs": said, "clauses": self.clauses, "oracle": self.oracle}

    def _again(self, subject: Subject, example: Example) -> dict[str, str]:
        line = f"python -m conformance --port {subject.name} --case {self.name} --example '{to_json(example)}'"
        return {"reproduce": line}


def _shown(value: Any) -> str:
    if not isinstance(value, NetworkConfig):
        return repr(value)
    own = (f for f in fields(value) if getattr(value, f.name) != f.default)
    return f"NetworkConfig({', '.join(f'{f.name}={getattr(value, f.name)!r}' for f in own)})"


def to_json(example: Example) -> str:
    """An example as text that a shell takes within single quotes."""
    plain = {name: v.to_json() if isinstance(v, NetworkConfig) else v for name, v in example.items()}
    return json.dumps(plain)


def from_json(text: str) -> dict[str, Any]:
    """The example that :func:`to_json` wrote."""

    def value(found: Any) -> Any:
        if isinstance(found, dict):
            return NetworkConfig(**found)
        return tuple(found) if isinstance(found, list) else found

    return {name: value(found) for name, found in json.loads(text).items()}
