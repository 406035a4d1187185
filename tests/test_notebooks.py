"""The notebooks, run cell by cell on less: they end, show what they claim, and are stored without outputs."""

import json
import re
import tempfile
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parents[1] / "examples" / "notebooks"
SMALL = {"model_channels": 8, "channel_mult": (1,), "num_blocks": 1, "channels_per_head": 8}
SHORT = {"DURATION": 2048, "SNAPSHOT": 1024, "STEPS": 3, "NETWORK": SMALL}


def cells(name):
    return json.loads((NOTEBOOKS / name).read_text(encoding="utf-8"))["cells"]


def run(name, folder, monkeypatch, **parameters):
    """The names that the cells define, with other values in place of those of the parameters cell."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    scope = {}
    for i, cell in enumerate(cells(name)):
        if cell["cell_type"] != "code":
            continue
        exec(compile("".join(cell["source"]), f"{name}[{i}]", "exec"), scope)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert parameters.keys() <= scope.keys()
            scope |= parameters
    matplotlib.pyplot.close("all")
    return scope


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_hold_no_outputs_and_one_cell_of_parameters(path):
    code = [cell for cell in cells(path.name) if cell["cell_type"] == "code"]
    assert [cell for cell in code if cell["outputs"] or cell["execution_count"] is not None] == []
    assert len([cell for cell in code if "parameters" in cell["metadata"].get("tags", ())]) == 1


@pytest.mark.parametrize(
    ("path", "extra"), [("digits_torch", "torch"), ("posthoc_ema", "torch"), ("mlx_on_a_mac", "mlx")]
)
def test_without_its_framework_a_notebook_says_in_a_line_what_installs_it(monkeypatch, tmp_path, path, extra):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=rf"this notebook needs .*: pip install -e '.\[{extra}\]'"):
        run(f"{path}.ipynb", tmp_path, monkeypatch)


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_links_of_notebooks_lead_somewhere(path):
    text = "".join("".join(cell["source"]) for cell in cells(path.name) if cell["cell_type"] == "markdown")
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]+)#?([^)]*)\)", text):
        page = (NOTEBOOKS / target).read_text(encoding="utf-8")
        headings = [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in re.findall(r"^#+ (.+)$", page, re.M)]
        assert not anchor or anchor in headings


def test_digits_in_torch(tmp_path, monkeypatch):
    pytest.importorskip("torch", reason="torch is not installed")
    scope = run("digits_torch.ipynb", tmp_path, monkeypatch, **SHORT)
    assert [images.shape for images in scope["rows"]] == [(10, 1, 8, 8)] * 4
    assert not (scope["rows"][0] == scope["rows"][3]).all()  # the length matters
    assert len(scope["seen"]) == 6  # a callback at each step


def test_post_hoc_ema_finds_a_length_that_beats_the_raw_weights(tmp_path, monkeypatch):
    pytest.importorskip("torch", reason="torch is not installed")
    scope = run("posthoc_ema.ipynb", tmp_path, monkeypatch, IMAGES=16_000)
    assert scope["losses"][scope["best"]] < 0.8 * scope["raw"]
    weights = dict(scope["model"].named_parameters())
    assert scope["held_out"](weights) == pytest.approx(scope["losses"][scope["best"]])


def test_mlx_on_a_mac(tmp_path, monkeypatch):
    pytest.importorskip("mlx.core", reason="mlx is not installed")
    scope = run("mlx_on_a_mac.ipynb", tmp_path, monkeypatch, **SHORT)
    assert scope["images"].shape == (10, 8, 8, 1)
    assert scope["loss"].item() < 4  # from 8
