"""Post-hoc EMA of a LoRA in MLX: only the adapters are averaged and stored.

A small Llama of mlx-lm, made from its config, learns half of this project's licence, then a LoRA of it the other half.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import mlx.core as mx
import numpy as np
import tyro
from mlx import nn, optimizers
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.tuner.utils import linear_to_lora_layers

from backends.mlx.ema import PowerEMA, best_length

TEXT, CONTEXT, BATCH = Path(__file__).parents[1] / "LICENSE", 64, 16  # bytes are the tokens
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def loss(model: nn.Module, windows: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(windows[:, :-1]), windows[:, 1:], reduction="mean")


def train(model: nn.Module, windows: mx.array, steps: int, folder: Path | None = None) -> None:
    optimizer, gradient = optimizers.Adam(learning_rate=1e-2), nn.value_and_grad(model, loss)
    ema, rng = PowerEMA(model, trainable_only=True), np.random.default_rng(0)
    for step in range(1, steps + 1):
        _, gradients = gradient(model, windows[mx.array(rng.integers(len(windows), size=BATCH))])
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
        ema.update(time=step, delta=1)
        if folder and step % max(steps // 30, 1) == 0:
            ema.save(folder)


def main(*, steps: int = 200, folder: Path | None = None) -> None:
    """Train a LoRA for STEPS, with snapshots in FOLDER (empty; by default a temporary one); then choose a length."""
    mx.random.seed(0)
    tokens = np.frombuffer(TEXT.read_bytes(), np.uint8).astype(np.int32)
    first, second = tokens[: len(tokens) // CONTEXT // 2 * 2 * CONTEXT].reshape(2, -1, CONTEXT)
    kept, held_out = mx.array(second[np.arange(len(second)) % 5 > 0]), mx.array(second[::5])
    model = Model(ModelArgs(model_type="llama", rms_norm_eps=1e-5, vocab_size=256, **SIZES))
    train(model, mx.array(first), steps // 2)
    model.freeze()
    linear_to_lora_layers(model, 2, {"rank": 8, "scale": 1.0, "dropout": 0.0})
    with TemporaryDirectory() as temporary:
        train(model, kept, steps, folder or Path(temporary))
        best = best_length(folder or temporary, like=model, metric=lambda model: loss(model, held_out))
    print(f"length  held-out loss\nraw     {loss(model, held_out).item():10.6g}\n{best}")


if __name__ == "__main__":
    tyro.cli(main)
