"""What does the length of the average change? A picture at the end: a row for each, the same seeds in all."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from .images import save_rows
from .reconstruct import reconstruct
from .runs import Run
from .sampling import Job, OpenSampler, sample_images
from .snapshots import Snapshot

RECONSTRUCTED = (0.02, 0.05, 0.10, 0.15, 0.20)
_COLUMNS = 10


def draw_lengths(
    run: Run, raw: Mapping[str, np.ndarray], open_sampler: OpenSampler, *, nimg: int | None = None
) -> Path | None:
    """Draw ``samples/lengths.png``: the ``raw`` weights, then stored and reconstructed averages from short to long.

    Averages are the last ones up to ``nimg``. Column k is seed k, with label k where there are labels. Returns the
    path, or None where there is nothing to draw: no averages, or pixels that are no colours.
    """
    config = run.settings().network
    stored = [snapshot for snapshot in run.snapshots() if nimg is None or snapshot.nimg <= nimg]
    if not stored or config.img_channels not in (1, 3):
        return None
    kept = {snapshot.sigma_rel for snapshot in stored if snapshot.nimg == stored[-1].nimg}
    lengths = sorted({*kept, *RECONSTRUCTED})
    averages = reconstruct([snapshot.path for snapshot in stored], sigma_rels=lengths)
    now = Snapshot(params=raw, config=config, nimg=stored[-1].nimg, sigma_rel=None)
    rows = [("raw weights", _row(now, open_sampler))]
    for sigma_rel, average in zip(lengths, averages, strict=True):
        origin = "stored" if sigma_rel in kept else "reconstructed"
        rows.append((f"{sigma_rel:.2f} {origin}", _row(average, open_sampler)))
    path = run.samples_path / "lengths.png"
    save_rows(path, rows)
    return path


def _row(network: Snapshot, open_sampler: OpenSampler) -> np.ndarray:
    label_dim = network.network.label_dim
    columns = min(label_dim, _COLUMNS) or _COLUMNS
    seeds = range(columns)
    job = Job(network=network, seeds=seeds, classes=np.array(seeds if label_dim else [-1] * columns, np.int64))
    return sample_images(job, open_sampler, batch=columns)
