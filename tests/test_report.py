"""edm2 report: the page for complete, broken and very long runs, and its behaviour in a browser."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from report_runs import edit_config, measurement, report
from toy_port import PRESET, ToySampler

from backends.pipeline.checkpoints.snapshots import Snapshot, save_snapshot, snapshot_name
from backends.pipeline.report import strips
from backends.pipeline.report.history import History
from backends.pipeline.report.serve import Live, open_server
from backends.pipeline.runs.folder import Run
from edm2_core.ema import Length
from edm2_core.network import initialize
from edm2_core.presets import PRESETS

TENTH = Length.of(0.1)


pytestmark = pytest.mark.usefixtures("toy_reports")


@pytest.fixture
def run(trained, tmp_path):
    return Run(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture(scope="module")
def page(trained):
    """Of the whole run, as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "toy", PRESET)
        patch.setattr("backends.commands.report.open_port", lambda name: ("toy", ToySampler()))
        assert report(trained) == 0
    return Page(trained / "report/report.html")


class Page(HTMLParser):
    """The elements of a page: (tag, attributes), and all its text."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.words = [], []
        self.source = Path(path).read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.words.append(data)

    @property
    def charts(self):
        """The elements into which lines are drawn."""
        return [attributes for attributes in self.all("div") if attributes.get("role") == "img"]

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def test_the_page_of_a_run_has_every_section_and_its_pictures_are_files_too(page, trained):
    for heading in ("Loss and speed", "Loss by noise level", "Magnitudes", "Length of the average", "Options"):
        assert heading in page.text
    assert "a negative loss is normal" in page.text
    names = {path.stem for path in (trained / "report").glob("*.png")}
    assert names == {"loss", "lr", "images_per_s", "loss-by-noise", "u-by-noise", "error", "lengths"}
    assert len(page.charts) == len(names) - 1  # all but the strips of pictures
    assert "Weights, maximum: 1 throughout." in page.text  # the telemetry written here does not change
    assert "duration 4096" in page.text
    for name in names:
        with Image.open(trained / f"report/{name}.png") as picture:
            picture.verify()


def test_the_page_needs_nothing_but_itself(page):
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "data", "srcset", "poster", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    source = page.source.replace("/*! https://github.com/leeoniya/uPlot", "")  # where the charts' library is from
    assert not re.search(r"https?:|@import|url\((?!#)|fetch\(|XMLHttp|WebSocket", source)
    assert not any("src" in script for script in page.all("script"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    used = {attributes["href"][1:] for _, attributes in page.elements if attributes.get("href", "").startswith("#")}
    assert used | set(re.findall(r"url\(#([^)]+)\)", page.source)) <= set(ids)


def test_who_cannot_see_is_told_and_nothing_is_wider_than_a_phone(page):
    assert all(picture["alt"] for picture in page.all("img"))
    assert all(chart["aria-label"] for chart in page.charts)
    assert any("at the end" in chart["aria-label"] or "from " in chart["aria-label"] for chart in page.charts)
    assert [label["for"] for label in page.all("label")] == ["length"]


def test_a_very_long_run_is_a_small_page(run):
    with open(run.log_path, "w", encoding="utf-8") as file:
        for i in range(100_000):
            loss = 500.0 if i == 61_803 else 1 / (1 + i)
            file.write(f'{{"nimg": {64 * i}, "loss": {loss}, "lr": 0.01, "images_per_s": 9, "nonfinite": 0}}\n')
    line = json.dumps(measurement(-1))
    with open(run.telemetry_path, "w", encoding="utf-8") as file:
        file.writelines(line.replace('"nimg": -1', f'"nimg": {320 * i}') + "\n" for i in range(20_000))
    assert report(run.path, "--no-samples") == 0
    assert Path("run/report/report.html").stat().st_size < 1_000_000
    assert History.of(run).log["loss"].max() == 500


def test_a_run_with_nothing_yet_says_what_is_missing_and_how_to_get_it(run):
    run.log_path.unlink()
    run.telemetry_path.unlink()
    shutil.rmtree(run.snapshots_path)
    assert report(run.path) == 0
    text = Page("run/report/report.html").text
    assert "run has no line of log yet" in text
    assert "run has no telemetry: train with --telemetry 50" in text
    assert "a run must have snapshots, got none" in text


def test_a_damaged_snapshot_costs_its_section_only(run):
    path = next(run.snapshots_path.iterdir())
    path.write_bytes(path.read_bytes()[:-10])
    run.telemetry_path.unlink()
    assert report(run.path) == 0
    made = Page("run/report/report.html")
    assert path.name in made.text
    assert not made.all("img")
    assert len(made.charts) == 3


def test_of_data_with_other_channels_the_first_is_shown(run):
    shutil.rmtree(run.snapshots_path)
    run.telemetry_path.unlink()
    edit_config(run, img_channels=4)
    store_one(run)
    assert report(run.path) == 0
    made = Page("run/report/report.html")
    assert made.all("img")
    assert "Error of reconstruction" in made.text


def test_a_traditional_average_is_shown_beside_the_slider(run):
    shutil.rmtree(run.snapshots_path)
    run.telemetry_path.unlink()
    store_one(run, Length.half_life(20))
    for words in ((), ("--sigma-rels", 0.1)):
        assert report(run.path, "--seeds", "3", *words) == 0
        made = Page("run/report/report.html")
        assert "half-life 20, stored" in made.text
        assert lengths_shown(made) == ["0.1"] * len(words[1:])
        assert len(made.all("img")) == 1 + len(words[1:])


def store_one(run, length=TENTH):
    config = run.config().network
    snapshot = Snapshot(params=initialize(config, seed=0), config=config, nimg=2048, length=length)
    save_snapshot(run.snapshots_path / snapshot_name(2048, length), snapshot)


def test_without_any_port_the_page_says_so_and_has_the_rest(run, monkeypatch):
    monkeypatch.setattr("backends.commands.report.open_port", lambda name: None)
    run.telemetry_path.unlink()
    assert report(run.path) == 0
    made = Page("run/report/report.html")
    assert "No port is installed to sample with" in made.text
    assert len(made.charts) == 4


def test_the_first_port_that_is_installed_samples_and_one_that_is_named_must_be(monkeypatch):
    def imported(name):
        if name == "backends.torch.sample":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
        return type("Module", (), {"open_sampler": staticmethod(lambda options: name)})

    monkeypatch.setattr(strips, "import_module", imported)
    assert strips.open_port(None) == ("jax", "backends.jax.sample")
    assert strips.open_port("mlx") == ("mlx", "backends.mlx.sample")
    with pytest.raises(ModuleNotFoundError):
        strips.open_port("torch")
    monkeypatch.setattr(strips, "PORTS", ("torch",))
    assert strips.open_port(None) is None


def lengths_shown(made):
    return [attributes["data-length"] for attributes in made.all("div") if "data-length" in attributes]


def test_lengths_are_what_was_asked_for_or_those_that_snapshots_give(run, page, capsys):
    run.telemetry_path.unlink()
    assert report(run.path, "--sigma-rels", 0.2, 0.01, "--seeds", "3,5") == 0
    made = Page("run/report/report.html")
    assert lengths_shown(made) == ["0.01", "0.2"]
    assert [picture["alt"].partition(",")[0] for picture in made.all("img")] == ["seed 3", "seed 5"] * 2
    assert capsys.readouterr().out == f"wrote     {run.path}/report/report.html, and 5 pictures beside it\n"
    assert {"0.05", "0.1"} <= set(lengths_shown(page))
    assert "0.02" not in lengths_shown(page)  # eight snapshots do not tell


def test_each_snapshot_is_opened_once(run, headers_read):
    for path in sorted(run.snapshots_path.iterdir())[:-4]:
        path.unlink()
    assert report(run.path, "--seeds", "0") == 0
    assert sorted(headers_read) == sorted(run.snapshots_path.iterdir())
    assert len(headers_read) == 4


def test_several_runs_lie_side_by_side_with_what_differs_first(run, trained, tmp_path):
    other = Run(shutil.copytree(trained, tmp_path / "a & <b>$x$"))
    edit_config(other, lr=0.25, dropout=0.5)
    (tmp_path / "less").mkdir()
    less = Run(shutil.copytree(trained, tmp_path / "less" / "run"))
    less.telemetry_path.unlink()
    for path in list(less.snapshots_path.glob("*-0.100*")):
        path.unlink()
    for path in other.snapshots_path.iterdir():
        path.unlink()
    assert report(run.path, other.path, less.path) == 0
    made = Page("report/report.html")
    assert "3 runs, side by side" in made.text
    first, same = (made.text.rindex(title) for title in ("Options that differ", "Options that are the same"))
    assert first < made.text.index("dropout 0 0.5 0") < made.text.index("lr 0.05 0.25 0.05") < same
    assert made.text.index("model_channels") > same
    assert "Verdict" in made.text
    assert f"{tmp_path / 'less' / 'run'} has no telemetry" in made.text
    assert "a & <b>$x$: a run must have snapshots" in made.text
    assert "Activations, maximum: a & <b>$x$: 1 throughout" in made.text
    assert "0.1 cannot be made of what is stored" in made.text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere"], "a run must be a folder with a config.json, got nowhere"),
        (["nowhere", "--serve"], "a run must be a folder with a config.json, got nowhere"),
        ([], "runs must be one or more run folders"),
        (["run", "./run"], "runs must differ, got"),
        (["run", "--sigma-rels", "0.3"], "within (0, 0.2887), got 0.3"),
        (["run", "--seeds", "x"], "seeds must be numbers and ranges"),
        (["run", "--steps", "0"], "num_steps >= 1"),
        (["run", "--port", "tensorflow"], "--port must be one of torch, jax, mlx"),
        (["run", "--outdir", "run/log.jsonl"], "must be writable"),
    ],
)
def test_bad_input_is_one_line(run, capsys, words, says):
    assert report(*words) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_a_port_that_is_taken_is_one_line(run, capsys):
    with open_server(Live(str, str), 0) as server:
        assert report(run.path, "--serve", "--no-samples", "--http-port", server.server_address[1]) == 2
    assert "--http-port must be a free port" in capsys.readouterr().err
