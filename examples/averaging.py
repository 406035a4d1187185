"""What choosing the averaging length after training does: the same seeds from raw weights and from averages.

    python -m examples.averaging                               # needs .[torch,test]; under four minutes on two cores

Trains on handwritten digits at a high, constant learning rate, where raw weights are noisy, and stores averages of two
lengths. Averages of other lengths are made of these afterwards. averaging.png shows samples, with frames around those
that a classifier does not read as the digit asked for, and below them the share of these over the averaging length.
"""

import sys
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from backends.pipeline.checkpoints.snapshots import Snapshot
from backends.pipeline.checkpoints.states import load_state
from backends.pipeline.runs.exit_codes import command
from backends.pipeline.runs.folder import Run
from examples.digits import CLASSES, SAMPLES, Study

STORED = (0.05, 0.10)
LENGTHS = (0.02, 0.03, 0.04, 0.05, 0.07, 0.10, 0.13, 0.16, 0.20, 0.25)
RAW = 0.0  # the raw weights, as an average of length 0
EACH = 2  # samples of each digit that are drawn
NEAR: dict[str, Any] = {"textcoords": "offset points", "size": 18}
INK, RED, BLUE = "#24292f", "#d1242f", "#0969da"


class Measured(NamedTuple):
    """Samples, uint8 [n, 1, 8, 8], which of them are misread, their percentage, and the Fréchet distance."""

    images: np.ndarray
    wrong: np.ndarray
    misread: float
    distance: float


def averaging(
    lr: float = 0.2,
    duration: str = "40Ki",
    samples: int = SAMPLES,
    folder: Path = Path("averaging"),
    out: Path = Path("averaging.png"),
) -> None:
    """Train at LR for DURATION images, under FOLDER, and draw OUT of SAMPLES digits a length."""
    study = Study(folder)
    options = ("--lr", lr, "--decay", 0, "--rampup", "2Ki", "--snapshot", "1Ki")
    run = study.train(f"{lr:g}-{duration}", *options, "--sigma-rels", *STORED, "--duration", duration)
    networks = {RAW: raw_weights(run)} | dict(zip(LENGTHS, study.averages(run, LENGTHS), strict=True))
    print("\nsigma_rel  misread  Fréchet")
    measured = {}
    for length, network in networks.items():
        one = measured[length] = measure(study, network, samples)
        name = "raw" if length == RAW else f"{length:.2f}"
        print(f"{name:9}  {one.misread:6.1f}%  {one.distance:7.4f}", flush=True)
    draw(measured, out)


def raw_weights(run: Run) -> Snapshot:
    """The weights that training ended with."""
    config, path = run.config(), run.state_path
    assert path is not None  # the run is complete
    state = load_state(path, config.network, config.hyper.lengths)
    return Snapshot(params=state.params, config=config.network, nimg=state.nimg, length=None, data=config.format)


def measure(study: Study, network: Snapshot, samples: int) -> Measured:
    """The samples are sorted by the digit that was asked for, EACH of every digit first."""
    images, labels = study.sample(network, count=samples)
    ranks = np.array([np.sum(labels[:i] == label) for i, label in enumerate(labels)])
    order = np.lexsort((labels, ranks >= EACH))
    wrong = np.array([study.accuracy(images[i : i + 1], labels[i : i + 1]) < 1 for i in order])
    return Measured(images[order], wrong, 100 * wrong.mean(), study.frechet(images))


def draw(measured: Mapping[float, Measured], path: Path) -> None:
    """Samples of the raw weights, the best length and the longest; under them the share misread of all lengths."""
    figure = Figure(figsize=(9.7, 9.2))
    best = min(LENGTHS, key=lambda length: measured[length].misread)
    titles = {RAW: ("raw weights", RED), best: (f"sigma_rel {best:.2f}", BLUE)}
    titles |= {length: (f"sigma_rel {length:.2f}", INK) for length in LENGTHS[-1:] if length != best}
    for i, (length, title) in enumerate(titles.items()):
        draw_samples(figure.add_axes((0.265, 0.825 - 0.19 * i, 0.725, 0.165)), measured[length], *title)
    draw_chart(figure.add_axes((0.115, 0.085, 0.875, 0.33)), {x: each.misread for x, each in measured.items()}, best)
    drawn = BytesIO()
    figure.savefig(drawn, format="png", dpi=144)
    Image.open(drawn).convert("RGB").quantize(64).save(path)  # a third of the size


def draw_samples(axes: Axes, shown: Measured, title: str, colour: str) -> None:
    """EACH rows of ten digits, enlarged smoothly; those that are not read as asked for are framed."""
    count, side = EACH * CLASSES, shown.images.shape[-1] + 2
    cells = np.pad(shown.images[:count, 0], ((0, 0), (1, 1), (1, 1))).reshape(EACH, CLASSES, side, side)
    pixels = cells.transpose(0, 2, 1, 3).reshape(EACH * side, CLASSES * side)
    axes.imshow(pixels, cmap="gray_r", vmin=0, vmax=255, interpolation="bicubic", aspect="auto")
    for i in np.flatnonzero(shown.wrong[:count]):
        corner = (i % CLASSES * side - 0.2, i // CLASSES * side - 0.2)
        axes.add_patch(Rectangle(corner, side - 0.6, side - 0.6, fill=False, ec=RED, lw=3.5, clip_on=False))
    axes.set_axis_off()
    axes.text(-0.03, 0.6, title, transform=axes.transAxes, ha="right", size=19, weight="bold", color=colour)
    figures = f"{shown.misread:.0f}% misread\nFréchet {shown.distance:.2f}"
    axes.text(-0.03, 0.52, figures, transform=axes.transAxes, ha="right", va="top", size=18, color=INK)


def draw_chart(axes: Axes, misread: Mapping[float, float], best: float) -> None:
    axes.axhline(misread[RAW], color=RED, linestyle="--", linewidth=3)
    axes.annotate("raw weights", (LENGTHS[-1], misread[RAW]), (0, 8), **NEAR, color=RED, ha="right")
    axes.plot(LENGTHS, [misread[x] for x in LENGTHS], color=BLUE, linewidth=3, marker="o", markersize=8)
    axes.plot(STORED, [misread[x] for x in STORED], "o", color=BLUE, markersize=17, label="stored in training")
    axes.plot([], [], "o", color=BLUE, markersize=8, label="made afterwards")
    axes.annotate(f"best: {best:.2f}", (best, misread[best]), (0, 18), **NEAR, color=BLUE, ha="center")
    axes.set_ylim(0, 1.2 * max(misread.values()))
    axes.set_xlabel("averaging length sigma_rel, chosen after training", size=18)
    axes.set_ylabel("digits misread, %", size=18)
    axes.tick_params(labelsize=16)
    axes.legend(fontsize=17, loc=(0.3, 0.4), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    sys.exit(command(tyro.cli)(averaging))
