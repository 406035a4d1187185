"""Training that starts from a trained network: the arrays that fit are taken, the others are fresh."""

from dataclasses import dataclass

import numpy as np

from backends.pipeline.checkpoints.snapshots import Snapshot
from edm2_core.errors import InputError
from edm2_core.network import NetworkConfig, initialize, plan
from edm2_core.state import Arrays, State

from .config import TrainConfig
from .networks import stored_network


@dataclass(frozen=True)
class Initial:
    """Parameters to start from. ``fresh``: names of those that the trained network does not have in this shape;
    ``unused``: names of its arrays that are not taken."""

    params: Arrays
    fresh: tuple[str, ...]
    unused: tuple[str, ...]

    def state(self, config: TrainConfig) -> State:
        """The state before the first step: the clock is 0, and the averages begin anew."""
        trained = [name for name, parameter in plan(config.network).parameters.items() if parameter.trained]
        return State.start(self.params, trained=trained, lengths=config.hyper.lengths)


def initial(config: TrainConfig, /) -> Initial:
    """The parameters of the network at ``config.init``, a snapshot or a run, for the network of ``config``.

    It may have other classes, channels or a condition: arrays whose shapes differ are drawn as without it. It may have
    another resolution: blocks correspond by level.

    Raises:
        InputError: no such network, or one of which nothing fits.
    """
    source = stored_network(str(config.init))
    fresh = initialize(config.network, seed=config.seed)
    given = renamed(source, config.network)
    fits = {name: given[name] for name, array in fresh.items() if name in given and given[name].shape == array.shape}
    if not any(array.ndim > 1 for array in fits.values()):
        raise InputError(f"--init must be a network like the one to train, got none of its weights in {config.init}")
    params = {name: np.asarray(fits.get(name, array), np.float32) for name, array in fresh.items()}
    missing = tuple(name for name in fresh if name not in fits)
    return Initial(params, missing, tuple(name for name in given if name not in fits))


def renamed(source: Snapshot, config: NetworkConfig, /) -> Arrays:
    """The arrays of ``source`` by the names that they have at the resolution of ``config``."""
    own, wanted = ([f"{h}x{w}_" for h, w in c.level_sizes] for c in (source.required_config(), config))
    names = {
        f"unet.{side}.{a}": f"unet.{side}.{b}" for side in ("enc", "dec") for a, b in zip(own, wanted, strict=False)
    }

    def rename(name: str) -> str:
        start = next((start for start in names if name.startswith(start)), "")
        return names.get(start, "") + name.removeprefix(start)

    return {rename(name): array for name, array in source.params.items()}
