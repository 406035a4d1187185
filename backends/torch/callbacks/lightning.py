"""Post-hoc EMA in Lightning.

from backends.torch.callbacks.lightning import PosthocEMA

trainer = Trainer(..., callbacks=[PosthocEMA("snapshots", save_every=1000)])
trainer.fit(model)                                                                 # as before
best_length("snapshots", like=model, metric=validation_loss)                       # backends.torch.ema, afterwards
"""

from collections.abc import Mapping
from typing import Any

from edm2_core.errors import InputError

from .interval import IntervalEMA

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError:
    try:  # the same under its own name
        from pytorch_lightning import Callback, LightningModule, Trainer
    except ModuleNotFoundError as error:
        raise InputError(
            "this callback needs lightning, which is not installed: pip install 'edm2[trainers]'"
        ) from error


class PosthocEMA(IntervalEMA, Callback):
    """Tracks averages of a LightningModule, and stores snapshots of them.

    Arguments: see :class:`~.interval.IntervalEMA`. Lightning's checkpoints hold the averages, so ``fit(ckpt_path=...)``
    goes on with them. ``with callback.ema.applied(0.10, model):`` evaluates an average while training goes on.
    Batches without an optimizer step (``accumulate_grad_batches``) do not count.

    DDP: give the callback as on one device. Gradients are averaged before the optimizer's step, so all processes have
    the same weights and track the same averages; the first one writes. FSDP and DeepSpeed's ZeRO-3 are refused.
    """

    _state: Mapping[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Parameters are on their device now, and restored."""
        self.begin(pl_module, trainer.global_step, self._state)
        self._state = None

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.advance(trainer.global_step, first=trainer.is_global_zero)

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.is_global_zero:
            self.store()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.ema is None else self.ema.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict or None
