"""The command lines: what is typed becomes typed values, and a fault becomes one line and status 2."""

from dataclasses import fields, replace
from pathlib import Path

import pytest

from backends.pipeline.runs.command_line import count_text, flag, parse, parse_count
from backends.pipeline.runs.options import SampleOptions, parse_train, with_precision
from backends.ports import Machine
from edm2_core.errors import InputError
from edm2_core.presets import PRESETS, Hyperparameters, on_rung


def train(*argv):
    return parse_train(argv, prog="train", description="Trains.")


def sample(*argv):
    return parse(SampleOptions, argv, prog="sample", description="Samples.")


@pytest.mark.parametrize(
    ("text", "count"),
    [("96", 96), ("0", 0), ("192Ki", 196608), ("8Mi", 8 << 20), ("2Gi", 2 << 30), ("1.5Ki", 1536), ("1e3", 1000)],
)
def test_image_counts_are_read_with_their_unit(text, count):
    assert parse_count(text) == count
    assert count == 0 or train("--duration", text).config.hyper.duration == count


@pytest.mark.parametrize("count", [0, 1, 96, 1024, 1536, 196608, 3 << 20, 2 << 30, (2 << 30) + 1024])
def test_counts_are_written_as_they_are_read(count):
    assert parse_count(count_text(count)) == count
    assert count_text(196608) == "192Ki"


@pytest.mark.parametrize("text", ["9Kx", "", "many", "1.5", "inf", "nan", "0.3Ki", "Ki"])
def test_a_count_that_is_no_number_of_images_is_one_line_that_names_the_flag(text):
    with pytest.raises(InputError, match=r"^--rampup must be a whole number such as .*, got ") as caught:
        train("--rampup", text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("preset", "rung"), [("digits", "G"), ("img512-s", "A"), ("img64-m", "E")])
def test_defaults_are_those_of_the_preset_on_its_rung(preset, rung):
    options, base = train("--preset", preset, "--ladder", rung), on_rung(PRESETS[preset], rung)
    assert (options.config.hyper, options.config.network, options.dropout) == (
        base.hyper,
        base.network,
        base.network.dropout,
    )


def test_every_train_flag_is_understood():
    argv = (
        "--outdir o --data d --preset img64-s --duration 1Ki --batch 2Ki --batch-per-device 32 --lr 0.01 --decay 400 "
        "--rampup 4Ki --betas 0.9 0.95 --dropout 0.1 --P-mean -0.4 --P-std 1 --precision bfloat16 --loss-scaling 100 "
        "--sigma-rels 0.05 0.10 0.2 --snapshot 8Ki --checkpoint 16Ki --status 1Ki --telemetry 50 --ladder C "
        "--switches bias=true group_norm=none --seed 3 --device cpu --dry-run --unconditional"
    )
    options = train(*argv.split())
    assert options.config.hyper == Hyperparameters(
        duration=1024,
        batch=2048,
        lr=0.01,
        decay=400.0,
        rampup=4096,
        betas=(0.9, 0.95),
        P_mean=-0.4,
        P_std=1.0,
        loss_scaling=100.0,
        sigma_rels=(0.05, 0.10, 0.2),
        snapshot=8192,
    )
    config = options.config
    assert (config.checkpoint, config.status, config.telemetry, config.seed) == (16384, 1024, 50, 3)
    assert (config.precision, options.machine) == ("bfloat16", Machine(device="cpu", batch_per_device=32))
    assert (options.outdir, options.data, options.preset, options.ladder) == (Path("o"), "d", "img64-s", "C")
    assert options.switches == (("bias", True), ("group_norm", "none"))
    assert (options.dropout, options.dry_run, options.unconditional) == (0.1, True, True)
    assert train("--half-life", "50_000").config.hyper.half_life == 50_000


def test_every_sample_flag_is_understood():
    argv = (
        "--run r --net n --sigma-rel 0.13 --seeds 0-63,70 --class 3 --steps 16 --sigma-min 0.01 --sigma-max 50 --rho 5 "
        "--S-churn 10 --S-min 0.05 --S-max inf --S-noise 1.003 --guidance 1.5 --guide g --guide-interval 0.2 5 "
        "--data d --condition c --vae v --outdir o --format npz --batch 8 --precision float16 --device cuda "
        "--labels l --noise torch --guide-sigma-rel 0.1 --preset p --models m --skip-existing --subdirs --compile off"
    )
    options = sample(*argv.split())
    assert all(
        getattr(options, field.name) != field.default for field in fields(SampleOptions) if field.name != "S_max"
    )
    assert (options.label, options.guide_interval, options.S_max) == ("3", (0.2, 5.0), float("inf"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--lr fast", r"--lr must be a number, got 'fast'"),
        ("--P-std nan", r"--P-std must be a number, got 'nan'"),
        ("--batch 1.5", r"--batch must be a whole number such as .*, got '1\.5'"),
        ("--precision int8", r"--precision must be one of float32, bfloat16, float16, got 'int8'"),
        ("--sigma-rels", r"--sigma-rels must be one or more of: a number, got ''"),
        ("--sigma-rels 0.05 x", r"--sigma-rels must be one or more of: a number, got '0\.05 x'"),
    ],
)
def test_a_value_of_the_wrong_kind_is_one_line_that_names_the_flag(argv, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        train(*argv.split())


@pytest.mark.parametrize("argv", ["--duraton 96", "stray", "--batch", "--no-dry-run"])
def test_a_wrong_flag_exits_with_2_and_few_lines(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        train(*argv.split())
    printed = capsys.readouterr()
    assert caught.value.code == 2
    assert 1 <= len(printed.err.splitlines()) <= 12
    assert not printed.out


def shown(capsys, read, *argv):
    with pytest.raises(SystemExit) as caught:
        read(*argv, "--help")
    assert caught.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_a_fresh_run_takes_the_fastest_precision_unless_one_is_named():
    assert with_precision(train(), [], "bfloat16").config.precision == "bfloat16"
    named = ["--precision", "float32"]
    assert with_precision(train(*named), named, "bfloat16").config.precision == "float32"
    options = train()
    resumed = replace(options, previous=options.config)
    assert with_precision(resumed, [], "bfloat16").config.precision == "float32"


def test_help_shows_every_sample_flag_with_its_default(capsys):
    text = shown(capsys, sample)
    assert "Samples." in text
    assert "None" not in text
    assert all(flag(field.name) in text for field in fields(SampleOptions))
    assert "(default: 0-63)" in text


def test_help_shows_the_defaults_of_the_preset_that_is_asked_for(capsys):
    text = shown(capsys, train)
    assert "Trains." in text
    assert "None" not in text
    assert all(flag(field.name) in text for field in fields(Hyperparameters))
    assert "(default: 64Ki)" in text
    assert "(default: 2Gi)" in shown(capsys, train, "--preset", "img512-s")


@pytest.mark.parametrize(
    "argv",
    ["--half-life 500 --sigma-rels 0.05 0.1", "--snapshot-plan p --snapshot 8Ki", "--snapshot-plan p --half-life 9"],
)
def test_options_that_exclude_each_other_are_named(argv):
    first, second = (word for word in argv.split() if word.startswith("--"))
    with pytest.raises(InputError, match=f"^({first} and {second}|{second} and {first}) exclude each other"):
        train(*argv.split())


def test_official_spellings_are_understood():
    options = train("--batch-gpu=8", "--preset", "edm2-img512-xs", "--data", "x")
    assert (options.machine.batch_per_device, options.preset, options.config.preset) == (8, "img512-xs", "img512-xs")
    assert train("--batch-gpu", "2Ki").machine.batch_per_device == 2048
