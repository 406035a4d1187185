"""Post-hoc EMA in your own PyTorch loop: train once, then choose the averaging length.

The network is a classifier of noisy digits, trained at a constant learning rate that is too high for its weights to
converge. Averaging removes that noise, but too long an average includes weights from early in training. The best length
is in between and is chosen after training: snapshots of two averages give any other length.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import tyro
from torch import nn
from torch.nn.functional import cross_entropy

from backends.pipeline.data.datasets import open_dataset
from backends.torch.ema import PowerEMA, reconstruct

BATCH, SAVE_EVERY, TRAINING = 16, 2000, 800  # images per step, between snapshots, and to train on
LENGTHS = (0.02, 0.03, 0.04, 0.05, 0.07, 0.10, 0.13, 0.17, 0.22, 0.28)  # sigma_rel


def main(*, images: int = 32_000, folder: Path | None = None) -> None:
    """Train on IMAGES images, with snapshots in FOLDER (empty; by default a temporary one); then compare lengths."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the network is too small to use more
    data, order = open_dataset("digits"), np.random.default_rng(0).permutation(1797)
    x, y = torch.from_numpy(data.format.codec.encode(data.read(order))).flatten(1), torch.from_numpy(data.labels(order))
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
            ema.update(time=seen, delta=BATCH)  # exact for any delta: or every k steps, with delta=k * BATCH
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
