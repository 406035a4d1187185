"""Post-hoc EMA in the trainers of others: snapshots at intervals, and a resumed trainer goes on with its averages."""

import logging
import shutil
import sys
from importlib import import_module

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from backends.torch.callbacks.interval import IntervalEMA  # noqa: E402
from backends.torch.ema import PowerEMA, reconstruct  # noqa: E402
from edm2_core.ema import Length  # noqa: E402
from edm2_core.errors import InputError  # noqa: E402

pytestmark = pytest.mark.filterwarnings(  # of the trainers themselves
    "ignore:.*LeafSpec.*:FutureWarning",
    "ignore:.*does not have many workers",
    "ignore:.*is_gradient_checkpointing.*:FutureWarning",
    "ignore:.*pin_memory",
    "ignore:Checkpoint directory .* exists",
)
EVERY = 3


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def same(folder, other):
    for length in (0.05, 0.1):
        one, two = (reconstruct(path, sigma_rel=length) for path in (folder, other))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_snapshots_are_stored_at_intervals_and_at_the_end_by_the_first_process(tmp_path):
    module = torch.nn.Linear(2, 2)
    first, second = (IntervalEMA(tmp_path / name, save_every=4) for name in ("first", "second"))
    for callback, is_first in ((first, True), (second, False)):
        callback.begin(module, 0)
        for steps in (1, 1, 2, 5, 6, 8, 9):  # batches without a step, and several steps at once
            callback.advance(steps, first=is_first)
    first.store()
    first.store()
    assert [int(name.partition("-")[0]) for name in names(tmp_path / "first")[::2]] == [5, 8, 9]
    assert not (tmp_path / "second").exists()
    assert second.ema.time == 9


def test_a_trainer_that_goes_on_keeps_its_averages_and_a_new_one_begins_anew(tmp_path, caplog):
    callback, module = IntervalEMA(tmp_path, save_every=100), torch.nn.Linear(2, 2)
    callback.begin(module, 0)
    callback.advance(5, first=True)
    tracker = callback.ema
    callback.begin(module, 5)
    assert callback.ema is tracker
    callback.begin(module, 0)
    assert callback.ema.time == 0
    with caplog.at_level(logging.WARNING, "edm2"):
        callback.begin(torch.nn.Linear(2, 2), 50)
    assert callback.ema.time == 50
    assert "no averages are stored with step 50" in caplog.text


@pytest.mark.parametrize("fault", ["interval", "state", "sharded"])
def test_faults_are_refused_in_one_line(tmp_path, fault):
    module = torch.nn.Linear(2, 2)
    if fault == "interval":
        with pytest.raises(InputError, match="save_every must be 1"):
            IntervalEMA(tmp_path, save_every=0)
    elif fault == "state":
        state = PowerEMA(module, start=3).state_dict()
        with pytest.raises(InputError, match="got step 3 for 4"):
            IntervalEMA(tmp_path, save_every=1).begin(module, 4, state)
    else:
        module.weight.ds_id = 0  # as ZeRO-3 marks what it divides
        with pytest.raises(InputError, match="whole parameters"):
            IntervalEMA(tmp_path, save_every=1).begin(module, 0)


@pytest.mark.parametrize(
    ("trainer", "hidden"),
    [("lightning", ("lightning.pytorch", "pytorch_lightning")), ("transformers", ("transformers",))],
)
def test_a_trainer_that_is_not_installed_is_named_with_what_installs_it(monkeypatch, trainer, hidden):
    monkeypatch.delitem(sys.modules, f"backends.torch.callbacks.{trainer}", raising=False)
    for module in hidden:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"needs {trainer}, .* pip install 'edm2\[trainers\]'"):
        import_module(f"backends.torch.callbacks.{trainer}")


def lightning_module(lightning):
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = torch.nn.Linear(4, 2)

        def training_step(self, batch):
            return self.layer(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.1)

    return Module()


def lightning_fit(folder, epochs, *, accumulate=1, **options):
    lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
    from backends.torch.callbacks.lightning import PosthocEMA

    data = torch.utils.data.DataLoader(torch.arange(24.0).reshape(6, 4) / 24, batch_size=1)
    module, callback = lightning_module(lightning), PosthocEMA(folder / "snapshots", save_every=EVERY)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    checkpoints = lightning.callbacks.ModelCheckpoint(folder / "checkpoints", save_top_k=-1)
    trainer = lightning.Trainer(
        max_epochs=epochs, callbacks=[callback, checkpoints], accumulate_grad_batches=accumulate,
        default_root_dir=folder, **quiet,
    )  # fmt: skip
    trainer.fit(module, data, **options)
    return module, callback


def test_lightning_tracks_optimizer_steps_and_not_batches(tmp_path):
    module, callback = lightning_fit(tmp_path, 2, accumulate=2)
    assert callback.ema.time == 6  # of twelve batches
    assert [int(name.partition("-")[0]) for name in names(tmp_path / "snapshots")] == [3, 3, 6, 6]
    short, long = callback.ema.averages.values()
    for name, parameter in module.named_parameters():
        assert 0 < (short[name] - parameter).abs().max() < (long[name] - parameter).abs().max()


def test_lightning_resumes_with_its_averages(tmp_path):
    lightning_fit(tmp_path / "whole", 2)
    lightning_fit(tmp_path / "parts", 1)
    (checkpoint,) = (tmp_path / "parts" / "checkpoints").glob("*.ckpt")
    lightning_fit(tmp_path / "parts", 2, ckpt_path=checkpoint)
    assert names(tmp_path / "parts" / "snapshots") == names(tmp_path / "whole" / "snapshots")
    same(tmp_path / "parts" / "snapshots", tmp_path / "whole" / "snapshots")


def transformers_fit(folder, steps, resume=None):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from backends.torch.callbacks.transformers import PosthocEMA

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=16, **sizes))
    data = [{"input_ids": (torch.arange(8) + i) % 16, "labels": (torch.arange(8) + i) % 16} for i in range(6)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=1, learning_rate=0.1, save_steps=4,
        lr_scheduler_type="constant", report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    callback = PosthocEMA(folder / "snapshots", save_every=EVERY)
    transformers.Trainer(model=model, args=arguments, train_dataset=data, callbacks=[callback]).train(
        resume_from_checkpoint=resume
    )
    return callback


def test_the_trainer_of_transformers_resumes_with_its_averages(tmp_path, caplog):
    transformers_fit(tmp_path / "whole", 8)
    transformers_fit(tmp_path / "parts", 4)
    with caplog.at_level(logging.WARNING, "edm2"):
        callback = transformers_fit(tmp_path / "parts", 8, resume=True)
    assert "no averages" not in caplog.text
    assert callback.ema.time == 8
    assert names(tmp_path / "whole" / "snapshots") == [
        f"{time:012d}-{length}.safetensors" for time in (3, 6, 8) for length in ("0.050", "0.100")
    ]
    (tmp_path / "parts" / "snapshots" / f"{4:012d}-0.050.safetensors").unlink()  # where the first part ended
    (tmp_path / "parts" / "snapshots" / f"{4:012d}-0.100.safetensors").unlink()
    same(tmp_path / "parts" / "snapshots", tmp_path / "whole" / "snapshots")


def test_checkpoints_of_the_trainer_remain_readable_as_weights(tmp_path):
    from backends.pipeline.checkpoints.described import Described
    from backends.pipeline.checkpoints.sources import open_sources

    transformers_fit(tmp_path, 8)
    shutil.rmtree(tmp_path / "snapshots")
    sources = open_sources(tmp_path, described=Described(lengths=(Length.raw(4),)))
    assert [source.time for source in sources] == [4, 8]
