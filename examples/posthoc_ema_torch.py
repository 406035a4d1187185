"""Post-hoc EMA in a training loop of one's own: train once, then choose how long to average the weights.

The network is an ordinary one that reads digits under noise, at a constant learning rate so high that its weights never
come to rest. Averaging calms them; over too long, it brings back what had not been learned yet. The best length lies
in between, and nobody has to know it before training: stored averages of two lengths give all others afterwards.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import tyro
from torch import nn
from torch.nn.functional import cross_entropy

from backends.pipeline.data.datasets import open_dataset, to_model
from backends.torch.ema import PowerEMA, reconstruct

BATCH, SAVE_EVERY, TRAINING = 16, 2000, 800  # images a step, from snapshot to snapshot, and to learn from
LENGTHS = (0.02, 0.03, 0.04, 0.05, 0.07, 0.10, 0.13, 0.17, 0.22, 0.28)  # shares of training that averages reach back


def main(*, images: int = 32_000, folder: Path | None = None) -> None:
    """Train on IMAGES images, with snapshots in FOLDER (an empty one; none: a temporary one); then compare lengths."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # more would only wait for each other, the network is so small
    data, order = open_dataset("digits"), np.random.default_rng(0).permutation(1797)
    x, y = torch.from_numpy(to_model(data.images(order))).flatten(1), torch.from_numpy(data.labels(order))
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with TemporaryDirectory() as temporary:
        folder = folder or Path(temporary)
        ema = PowerEMA(model)  # two averages, of length 0.05 and 0.10
        for seen in range(BATCH, images + 1, BATCH):
            picks = torch.randint(TRAINING, (BATCH,))
            loss = cross_entropy(model(x[picks] + 0.5 * torch.randn(BATCH, 64)), y[picks])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema.update(time=seen, delta=BATCH)  # exact for any delta: every k-th step, with delta=k * BATCH, will do
            if seen % SAVE_EVERY == 0:
                ema.save(folder)
        choices = {"raw": model.state_dict()} | {f"{s:.2f}": reconstruct(folder, sigma_rel=s) for s in LENGTHS}
    print("length  held-out loss  accuracy")
    for name, weights in choices.items():
        with torch.no_grad():
            logits = torch.func.functional_call(model, weights, x[TRAINING:])
        accuracy = (logits.argmax(dim=1) == y[TRAINING:]).float().mean()
        print(f"{name:6}  {cross_entropy(logits, y[TRAINING:]):13.4f}  {accuracy:8.1%}")


if __name__ == "__main__":
    tyro.cli(main)
