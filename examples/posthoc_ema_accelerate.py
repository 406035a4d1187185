"""Post-hoc EMA of a LoRA in a loop of accelerate: only the adapters are averaged and stored.

A small Llama learns half of this project's licence, then a LoRA of it (peft) the other half. ``save_state`` stores the
averages, which are registered. Of several processes each tracks the same averages; the first one writes.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import tyro
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from backends.torch.ema import PowerEMA, best_length

TEXT, CONTEXT, BATCH = Path(__file__).parents[1] / "LICENSE", 64, 16  # bytes are the tokens
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def train(accelerator: Accelerator, model: nn.Module, windows: Tensor, steps: int, folder: Path | None = None) -> None:
    model, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=2e-2))
    ema = PowerEMA(model, trainable_only=True)
    accelerator.register_for_checkpointing(ema)
    for step in range(1, steps + 1):
        batch = windows[torch.randint(len(windows), (BATCH,))]
        accelerator.backward(model(input_ids=batch, labels=batch).loss)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(time=step, delta=1)
        if folder and step % max(steps // 30, 1) == 0 and accelerator.is_main_process:
            ema.save(folder)


def main(*, steps: int = 300, folder: Path | None = None) -> None:
    """Train a LoRA for STEPS, with snapshots in FOLDER (empty; by default a temporary one); then choose a length."""
    torch.manual_seed(0)
    tokens = torch.frombuffer(bytearray(TEXT.read_bytes()), dtype=torch.uint8).long()
    first, second = tokens[: len(tokens) // CONTEXT // 2 * 2 * CONTEXT].reshape(2, -1, CONTEXT)
    kept, held_out = second[torch.arange(len(second)) % 5 > 0], second[::5]
    accelerator, model = Accelerator(cpu=True), LlamaForCausalLM(LlamaConfig(vocab_size=256, **SIZES))
    torch.set_num_threads(1)  # the network is too small to use more
    train(accelerator, model, first, steps // 2)
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))

    @torch.no_grad()
    def held_out_loss(model: nn.Module) -> float:
        return model(input_ids=held_out, labels=held_out).loss.item()

    with TemporaryDirectory() as temporary:
        train(accelerator, model, kept, steps, folder or Path(temporary))
        best = best_length(folder or temporary, like=model, metric=held_out_loss)
    print(f"length  held-out loss\nraw     {held_out_loss(model):10.6g}\n{best}")


if __name__ == "__main__":
    tyro.cli(main)
