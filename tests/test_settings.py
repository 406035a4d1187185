"""What a run is made of: resolved once from options, an earlier run and a preset, and repeated from config.json."""

import json
from dataclasses import asdict, replace

import pytest

from backends.pipeline.data.datasets import open_dataset
from backends.pipeline.runs.config import Settings, data_spec, microbatches, resolve
from backends.pipeline.runs.options import TrainOptions
from edm2_core.ema import HalfLife
from edm2_core.errors import InputError
from edm2_core.presets import PRESETS

BASE = PRESETS["digits"]
DIGITS = open_dataset("digits")


class Pictures:
    """A dataset of 4 unlabelled RGB images of 16 x 16, by its description only."""

    name, resolution, channels, label_dim = "pictures", 16, 3, 0

    def __len__(self):
        return 4


def settings(**options):
    return resolve(TrainOptions(**options), DIGITS)


def test_without_options_everything_is_the_preset_s():
    made, base = settings(), PRESETS["digits"]
    assert made.network == base.network
    for name in ("duration", "batch", "lr", "decay", "rampup", "P_mean", "P_std", "snapshot"):
        assert getattr(made, name) == getattr(base, name)
    assert (made.checkpoint, made.status) == (base.duration // 4, base.duration // 48)
    assert (made.sigma_rels, made.precision, made.seed) == ((0.05, 0.10), "float32", 0)


def test_an_option_given_wins_over_the_preset():
    made = settings(duration=2048, batch=64, lr=0.02, dropout=0.1, sigma_rels=(0.08,), seed=7, precision="bfloat16")
    assert (made.duration, made.batch, made.lr, made.network.dropout) == (2048, 64, 0.02, 0.1)
    assert (made.sigma_rels, made.seed, made.precision) == ((0.08,), 7, "bfloat16")


def test_a_value_of_zero_counts_as_given():
    assert settings(rampup=0, decay=0.0, P_mean=0.0).rampup == 0


def test_the_network_has_the_size_and_labels_of_the_data():
    made = resolve(TrainOptions(unconditional=True), Pictures())
    assert (made.network.img_resolution, made.network.img_channels, made.network.label_dim) == (16, 3, 0)
    assert settings(unconditional=True).network.label_dim == 0
    assert settings().network.label_dim == 10


def test_status_and_checkpoint_of_a_long_run_stay_frequent():
    made = settings(duration=2 << 30)
    assert (made.checkpoint, made.status) == (128 << 20, 128 << 10)


def test_config_a_keeps_the_traditional_average_of_its_rung_unless_told_otherwise():
    rung = settings(ladder="A")
    assert (rung.half_life, rung.sigma_rels) == (1526, ())  # as 50 million are of 2048 Mi
    assert rung.lengths == (HalfLife(1526),)
    power = settings(ladder="A", sigma_rels=(0.05, 0.10))
    assert (power.half_life, power.lengths) == (None, (0.05, 0.10))
    own = settings(half_life=500)
    assert (own.half_life, own.lengths) == (500, (HalfLife(500),))
    assert settings(ladder="B").lengths == settings().lengths == (0.05, 0.10)
    assert Settings.from_json(own.to_json(), name="config.json") == own
    assert resolve(TrainOptions(), DIGITS, own) == resolve(TrainOptions(half_life=500), DIGITS, own) == own


def test_settings_survive_config_json_exactly():
    made = settings(lr=0.1 + 0.2, sigma_rels=(0.05, 1 / 7))
    assert Settings.from_json(made.to_json(), name="config.json") == made


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "huge", "data": "digits"}, "preset must be one of digits, .*, got 'huge'"),
        ({"duration": 0}, "--duration must be at least 1, got 0"),
        ({"batch": 0}, "--batch must be at least 1, got 0"),
        ({"lr": 0.0}, "--lr must be positive, got 0"),
        ({"lr": -1.0}, "--lr must be positive, got -1"),
        ({"P_std": 0.0}, "--P-std must be positive, got 0"),
        ({"loss_scaling": 0.0}, "--loss-scaling must be positive, got 0"),
        ({"decay": -1.0}, "--decay must be at least 0, got -1"),
        ({"seed": -1}, "--seed must be at least 0, got -1"),
        ({"status": 0}, "--status must be at least 1, got 0"),
        ({"checkpoint": -5}, "--checkpoint must be at least 1, got -5"),
        ({"snapshot": 999}, "--snapshot must be at least 1000, got 999: files are named by thousands of images"),
        ({"dropout": 1.0}, r"dropout must be within \[0, 1\)"),
        ({"sigma_rels": (0.05, 0.3)}, r"sigma_rel must be within \(0, 0.2887\), got 0.3"),
        ({"sigma_rels": (0.0,)}, r"sigma_rel must be within \(0, 0.2887\), got 0"),
        ({"sigma_rels": (0.05, 0.0501)}, "--sigma-rels must differ in their first three digits, got 0.05 and 0.0501"),
        ({"half_life": 0}, "--half-life must be at least 1, got 0"),
        (
            {"half_life": 500, "sigma_rels": (0.05, 0.1)},
            "--half-life must be left out where --sigma-rels or --snapshot-plan say what to average, got 500 and 0.05",
        ),
        ({"batch_per_device": 48}, "--batch must be divisible by --batch-per-device times devices, got 128 and 48 x 1"),
        ({"batch_per_device": 0}, "--batch must be divisible by --batch-per-device"),
    ],
)
def test_a_value_out_of_range_is_refused_in_one_line(options, message):
    with pytest.raises(InputError, match=f"^{message}") as caught:
        settings(**options)
    assert "\n" not in str(caught.value)


def test_a_conditional_preset_needs_labels_or_to_be_told_otherwise():
    with pytest.raises(
        InputError, match=r"got none in pictures: add a dataset.json with labels, or give --unconditional"
    ):
        resolve(TrainOptions(), Pictures())


def test_a_published_preset_needs_its_data_named():
    with pytest.raises(InputError, match="--data must be given with --preset img64-s"):
        data_spec(TrainOptions(preset="img64-s"))
    with pytest.raises(InputError, match="preset must be one of"):
        data_spec(TrainOptions(preset="huge"))


def test_data_is_remembered_where_it_is_wherever_the_command_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert data_spec(TrainOptions(data="pictures")) == str(tmp_path / "pictures")
    assert data_spec(TrainOptions(data="digits")) == data_spec(TrainOptions()) == "digits"


def test_a_batch_is_gone_through_in_equal_turns():
    assert microbatches(128, None, world=4) == 1
    assert microbatches(128, 8, world=4) == 4
    with pytest.raises(InputError, match="divisible by the number of devices, got 128 for 3"):
        microbatches(128, None, world=3)
    with pytest.raises(InputError, match="got 128 and 64 x 4"):
        microbatches(128, 64, world=4)


def test_a_resumed_run_keeps_what_is_not_given():
    before = settings(lr=0.02, unconditional=True, dropout=0.1, duration=4096)
    assert resolve(TrainOptions(), DIGITS, before) == before


def test_a_resumed_run_may_change_its_duration_status_checkpoint_and_device():
    before = settings()
    changed = TrainOptions(duration=1 << 20, status=512, checkpoint=2048, device="cuda", batch_per_device=32)
    after = resolve(changed, DIGITS, before)
    assert after == replace(before, duration=1 << 20, status=512, checkpoint=2048)


def test_a_resumed_run_may_be_given_what_it_already_is():
    before = settings(lr=0.02, sigma_rels=(0.05, 0.2), unconditional=True)
    again = TrainOptions(
        lr=0.02, sigma_rels=(0.05, 0.2), unconditional=True, preset="digits", data="digits", batch=128, dropout=0.0
    )
    assert resolve(again, DIGITS, before) == before


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
        resolve(TrainOptions(**option), DIGITS, settings())


def test_a_resumed_run_refuses_data_that_have_changed():
    before = resolve(TrainOptions(unconditional=True), Pictures())
    changed = replace(before, data_summary=replace(before.data_summary, count=5))
    with pytest.raises(InputError, match="data must be those the run began with, got count 4 instead of 5"):
        resolve(TrainOptions(), Pictures(), changed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 1 or less, got 2: install a newer edm2"),
        ({"format": "x"}, "as they were written"),
        ({"colour": 1}, "as they were written.*colour"),
        ({"batch": "many"}, "as they were written"),
        ({"duration": -1}, "--duration must be at least 1"),
    ],
)
def test_a_damaged_config_json_is_one_line_that_names_it(change, message):
    values = json.loads(settings().to_json()) | change
    with pytest.raises(InputError, match=message) as caught:
        Settings.from_json(json.dumps(values), name="runs/x/config.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", json.dumps({"format": 1, **asdict(settings())})[:200]])
def test_a_config_json_cut_short_is_refused(text):
    with pytest.raises(InputError, match=r"runs/x/config\.json must be settings of a run"):
        Settings.from_json(text, name="runs/x/config.json")
