"""The command lines: what is typed becomes typed values, and a fault becomes one line and status 2."""

from dataclasses import fields
from pathlib import Path

import pytest

from backends.pipeline.runs.options import SampleOptions, TrainOptions, count_text, flag, parse, parse_count
from edm2_core.errors import InputError


def train(*argv):
    return parse(TrainOptions, argv, prog="train", description="Trains.")


def sample(*argv):
    return parse(SampleOptions, argv, prog="sample", description="Samples.")


@pytest.mark.parametrize(
    ("text", "count"),
    [("96", 96), ("0", 0), ("192Ki", 196608), ("8Mi", 8 << 20), ("2Gi", 2 << 30), ("1.5Ki", 1536), ("1e3", 1000)],
)
def test_image_counts_are_read_with_their_unit(text, count):
    assert parse_count(text) == count
    assert train("--duration", text).duration == count


@pytest.mark.parametrize("count", [0, 1, 96, 1024, 1536, 196608, 3 << 20, 2 << 30, (2 << 30) + 1024])
def test_counts_are_written_as_they_are_read(count):
    assert parse_count(count_text(count)) == count
    assert count_text(196608) == "192Ki"


@pytest.mark.parametrize("text", ["9Kx", "", "many", "1.5", "inf", "nan", "0.3Ki", "Ki"])
def test_a_count_that_is_no_number_of_images_is_one_line_that_names_the_flag(text):
    with pytest.raises(InputError, match=r"^--rampup must be a whole number of images such as .*, got ") as caught:
        train("--rampup", text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cls", [TrainOptions, SampleOptions])
def test_nothing_is_set_unless_it_was_given(cls):
    options = parse(cls, [], prog="p", description="d")
    assert all(getattr(options, field.name) in (None, False) for field in fields(cls))


def test_every_train_flag_is_understood():
    argv = (
        "--outdir o --data d --preset p --duration 1Ki --batch 64 --batch-per-device 32 --lr 0.01 --decay 400 "
        "--rampup 4Ki --dropout 0.1 --P-mean -0.4 --P-std 1 --precision bfloat16 --loss-scaling 100 "
        "--sigma-rels 0.05 0.10 0.2 --half-life 50_000 --snapshot 8Ki --checkpoint 16Ki --status 1Ki "
        "--seed 3 --device cpu --dry-run --unconditional"
    )
    options = train(*argv.split())
    assert options == TrainOptions(
        outdir=Path("o"),
        data="d",
        preset="p",
        duration=1024,
        batch=64,
        batch_per_device=32,
        lr=0.01,
        decay=400.0,
        rampup=4096,
        dropout=0.1,
        P_mean=-0.4,
        P_std=1.0,
        precision="bfloat16",
        loss_scaling=100.0,
        sigma_rels=(0.05, 0.10, 0.2),
        half_life=50_000,
        snapshot=8192,
        checkpoint=16384,
        status=1024,
        seed=3,
        device="cpu",
        dry_run=True,
        unconditional=True,
    )


def test_every_sample_flag_is_understood():
    argv = (
        "--run r --net n --sigma-rel 0.13 --seeds 0-63,70 --class 3 --steps 16 --sigma-min 0.01 --sigma-max 50 --rho 5 "
        "--S-churn 10 --S-min 0.05 --S-max inf --S-noise 1.003 --guidance 1.5 --guide g --guide-interval 0.2 5 "
        "--outdir o --format npz --batch 8 --precision float16 --device cuda"
    )
    options = sample(*argv.split())
    assert all(getattr(options, field.name) is not None for field in fields(SampleOptions))
    assert (options.label, options.guide_interval, options.S_max) == (3, (0.2, 5.0), float("inf"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--lr fast", r"--lr must be a finite number, got 'fast'"),
        ("--P-std nan", r"--P-std must be a finite number, got 'nan'"),
        ("--batch 1.5", r"--batch must be a whole number, got '1\.5'"),
        ("--precision int8", r"--precision must be one of float32, bfloat16, float16, got 'int8'"),
        ("--sigma-rels", r"--sigma-rels must be one or more numbers, .*, got ''"),
        ("--sigma-rels 0.05 x", r"--sigma-rels must be one or more numbers, .*, got '0\.05 x'"),
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


@pytest.mark.parametrize("cls", [TrainOptions, SampleOptions])
def test_help_shows_every_flag_with_its_default_and_exits_with_0(cls, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(cls, ["--help"], prog="p", description="What it does.")
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert "What it does." in text
    assert "None" not in text
    assert all(flag(field.name) in text for field in fields(cls))
    assert text.count("Default:") == sum(field.default is None for field in fields(cls))
