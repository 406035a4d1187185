"""The config of a run: resolved from options, an earlier run and a preset, and repeated from config.json."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from toy_port import config_of, train_options

from backends.pipeline.data.datasets import open_dataset
from backends.pipeline.runs.config import TrainConfig
from backends.pipeline.runs.folder import Run
from backends.pipeline.runs.resolve import configure, data_spec, microbatches
from edm2_core.codec import DataFormat
from edm2_core.ema import Length
from edm2_core.errors import InputError
from edm2_core.presets import PRESETS

BASE = PRESETS["digits"].hyper
DIGITS = open_dataset("digits")


class Pictures:
    """A dataset of 4 unlabelled RGB images of 16 x 16, by its description only."""

    name = spec = "pictures"

    format, vectors, cond_channels = DataFormat(), False, 0

    def __init__(self, resolution=16, channels=3, label_dim=0):
        self.shape, self.label_dim = (channels, resolution, resolution), label_dim

    def __len__(self):
        return 4


def resumed(previous, outdir="run", **options):
    """What ``options`` make of a run whose config was ``previous``."""
    Run(outdir).save_config(previous)
    return config_of(previous=previous, outdir=outdir, **options)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_without_options_everything_is_the_preset_s():
    made = config_of()
    assert (made.network, made.hyper) == (PRESETS["digits"].network, BASE)
    assert (made.checkpoint, made.status) == (BASE.duration // 4, BASE.duration // 48)
    assert (made.precision, made.seed) == ("float32", 0)


def test_an_option_given_wins_over_the_preset():
    made = config_of(duration=2048, batch=64, lr=0.02, dropout=0.1, sigma_rels=(0.08,), seed=7, precision="bfloat16")
    hyper = made.hyper
    assert (hyper.duration, hyper.batch, hyper.lr, hyper.sigma_rels) == (2048, 64, 0.02, (0.08,))
    assert (made.network.dropout, made.seed, made.precision) == (0.1, 7, "bfloat16")


def test_an_option_that_is_another_preset_s_default_counts_as_given():
    made = config_of(Pictures(64, label_dim=10), preset="img64-s", data="x", batch=BASE.batch, lr=BASE.lr)
    assert (made.hyper.batch, made.hyper.lr) == (BASE.batch, BASE.lr)
    assert made.hyper.duration == PRESETS["img64-s"].hyper.duration


@pytest.mark.parametrize(
    ("name", "resolution", "channels"), [("img512-s", 64, 3), ("img64-s", 64, 4), ("img64-xs", 32, 3)]
)
def test_a_preset_does_not_turn_into_one_for_other_data(name, resolution, channels):
    data = Pictures(resolution, channels, label_dim=10)
    message = rf"preset {name} must have images of 64x64 .*, got {resolution}x{resolution} with {channels} in pictures"
    with pytest.raises(InputError, match=message):
        config_of(data, preset=name, data="x")
    with pytest.raises(InputError, match=message):
        configure(data, preset_name=name)
    assert configure(data, preset_name="digits").network.img_channels == channels


def test_a_value_of_zero_counts_as_given():
    assert config_of(rampup=0, decay=0.0, P_mean=0.0).hyper.rampup == 0


def test_the_network_has_the_size_and_labels_of_the_data():
    made = config_of(Pictures(), unconditional=True)
    assert (made.network.img_resolution, made.network.img_channels, made.network.label_dim) == (16, 3, 0)
    assert config_of(unconditional=True).network.label_dim == 0
    assert config_of().network.label_dim == 10


def test_in_python_a_config_is_made_of_a_preset_and_changes():
    made = configure(DIGITS, lr=0.02, seed=3, network={"model_channels": 64})
    assert made == replace(config_of(lr=0.02, seed=3), network=made.network)
    assert made.network == replace(config_of().network, model_channels=64)
    pictures = configure(Pictures(), unconditional=True)
    assert pictures == replace(config_of(Pictures(), unconditional=True), data="pictures")
    with pytest.raises(TypeError, match="colour"):
        configure(DIGITS, colour="red")


def test_status_and_checkpoint_of_a_long_run_stay_frequent():
    made = config_of(duration=2 << 30)
    assert (made.checkpoint, made.status) == (128 << 20, 128 << 10)


def test_config_a_keeps_the_traditional_average_of_its_rung_unless_told_otherwise():
    both = (Length.of(0.05), Length.of(0.10))
    assert config_of(ladder="A").hyper.lengths == (Length.half_life(1526),)  # as 50 million are of 2048 Mi
    assert config_of(ladder="A", sigma_rels=(0.05, 0.10)).hyper.lengths == both
    own = config_of(half_life=500)
    assert own.hyper.lengths == (Length.half_life(500),)
    assert config_of(ladder="B").hyper.lengths == config_of().hyper.lengths == both
    assert TrainConfig.from_json(own.to_json(), name="config.json") == own
    assert resumed(own) == resumed(own, half_life=500) == own


def test_a_config_survives_config_json_exactly():
    made = config_of(lr=0.1 + 0.2, sigma_rels=(0.05, 1 / 7), ladder="C", switches="bias=true")
    assert TrainConfig.from_json(made.to_json(), name="config.json") == made


def test_config_json_has_no_relative_lengths_beside_a_half_life():
    made = config_of(half_life=500)
    assert json.loads(made.to_json())["sigma_rels"] == []
    assert TrainConfig.from_json(made.to_json(), name="config.json") == made


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "huge", "data": "digits"}, "(--)?preset must be one of digits, .*, got 'huge'"),
        ({"duration": 0}, "--duration must be at least 1, got 0"),
        ({"batch": 0}, "--batch must be at least 1, got 0"),
        ({"lr": 0.0}, "--lr must be positive and finite, got 0"),
        ({"lr": -1.0}, "--lr must be positive and finite, got -1"),
        ({"P_std": 0.0}, "--P-std must be positive and finite, got 0"),
        ({"loss_scaling": 0.0}, "--loss-scaling must be positive and finite, got 0"),
        ({"decay": -1.0}, "--decay must be at least 0, got -1"),
        ({"seed": -1}, "--seed must be at least 0, got -1"),
        ({"seed": 1 << 64}, r"--seed must be less than 2\^63, got 18446744073709551616"),
        ({"duration": 10**30}, r"--duration must be less than 2\^53, as the clock of the averages, got 1000000000"),
        ({"channels": 8_000_000}, r"model_channels must be at most 1048576, got 8000000"),
        ({"blocks": 10**9}, r"num_blocks must be at most 1000, got 1000000000"),
        ({"status": 0}, "--status must be at least 1, got 0"),
        ({"checkpoint": -5}, "--checkpoint must be at least 1, got -5"),
        ({"snapshot": 999}, "--snapshot must be at least 1000, got 999: snapshots are named by thousands of images"),
        ({"dropout": 1.0}, r"dropout must be within \[0, 1\)"),
        ({"sigma_rels": (0.05, 0.3)}, r"sigma_rel must be within \(0, 0.2887\), got 0.3"),
        ({"sigma_rels": (0.0,)}, r"sigma_rel must be within \(0, 0.2887\), got 0"),
        ({"sigma_rels": (0.05, 0.0501)}, "--sigma-rels must differ in their first three digits, got 0.05 and 0.0501"),
        ({"half_life": 0}, "--half-life must be at least 1, got 0"),
        ({"batch_per_device": 48}, "--batch must be divisible by --batch-per-device times devices, got 128 and 48 x 1"),
        ({"batch_per_device": 0}, "--batch must be divisible by --batch-per-device"),
    ],
)
def test_a_value_out_of_range_is_refused_in_one_line(options, message):
    with pytest.raises(InputError, match=f"^{message}") as caught:
        config_of(**options)
    assert "\n" not in str(caught.value)


def test_a_conditional_preset_needs_labels_or_to_be_told_otherwise():
    with pytest.raises(
        InputError, match=r"got none in pictures: add a dataset.json with labels, or give --unconditional"
    ):
        config_of(Pictures(64), preset="img64-s", data="x")


def test_a_published_preset_needs_its_data_named():
    with pytest.raises(InputError, match="--data must be given with --preset img64-s"):
        data_spec(train_options(preset="img64-s"))
    with pytest.raises(InputError, match="preset must be one of"):
        data_spec(train_options(preset="huge"))


def test_data_is_remembered_where_it_is_wherever_the_command_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert data_spec(train_options(data="pictures", preset="digits")) == str(tmp_path / "pictures")
    assert data_spec(train_options(data="digits")) == data_spec(train_options()) == "digits"


def test_a_batch_is_gone_through_in_equal_turns():
    assert microbatches(128, None, world=4) == 1
    assert microbatches(128, 8, world=4) == 4
    with pytest.raises(InputError, match="divisible by the number of devices, got 128 for 3"):
        microbatches(128, None, world=3)
    with pytest.raises(InputError, match="got 128 and 64 x 4"):
        microbatches(128, 64, world=4)


def test_a_resumed_run_keeps_what_is_not_given():
    before = config_of(lr=0.02, unconditional=True, dropout=0.1, duration=4096)
    assert resumed(before) == before


def test_a_resumed_run_may_change_its_duration_status_checkpoint_and_device():
    before = config_of()
    after = resumed(before, duration=1 << 20, status=512, checkpoint=2048, device="cuda", batch_per_device=32)
    longer = replace(before.hyper, duration=1 << 20)
    assert after == replace(before, hyper=longer, status=512, checkpoint=2048)


def test_a_resumed_run_may_be_given_what_it_already_is():
    same = {"lr": 0.02, "sigma_rels": (0.05, 0.2), "unconditional": True}
    before = config_of(**same)
    assert resumed(before, **same, preset="digits", data="digits", batch=128, dropout=0.0) == before


@pytest.mark.parametrize(
    ("option", "was", "got"),
    [
        ({"lr": 0.5}, f"--lr must stay {BASE.lr}", "0.5"),
        ({"batch": 64}, "--batch must stay 128", "64"),
        ({"preset": "img64-s"}, "--preset must stay digits", "img64-s"),
        ({"sigma_rels": (0.05,)}, "--sigma-rels must stay 0.05 0.1", "0.05"),
        ({"half_life": 500}, "--half-life must stay none", "500"),
        ({"snapshot": 5000}, f"--snapshot must stay {BASE.snapshot}", "5000"),
        ({"seed": 1}, "--seed must stay 0", "1"),
        ({"precision": "bfloat16"}, "--precision must stay float32", "bfloat16"),
        ({"dropout": 0.1}, "--dropout must stay 0.0", "0.1"),
        ({"unconditional": True}, "--unconditional must stay False", "True"),
        ({"data": "/elsewhere"}, "--data must stay digits", "/elsewhere"),
    ],
)
def test_a_resumed_run_refuses_other_options_naming_both_values_and_the_cure(option, was, got):
    with pytest.raises(InputError, match=f"^{was} when a run is resumed, got {got}: .*another --outdir$"):
        resumed(config_of(), **option)


def test_a_resumed_run_refuses_data_that_have_changed():
    before = config_of(Pictures(), unconditional=True)
    changed = replace(before, data_summary=replace(before.data_summary, count=5))
    Run("run").save_config(changed)
    with pytest.raises(InputError, match="data must be the same as when the run began, got count 4 for 5"):
        config_of(Pictures(), previous=changed, outdir="run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 1 or less, got 2: install a newer edm2"),
        ({"format": "x"}, "as it was written"),
        ({"colour": 1}, "as it was written.*colour"),
        ({"batch": "many"}, "batch must be int, got 'many'"),
        ({"train": float("nan")}, "train must be tuple.*, got 'nan'"),
        ({"flip": 10**29}, "flip must be bool"),
        ({"duration": True}, "duration must be int, got 'True'"),
        ({"precision": "__class__"}, "precision must be Literal.*float32"),
        ({"duration": -1}, "duration must be at least 1"),
    ],
)
def test_a_damaged_config_json_is_one_line_that_names_it(change, message):
    values = json.loads(config_of().to_json()) | change
    with pytest.raises(InputError, match=message) as caught:
        TrainConfig.from_json(json.dumps(values), name="runs/x/config.json")
    assert "\n" not in str(caught.value)


def test_another_digit_in_config_json_is_found_and_other_spaces_are_not():
    text, read = config_of().to_json(), lambda text: TrainConfig.from_json(text, name="runs/x/config.json")
    assert read(text.replace("\n", "\r\n").replace("  ", "\t")) == config_of()
    digits = [at for at, character in enumerate(text) if character.isdecimal()]
    for at in digits:
        changed = text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :]
        with pytest.raises(InputError, match=r"runs/x/config\.json|must"):
            read(changed)


def test_a_config_file_may_be_edited():
    Run("first").save_config(config_of())
    path = Run("first").config_path
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    assert config_of(config="first/config.json", data="digits").network == config_of().network
    with pytest.raises(InputError, match="got changed values: restore the file"):
        Run("first").config()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 1, "preset": "digits", "network": {"img_res'])
def test_a_config_json_cut_short_is_refused(text):
    with pytest.raises(InputError, match=r"runs/x/config\.json must be the config of a run"):
        TrainConfig.from_json(text, name="runs/x/config.json")


def test_a_config_file_is_the_base_label_dropout_included():
    source = config_of(label_dropout=0.2, lr=0.03)
    Run("first").save_config(source)
    made = config_of(config="first/config.json", data="digits")
    assert (made.network, made.hyper, made.preset) == (source.network, source.hyper, "custom")


def test_a_run_goes_on_by_the_command_that_began_it_wherever_its_files_are():
    np.save("given.npy", np.random.default_rng(0).standard_normal((4, 1, 16, 16)).astype(np.float32))
    np.save("x.npy", np.random.default_rng(1).standard_normal((4, 3, 16, 16)).astype(np.float32))
    Path("net.json").write_text(
        '{"model_channels": 8, "channels_per_head": 8, "channel_mult": [1, 2], "num_blocks": 1}', encoding="utf-8"
    )
    words = {"data": "x.npy", "condition": "given.npy", "config": "net.json", "channels": 16}
    pair = open_dataset("x.npy", condition="given.npy")
    before = config_of(pair, **words)
    assert before.condition == str(Path("given.npy").absolute())
    Run("run").save_config(before)
    assert config_of(pair, previous=before, outdir="run", **words) == before
    Path("net.json").write_text(
        '{"model_channels": 8, "channels_per_head": 8, "channel_mult": [1], "num_blocks": 1}', encoding="utf-8"
    )
    with pytest.raises(
        InputError, match="--config must stay the network of the run when a run is resumed, got another"
    ):
        config_of(pair, previous=before, outdir="run", **words)
