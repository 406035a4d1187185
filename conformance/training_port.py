"""A right port that trains, and the handles by which a fault makes it wrong.

It walks the reference in float64, or in float32, and differentiates it by PyTorch. A fault replaces functions of
``edm2_core`` while the port runs, and only then, so that the oracle stays right; or lines of the training step.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np

from backends.pipeline.checkpoints.states import State
from conformance import oracle
from conformance.examples.numpy_port.adapter import NumpyPort
from conformance.strategies import Batch
from edm2_core import ema, loss, mp, reference, sampler
from edm2_core.network import NetworkConfig, plan

Params = dict[str, np.ndarray]


@dataclass(frozen=True)
class Fault:
    """One way to be wrong: what is replaced (functions by ``module.name``, lines of the step by their name in
    :class:`Step`), and the case that must catch it."""

    name: str
    says: str
    caught_by: str
    functions: Mapping[str, Any] = field(default_factory=dict)
    step: Mapping[str, Callable[..., Any]] = field(default_factory=dict)


_MODULES = {"reference": reference, "sampler": sampler, "loss": loss, "ema": ema}


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
    def keep(s: float, *, nimg: int, batch: int, step: int) -> float:
        return float(ema.beta(s, t_next=nimg, t_delta=batch))

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
    """A right port, with :class:`Step`'s lines; a fault makes it wrong."""

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

    def jvp(self, config: NetworkConfig, params: Any, *given: Any) -> Any:
        with self._wrong():
            return tuple(part.astype(np.float32) for part in oracle.torch_jvp(config, self.cast(params), *given))

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
        zeros = {name: np.zeros_like(params[name]) for name in oracle.trained_names(config)}
        start = State(params=params, moments1=zeros, moments2=zeros, averages=dict.fromkeys(sigma_rels, params),
                      nimg=0, steps=0)  # fmt: skip
        losses, state = self._run(config, start, batches, learning_rates, betas)
        return losses, state.params, state.averages

    def advance(self, config: NetworkConfig, state: State, batches: Sequence[Any], *, learning_rates: Any) -> Any:
        return self._run(config, self.steps.resumed(state), batches, learning_rates, (0.9, 0.99))

    def _run(self, config: NetworkConfig, state: State, batches: Any, rates: Any, betas: Any) -> tuple[Any, State]:
        steps, losses, cast = self.steps, [], self.cast
        with self._wrong():
            for batch, lr in zip(batches, rates, strict=True):
                weights = steps.forced(config, cast(state.params))
                values, gradients = steps.gradients(config, weights, Batch(*batch))
                losses.append(float(values.mean()))
                pairs = {
                    name: steps.moments(cast(state.moments1[name]), cast(state.moments2[name]), gradient, betas)
                    for name, gradient in gradients.items()
                }
                for name, (first, second) in pairs.items():
                    weights[name] = steps.adam(weights[name], first, second, lr=lr, betas=betas, step=state.steps + 1)
                nimg, count = state.nimg + len(batch[0]), len(batch[0])
                averages = {}
                for s, average in state.averages.items():
                    keep, taken = steps.keep(s, nimg=nimg, batch=count, step=state.steps + 1), steps.averaged(
                        config, weights
                    )  # fmt: skip
                    averages[s] = _narrow({n: keep * average[n] + (1 - keep) * taken[n] for n in taken})
                state = State(
                    params=_narrow(steps.kept(config, weights)),
                    moments1=_narrow({name: pair[0] for name, pair in pairs.items()}),
                    moments2=_narrow({name: pair[1] for name, pair in pairs.items()}),
                    averages=averages,
                    nimg=nimg,
                    steps=state.steps + 1,
                )
        return losses, state


def _narrow(arrays: Mapping[str, Any]) -> Params:
    return {name: np.asarray(array, np.float32) for name, array in arrays.items()}
