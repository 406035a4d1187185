"""The effect of the averaging length of single tensors (Section 3.3, Figure 5b).

    python -m examples.ema_tensors [--port torch|jax|mlx] [--seeds 3] [--folder ema-tensors]

All tensors but one have an average of the length that is about the best for the whole network. Each row is that one
tensor: the change of the denoising loss on held-out digits with a shorter and a longer average of it, in percent; mean
and standard deviation over runs with other seeds.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Literal

import tyro

from backends.pipeline.checkpoints.snapshots import Snapshot
from backends.pipeline.runs.exit_codes import command
from edm2_core.network import plan
from examples.digits import Study

SHORT, LONG = 0.02, 0.25


@command
def main() -> None:
    tyro.cli(ema_tensors)


def ema_tensors(
    port: Literal["torch", "jax", "mlx"] = "torch",
    duration: str = "32Ki",
    length: float = 0.05,
    tensors: str = "",
    seeds: int = 3,
    folder: Path = Path("ema-tensors"),
) -> None:
    """Train SEEDS runs for DURATION images; change LENGTH for one tensor at a time, with TENSORS in its name."""
    study, losses = Study(folder, port=port), list[float]()
    changes: dict[tuple[str, float], list[float]] = {}
    for seed in range(seeds):
        run = study.train(f"run-{seed}", "--duration", duration, "--snapshot", "1Ki", "--seed", seed)
        base, *others = study.averages(run, (length, SHORT, LONG))
        losses.append(study.denoising_loss(base, held_out=True))
        for name in _weights(base, tensors):
            for other_length, other in zip((SHORT, LONG), others, strict=True):
                one = replace(base, params={**base.params, name: other.params[name]})
                loss = study.denoising_loss(one, held_out=True)
                changes.setdefault((name, other_length), []).append(100 * (loss / losses[-1] - 1))
    print(f"\nloss {_spread(losses, '.5f')} with all at {length:g} ({seeds} seeds)")
    print("percent more with one tensor's average at")
    print(f"{SHORT:>15} {LONG:>15}  tensor")
    names = {name for name, _ in changes}
    for name in sorted(names, key=lambda name: -max(abs(mean(changes[name, other])) for other in (SHORT, LONG))):
        print(*(f"{_spread(changes[name, other], '+.3f'):>15}" for other in (SHORT, LONG)), f" {name}")


def _weights(network: Snapshot, part: str) -> Iterator[str]:
    """The names of the weights that D depends on, of those with ``part`` in them."""
    for name, parameter in plan(network.required_config()).parameters.items():
        if parameter.kind == "weight" and part in name and not name.startswith("logvar"):
            yield name


def _spread(values: list[float], digits: str) -> str:
    """Mean and standard deviation; the mean alone of one value."""
    spread = f" ± {stdev(values):{digits.lstrip('+')}}" if len(values) > 1 else ""
    return f"{mean(values):{digits}}{spread}"


if __name__ == "__main__":
    sys.exit(main())
