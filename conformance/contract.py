"""What the contract consists of: a :class:`Clause` is one row, a :class:`PortCase` one question to a port."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from conformance import ill_conditioned, measure, profiles
from conformance import strategies as draw
from conformance.oracle import OracleMissing
from conformance.ports import MEMBERS, NotImplementedByPort, Subject
from edm2_core.network import NetworkConfig

Example = Mapping[str, Any]


@dataclass(frozen=True)
class Clause:
    """How one clause of SPEC.md is proved, in words for the report.

    ``draws`` is what is drawn, ``oracle`` what it is compared with, ``tolerance`` how close it must be. ``member`` is
    the port's member that the clause is proved by; without it the clause is about ``edm2_core`` alone.
    """

    number: str
    draws: str
    oracle: str
    tolerance: str
    member: str | None = None


@dataclass(frozen=True)
class PortCase:
    """A question to a port.

    ``draws`` are the arguments of ``check`` after the port, by name; JSON can hold each. ``oracle`` and ``tolerance``
    describe in words what ``check`` compares with and how closely. ``member`` is the port's member that is asked,
    ``cost`` how many simple cases it costs, ``golden`` whether it needs the golden numbers.
    """

    name: str
    clauses: tuple[str, ...]
    draws: Mapping[str, st.SearchStrategy[Any]]
    check: Callable[..., None]
    oracle: str
    tolerance: str
    member: str
    cost: int = 1
    golden: bool = False

    def run(self, subject: Subject, example: Example) -> None:
        """Ask once. Raises Disagreement, with all that a reader needs, where the port is wrong or raises."""
        try:
            ill_conditioned.checked(partial(self.check, **example), subject)
        except measure.Disagreement as error:
            error.words = self._described(subject, example, error.words)
            raise
        except (NotImplementedByPort, OracleMissing):
            raise
        except Exception as error:
            outcome = {"got": f"{type(error).__name__}: {error}", "wanted": "an answer"}
            words = self._described(subject, example, outcome)
            raise measure.Disagreement(f"{subject.name} raised {type(error).__name__}", words) from error

    def prove(self, subject: Subject) -> int:
        """Ask as often as the profile says; returns how often.

        A port that compiles each network is asked less often; in ``dev``, and in ``ci`` for costly cases, about a few
        fixed networks.
        """
        few = subject.compiles and profiles.current() != "deep"
        fixed = few and (self.cost > 2 or profiles.current() == "dev")
        replaced = draw.few(dearest=self.cost > 5) if fixed else {}
        draws = {name: replaced.get(name, strategy) for name, strategy in self.draws.items()}
        limits = profiles.fewer(self.cost * (10 if few else 1), least=2 if few else 4)
        if few:  # each smaller example would be compiled
            limits = settings(limits, phases=[phase for phase in limits.phases if phase is not Phase.shrink])
        count = 0

        @limits
        @given(st.fixed_dictionaries(draws))
        def ask(example: Example) -> None:
            nonlocal count
            count += 1
            self.run(subject, example)

        ask()
        return count

    def _described(self, subject: Subject, example: Example, outcome: Mapping[str, str]) -> dict[str, str]:
        inputs = "; ".join(f"{name} = {_shown(value)}" for name, value in example.items())
        return {
            "function": f"{subject.name}: {self.member}{MEMBERS[self.member]}",
            "inputs": inputs,
            "clauses": " ".join(self.clauses),
            "oracle": self.oracle,
            **outcome,
            "reproduce": f"python -m conformance --port {subject.name} --case {self.name} "
            f"--example '{to_json(example)}'",
        }


def _chosen(config: NetworkConfig) -> dict[str, Any]:
    """The keywords of ``config`` that differ from the defaults, as JSON can hold them."""
    usual = {field.name: field.default for field in fields(config)} | {"ladder": "G"}
    own = {name: value for name, value in config.to_json().items() if value != usual.get(name)}
    return {name: getattr(value, "value", value) for name, value in own.items()}


def _shown(value: Any) -> str:
    if not isinstance(value, NetworkConfig):
        return repr(value)
    return f"NetworkConfig({', '.join(f'{name}={given!r}' for name, given in _chosen(value).items())})"


def to_json(example: Example) -> str:
    """An example as text that a shell takes within single quotes."""
    return json.dumps({name: _chosen(v) if isinstance(v, NetworkConfig) else v for name, v in example.items()})


def from_json(text: str) -> dict[str, Any]:
    """The example that :func:`to_json` wrote."""

    def value(plain: Any) -> Any:
        if isinstance(plain, dict):
            return NetworkConfig(**plain)
        return tuple(plain) if isinstance(plain, list) else plain

    return {name: value(plain) for name, plain in json.loads(text).items()}
