"""The effect of the averaging length of single tensors (Section 3.3, Figure 5b).

    python -m examples.ema_tensors [--port torch|jax|mlx] [--folder ema-tensors]

All tensors but one have an average of the length that is about the best for the whole network. Each row is that one
tensor: the change of the denoising loss on held-out digits with a shorter and a longer average of it, in percent.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import tyro

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
    folder: Path = Path("ema-tensors"),
) -> None:
    """Train for DURATION images; change LENGTH for one tensor at a time, of those with TENSORS in their name."""
    study = Study(folder, port=port)
    run = study.train("run", "--duration", duration, "--snapshot", "1Ki")
    base, short, long = study.averages(run, (length, SHORT, LONG))
    base_loss = study.denoising_loss(base, held_out=True)
    print(f"\nloss {base_loss:.5f} with all at {length:g}; percent more with one tensor's average at")
    print(f"{SHORT:>8} {LONG:>8}  tensor")
    table = plan(base.required_config()).parameters
    weights = [name for name, parameter in table.items() if parameter.kind == "weight" and tensors in name]
    changes = {
        name: [
            100 * (study.denoising_loss(replace(base, params={**base.params, name: other.params[name]}), held_out=True)
                   / base_loss - 1)
            for other in (short, long)
        ]
        for name in weights if not name.startswith("logvar")
    }  # fmt: skip
    for name, (shorter, longer) in sorted(changes.items(), key=lambda item: -max(map(abs, item[1]))):
        print(f"{shorter:+8.3f} {longer:+8.3f}  {name}")


if __name__ == "__main__":
    sys.exit(main())
