"""Post-hoc EMA, a fixed decay and switch EMA on one task: a classifier of noisy digits.

For each seed the network is trained once as it is, with averages of fixed decay 0.99 and 0.999 (PyTorch's
``AveragedModel``) and the tracker of post-hoc EMA beside it; and once more for each decay with switch EMA, where the
weights are replaced by the average after each epoch (arXiv 2402.09240). The length of the post-hoc average is chosen on
validation images; losses are those of test images. Then what an update costs.
"""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from backends.pipeline.data.datasets import open_dataset
from backends.torch.ema import PowerEMA, best_length, reconstruct

BATCH, TRAINING, VALIDATION = 16, 800, 500  # images per step, to train on, to choose by; the other 497 test
DECAYS = (0.99, 0.999)
Data = tuple[Tensor, Tensor]
After = Callable[[nn.Module, int], None]  # called after each step with the network and the number of steps


def digits(seed: int) -> tuple[Data, Data, Data]:
    data, order = open_dataset("digits"), np.random.default_rng(seed).permutation(1797)
    x, y = torch.from_numpy(data.format.codec.encode(data.read(order))).flatten(1), torch.from_numpy(data.labels(order))
    sizes = [TRAINING, VALIDATION, 1797 - TRAINING - VALIDATION]
    training, validation, test = zip(x.split(sizes), y.split(sizes), strict=True)
    return training, validation, test


def loss(model: nn.Module, data: Data) -> float:
    with torch.no_grad():
        return cross_entropy(model(data[0]), data[1]).item()


def train(seed: int, data: Data, epochs: int, after: Callable[[nn.Module], After]) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer, call, steps = torch.optim.Adam(model.parameters(), lr=0.01), after(model), 0
    for _ in range(epochs):
        for picks in torch.randperm(TRAINING).split(BATCH):
            x = data[0][picks]
            optimizer.zero_grad()
            cross_entropy(model(x + 0.5 * torch.randn_like(x)), data[1][picks]).backward()
            optimizer.step()
            call(model, steps := steps + 1)
    return model


def fixed(model: nn.Module, decay: float) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))


def switched(decay: float) -> Callable[[nn.Module], After]:
    def begin(model: nn.Module) -> After:
        average = fixed(model, decay)

        def after(model: nn.Module, steps: int) -> None:
            average.update_parameters(model)
            if steps % (TRAINING // BATCH) == 0:
                model.load_state_dict(average.module.state_dict())

        return after

    return begin


def compare(seed: int, epochs: int, folder: Path, times: list[float]) -> dict[str, float]:
    """The test loss of each method; ``times`` gets those of the updates."""
    training, validation, test = digits(seed)
    averages: dict[str, AveragedModel] = {}

    def begin(model: nn.Module) -> After:
        averages.update({f"fixed decay {decay}": fixed(model, decay) for decay in DECAYS})
        ema = PowerEMA(model)

        def after(model: nn.Module, steps: int) -> None:
            for average in averages.values():
                average.update_parameters(model)
            start = perf_counter()
            ema.update(time=steps, delta=1)
            times.append(perf_counter() - start)
            if steps % (TRAINING // BATCH) == 0:
                ema.save(folder)

        return after

    model = train(seed, training, epochs, begin)
    losses = {"raw weights": loss(model, test)} | {name: loss(one.module, test) for name, one in averages.items()}
    losses |= {f"switch EMA {d}": loss(train(seed, training, epochs, switched(d)), test) for d in DECAYS}
    best = best_length(folder, like=model, metric=lambda model: loss(model, validation))
    model.load_state_dict(reconstruct(folder, sigma_rel=best.sigma_rel, like=model))
    return losses | {"post-hoc": loss(model, test), "its length": best.sigma_rel}


def main(*, epochs: int = 40, seeds: int = 3) -> None:
    """Train for EPOCHS with each of SEEDS, two or more; print mean and standard deviation of the test losses."""
    torch.set_num_threads(1)  # the network is too small to use more
    times: list[float] = []
    with TemporaryDirectory() as temporary:
        results = [compare(seed, epochs, Path(temporary, str(seed)), times) for seed in range(seeds)]
    for name in results[0]:
        values = np.array([result[name] for result in results])
        print(f"{name:18}  {values.mean():.4f} +- {values.std(ddof=1):.4f}  ", *values.round(4))
    start = perf_counter()
    train(0, digits(0)[0], epochs, lambda model: lambda model, steps: None)
    step = (perf_counter() - start) / (epochs * TRAINING / BATCH)
    print(f"a step {1e3 * step:.3f} ms, an update of two averages {1e3 * np.median(times):.3f} ms")


if __name__ == "__main__":
    tyro.cli(main)
