"""Post-hoc EMA in Hugging Face's Trainer: one callback, then the averaging length is chosen after training.

A small Llama, made from its config, learns the bytes of this project's licence. Checkpoints of the trainer hold the
averages: ``trainer.train(resume_from_checkpoint=True)`` goes on with them.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import tyro
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from backends.torch.callbacks.transformers import PosthocEMA
from backends.torch.ema import best_length

TEXT, CONTEXT = Path(__file__).parents[1] / "LICENSE", 64  # bytes are the tokens


def main(*, steps: int = 300, folder: Path | None = None) -> None:
    """Train for STEPS, with snapshots in FOLDER (empty; by default a temporary one); then choose a length."""
    torch.manual_seed(0)
    tokens = torch.frombuffer(bytearray(TEXT.read_bytes()), dtype=torch.uint8).long()
    windows = tokens[: len(tokens) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)
    held_out, kept = windows[::5], [window for i, window in enumerate(windows) if i % 5]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=CONTEXT, **sizes))

    @torch.no_grad()
    def held_out_loss(model: nn.Module) -> float:
        return model.eval()(input_ids=held_out, labels=held_out).loss.item()

    with TemporaryDirectory() as temporary:
        folder = folder or Path(temporary)
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=16,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            save_steps=steps // 2,
            report_to=[],
            use_cpu=True,
        )
        callbacks = [PosthocEMA(folder / "snapshots", save_every=max(steps // 30, 1))]
        data = [{"input_ids": window, "labels": window} for window in kept]
        trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=callbacks)
        torch.set_num_threads(1)  # the network is too small to use more
        trainer.train()
        best = best_length(folder / "snapshots", like=model, metric=held_out_loss)
    print(f"length  held-out loss\nraw     {held_out_loss(model):10.6g}\n{best}")


if __name__ == "__main__":
    tyro.cli(main)
