"""Post-hoc EMA in Lightning: one callback, then the averaging length is chosen after training.

With DDP nothing changes: it averages the gradients before each step, so all processes have the same weights and track
the same averages; the first one writes the snapshots.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import lightning.pytorch as lightning
import numpy as np
import torch
import tyro
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from backends.pipeline.data.datasets import open_dataset
from backends.torch.callbacks.lightning import PosthocEMA
from backends.torch.ema import best_length

BATCH, TRAINING = 16, 800  # images per step, and to train on


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return cross_entropy(self.layers(batch[0] + 0.5 * torch.randn_like(batch[0])), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def main(*, epochs: int = 20, folder: Path | None = None) -> None:
    """Train for EPOCHS, with snapshots in FOLDER (empty; by default a temporary one); then choose a length."""
    lightning.seed_everything(0, verbose=False)
    data, order = open_dataset("digits"), np.random.default_rng(0).permutation(1797)
    torch.set_num_threads(1)  # the network is too small to use more
    x, y = torch.from_numpy(data.format.codec.encode(data.read(order))).flatten(1), torch.from_numpy(data.labels(order))
    model, training = Classifier(), TensorDataset(x[:TRAINING], y[:TRAINING])

    @torch.no_grad()
    def held_out_loss(model: nn.Module) -> float:
        return cross_entropy(model.get_submodule("layers")(x[TRAINING:]), y[TRAINING:]).item()

    with TemporaryDirectory() as temporary:
        folder = folder or Path(temporary)
        callbacks = [PosthocEMA(folder / "snapshots", save_every=50)]
        trainer = lightning.Trainer(max_epochs=epochs, callbacks=callbacks, default_root_dir=folder)
        trainer.fit(model, DataLoader(training, batch_size=BATCH, shuffle=True))
        best = best_length(folder / "snapshots", like=model, metric=held_out_loss)
    print(f"length  held-out loss\nraw     {held_out_loss(model):10.6g}\n{best}")


if __name__ == "__main__":
    tyro.cli(main)
