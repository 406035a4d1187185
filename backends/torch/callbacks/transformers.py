"""Post-hoc EMA in Hugging Face's Trainer.

from backends.torch.callbacks.transformers import PosthocEMA

trainer = Trainer(..., callbacks=[PosthocEMA("snapshots", save_every=1000)])
trainer.train()                                                                    # as before
best_length("snapshots", like=model, metric=validation_loss)                       # backends.torch.ema, afterwards
"""

from pathlib import Path
from typing import Any

import torch

from edm2_core.errors import InputError

from .interval import IntervalEMA

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise InputError(
        "this callback needs transformers, which is not installed: pip install 'edm2[trainers]'"
    ) from error

STATE = "training-state-posthoc-ema.pt"
"""Name of the tracker's state in a checkpoint of the trainer."""


class PosthocEMA(IntervalEMA, TrainerCallback):
    """Tracks averages of the model that a Trainer (of transformers, trl, ...) trains, and stores snapshots of them.

    Arguments: see :class:`~.interval.IntervalEMA`; ``trainable_only=True`` for a LoRA. The averages are stored beside
    each checkpoint of the trainer, so ``train(resume_from_checkpoint=...)`` goes on with them.

    DDP: as on one device; the first process writes. FSDP and DeepSpeed's ZeRO-3 are refused.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: Any, **_: Any
    ) -> None:
        """The weights are those of a checkpoint now, if one is resumed."""
        resumed = args.resume_from_checkpoint
        folder = Path(resumed) if isinstance(resumed, str) else _checkpoint(args, state)
        stored = folder / STATE
        known = (
            torch.load(stored, map_location="cpu", weights_only=True) if state.global_step and stored.exists() else None
        )
        self.begin(model, state.global_step, known)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.advance(state.global_step, first=state.is_world_process_zero)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero and self.ema is not None:
            torch.save(self.ema.state_dict(), _checkpoint(args, state) / STATE)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self.store()


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    assert args.output_dir is not None  # it has a default
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
