"""A complete and correct port over the reference, into which a fault can be inserted.

It computes in float64 or float32 and differentiates with PyTorch. A fault replaces functions of ``edm2_core`` while
the port runs, and only then, so that the oracle stays right; or lines of the training step.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np

from conformance import oracle
from conformance.examples.numpy_port.adapter import NumpyPort
from conformance.strategies import Batch
from edm2_core import loss, mp, precond, reference, sampler
from edm2_core.ema import Length
from edm2_core.network import NetworkConfig, plan
from edm2_core.state import State

Params = dict[str, np.ndarray]


@dataclass(frozen=True)
class Fault:
    """One error: the functions (by ``module.name``) and lines of the step (by their name in :class:`Step`) that it
    replaces, and the case that must catch it."""

    name: str
    says: str
    caught_by: str
    functions: Mapping[str, Any] = field(default_factory=dict)
    step: Mapping[str, Callable[..., Any]] = field(default_factory=dict)


_MODULES = {"reference": reference, "precond": precond, "sampler": sampler, "loss": loss}


class Step:
    """The lines of a training step that a fault may replace. ``weights`` are all parameters by name."""

    @staticmethod
    def forced(config: NetworkConfig, weights: Params) -> Params:
        table = plan(config).parameters
        return {name: mp.force_weight_norm(w) if table[name].normalized else w for name, w in weights.items()}

    @staticmethod
    def gradients(config: NetworkConfig, weights: Params, batch: Batch) -> tuple[np.ndarray, Params]:
        return oracle.torch_gradients(config, weights, batch)

    @staticmethod
    def moments(first: Any, second: Any, gradient: Any, betas: tuple[float, float]) -> tuple[Any, Any]:
        return betas[0] * first + (1 - betas[0]) * gradient, betas[1] * second + (1 - betas[1]) * gradient**2

    @staticmethod
    def adam(weight: Any, first: Any, second: Any, *, lr: float, betas: tuple[float, float], step: int) -> Any:
        root = np.sqrt(second / (1 - betas[1] ** step)) + 1e-8
        return weight - lr * first / (1 - betas[0] ** step) / root

    @staticmethod
    def keep(length: Length, *, nimg: int, batch: int, step: int) -> float:
        return length.beta(t_next=nimg, t_delta=batch)

    @staticmethod
    def averaged(config: NetworkConfig, weights: Params) -> Params:
        return weights

    @staticmethod
    def kept(config: NetworkConfig, weights: Params) -> Params:
        return weights

    @staticmethod
    def resumed(state: State) -> State:
        return state


class TrainingPort(NumpyPort):
    """The correct port, or one with a fault."""

    name, version = "right", "1"

    def __init__(self, fault: Fault | None = None, *, dtype: Any = np.float64):
        self.fault, self.steps, self.dtype = fault, Step(), dtype
        if fault:
            self.name = fault.name
            for line, wrong in fault.step.items():
                setattr(self.steps, line, wrong)

    @contextmanager
    def _wrong(self) -> Iterator[None]:
        functions = self.fault.functions if self.fault else {}
        patches = [mock.patch.object(_MODULES[path.partition(".")[0]], path.partition(".")[2], wrong)
                   for path, wrong in functions.items()]  # fmt: skip
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in patches:
                patch.stop()

    def denoise(self, *arguments: Any) -> Any:
        with self._wrong():
            return super().denoise(*arguments)

    def sample(self, *arguments: Any, **options: Any) -> Any:
        with self._wrong():
            return super().sample(*arguments, **options)

    def loss_and_gradients(self, config: NetworkConfig, params: Any, *batch: Any) -> Any:
        with self._wrong():
            values, gradients = self.steps.gradients(config, self.cast(params), Batch(*batch))
        return values.astype(np.float32), _narrow(gradients)

    def jvp(self, config: NetworkConfig, params: Any, *given: Any, **condition: Any) -> Any:
        with self._wrong():
            answer = oracle.torch_jvp(config, self.cast(params), *given, **condition)
        return tuple(part.astype(np.float32) for part in answer)

    def variants(self) -> dict[str, Any]:
        return {"float32": TrainingPort(self.fault, dtype=np.float32)}

    def train(
        self,
        config: NetworkConfig,
        params: Any,
        batches: Sequence[Any],
        *,
        learning_rates: Sequence[float],
        betas: tuple[float, float],
        sigma_rels: Sequence[float],
    ) -> Any:
        trained = oracle.trained_names(config)
        start = State.start(params, trained=trained, lengths=map(Length.of, sigma_rels))
        losses, state = self._run(config, start, batches, learning_rates, betas)
        return losses, state.params, {length.value: average for length, average in state.averages.items()}

    def advance(self, config: NetworkConfig, state: State, batches: Sequence[Any], *, learning_rates: Any) -> Any:
        return self._run(config, self.steps.resumed(state), batches, learning_rates, (0.9, 0.99))

    def _run(self, config: NetworkConfig, state: State, batches: Any, rates: Any, betas: Any) -> tuple[Any, State]:
        losses = []
        with self._wrong():
            for batch, lr in zip(batches, rates, strict=True):
                loss, state = self._step(config, state, Batch(*batch), lr, betas)
                losses.append(loss)
        return losses, state

    def _step(self, config: NetworkConfig, state: State, batch: Batch, lr: float, betas: Any) -> tuple[float, State]:
        lines, cast = self.steps, self.cast
        size, nimg, step = len(batch.images), state.nimg + len(batch.images), state.steps + 1
        weights = lines.forced(config, cast(state.params))
        values, gradients = lines.gradients(config, weights, batch)
        moments1, moments2 = {}, {}
        for name, gradient in gradients.items():
            first, second = lines.moments(cast(state.moments1[name]), cast(state.moments2[name]), gradient, betas)
            weights[name] = lines.adam(weights[name], first, second, lr=lr, betas=betas, step=step)
            moments1[name], moments2[name] = first, second
        averages, averaged = {}, lines.averaged(config, weights)
        for length, average in state.averages.items():
            keep = lines.keep(length, nimg=nimg, batch=size, step=step)
            averages[length] = _narrow({n: keep * average[n] + (1 - keep) * averaged[n] for n in averaged})
        after = State(
            params=_narrow(lines.kept(config, weights)),
            moments1=_narrow(moments1),
            moments2=_narrow(moments2),
            averages=averages,
            nimg=nimg,
            steps=step,
        )
        return float(values.mean()), after


def _narrow(arrays: Mapping[str, Any]) -> Params:
    return {name: np.asarray(array, np.float32) for name, array in arrays.items()}
