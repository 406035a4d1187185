"""README and docs: links lead somewhere, Python runs, and commands are accepted by the parsers that they are for."""

import ast
import re
import shlex
import subprocess
import sys
import textwrap
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from data_files import as_zip, write

from backends.commands import cli
from backends.pipeline.checkpoints import remote
from backends.pipeline.runs import mirror
from backends.pipeline.runs.command_line import parse
from backends.pipeline.runs.options import SampleOptions, parse_train
from conformance.__main__ import main as conformance

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), ROOT / "edm2_core" / "SPEC.md", *(ROOT / "docs").glob("*.md")]
BY_NAME = {path.relative_to(ROOT).as_posix(): path for path in PAGES}
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?<=\n\n)(?:(?: {4}.*)?\n)+(?=\S|\Z)")


def blocks(text):
    """The code of a page, in order: (language or "", code)."""
    found = [(m.start(), m[2], textwrap.dedent(m[3])) for m in FENCE.finditer(text)]
    rest = FENCE.sub(lambda fence: re.sub(r"[^\n]", "#", fence[0]), text)
    found += [(m.start(), "", textwrap.dedent(m[0])) for m in INDENTED.finditer(rest)]
    return [(language, code) for _, language, code in sorted(found) if code.strip()]


# ---- links


def anchors(text):
    """The anchors of a page's headings, as GitHub makes them."""
    plain = FENCE.sub("", text)
    titles = re.findall(r"^#+ +(.+)$", plain, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", title).lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", BY_NAME)
def test_links_lead_to_files_and_headings(name):
    text = FENCE.sub("", BY_NAME[name].read_text(encoding="utf-8"))
    links = re.findall(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]+))?\)", text)
    dead = []
    for path, anchor in links:
        target = (BY_NAME[name].parent / path).resolve() if path else BY_NAME[name]
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            dead.append(f"{path}#{anchor}")
    assert not dead


# ---- Python

SMALL = {"model_channels": 8, "channel_mult": (1,), "num_blocks": 1, "channels_per_head": 8}
SHORT = {"duration": 2048, "batch": 1024, "snapshot": 1024, "network": SMALL}
PREPARED = {  # what a page takes for granted
    "README.md": "import torch; model, images_seen, batch, x = torch.nn.Linear(2, 2), 8, 8, torch.ones(2)",
    "docs/guide_torch.md": "import torch; noise, one_hot = torch.randn(10, 1, 8, 8), torch.eye(10)",
    "docs/posthoc_ema.md": "import torch; model, step = torch.nn.Linear(2, 2), 1\n"
    "def validation_loss(model): return float(model(torch.ones(2)).detach().square().sum())",
    "docs/official.md": "from backends.commands.cli import main; from backends.pipeline.runs import shipped\n"
    "assert main(['export', str(shipped.PATH), 'exported', '--to', 'diffusers']) == 0",
}
SHORTER = {  # the same calls, on less
    "lr=0.05, duration=16384), digits)": "**SHORT), digits, picture=False)",
    "each=60": "each=1",
    "num_steps=18": "num_steps=3",
    "num_inference_steps=32": "num_inference_steps=3",
}


def is_python(language, code):
    """Whether a block is Python: by its language, or, of a block without one, because it parses as more than names."""
    if language:
        return language == "python"
    try:
        body = ast.parse(code).body
    except SyntaxError:
        return False
    return any(isinstance(node, ast.Import | ast.ImportFrom | ast.Assign) for node in body)


def python_of(name):
    return [code for language, code in blocks(BY_NAME[name].read_text(encoding="utf-8")) if is_python(language, code)]


@pytest.mark.parametrize("name", [name for name in BY_NAME if python_of(name)])
def test_python_runs_in_order(name, tmp_path, monkeypatch):
    codes = python_of(name)
    for framework in re.findall(r"backends\.(torch|jax|mlx)", "".join(codes)):
        pytest.importorskip(framework, reason=f"{framework} is not installed")
    monkeypatch.chdir(tmp_path)
    scope = {"SHORT": SHORT}
    for code in [PREPARED.get(name, ""), *codes]:
        for text, shorter in SHORTER.items():
            code = code.replace(text, shorter)
        exec(compile(code, name, "exec"), scope)
    if name == "README.md":
        assert scope["images"].shape == (10, 1, 8, 8)
        assert scope["network"].config.label_dim == 10
    if name == "docs/guide_torch.md":
        assert float(scope["images"].abs().max()) <= 3  # the callback's bound


def test_the_pages_that_promise_python_have_some():
    assert {name for name in BY_NAME if python_of(name)} >= {
        "README.md",
        "docs/adding_a_port.md",
        "docs/official.md",
        "docs/tutorial.md",
        "docs/guide_torch.md",
        "docs/guide_jax.md",
        "docs/guide_mlx.md",
    }


# ---- commands


def commands(text):
    """(module or edm2, its words) of each command in the blocks of a page."""
    for language, code in blocks(text):
        if language not in ("", "sh", "bash") or is_python(language, code):
            continue
        for line in re.sub(r"\\\n", " ", code).splitlines():
            try:
                words = shlex.split(line, comments=True)
            except ValueError:  # prose, or an example over two lines
                continue
            for part in " ".join("\0" if word == "&&" else shlex.quote(word) for word in words).split("\0"):
                part = [word for word in shlex.split(part) if word != "..."]
                at = next((i for i, word in enumerate(part) if word == "-m" and not word.startswith("pip")), None)
                if part[:1] == ["edm2"]:
                    yield ("edm2", *part[1:])
                elif at is not None and part[at + 1].partition(".")[0] in ("backends", "conformance", "examples"):
                    yield tuple(part[at + 1 :])


COMMANDS = sorted({words for path in PAGES for words in commands(path.read_text(encoding="utf-8"))})

DATA = {"data.zip", "images.zip", "photographs.zip"}  # what options are derived from, if no preset gives them


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs") / "pictures"
    for i in range(4):
        write(folder / f"{i}.png", size=(32, 32), seed=i)
    return as_zip(folder)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_commands_are_accepted_by_their_own_parser(words, photographs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module, *options = [word.replace("s3://bucket/data", "data").replace("s3:", "memory:") for word in words]
    for cached in (mirror, remote):
        monkeypatch.setattr(cached, "CACHE", tmp_path / "cache")
    for name in DATA & set(options):
        Path(name).symlink_to(photographs)
    if module.endswith(".train"):
        parse_train(options, prog=module, description="")
    elif module.endswith(".sample"):
        parse(SampleOptions, options, prog=module, description="")
    elif module in ("edm2", "backends.commands.cli"):
        name = " ".join(options[: 2 if options[0] == "dataset" else 1])
        if name in cli.COMMANDS:
            command = import_module(f"backends.commands.{cli.COMMANDS[name][0]}")
            monkeypatch.setattr(command, "run", lambda _: 0)  # all but what it would do
        assert cli.main(options) == 0, capsys.readouterr().err
    else:
        shown = helped(module, capsys)
        assert [word for word in options if word.startswith("--") and word not in shown] == []


def helped(module, capsys):
    """What ``python -m module --help`` prints."""
    if module == "conformance":
        with pytest.raises(SystemExit):
            conformance(["--help"])
        return capsys.readouterr().out
    done = subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_named_modules_commands_sessions_and_extras_exist():
    text = "\n".join(path.read_text(encoding="utf-8") for path in PAGES if path.name != "CHANGELOG.md")
    modules = set(re.findall(r"-m ((?:backends|conformance|examples|benchmarks)[\w.]*)", text))
    assert [name for name in modules if find_spec(name.rstrip(".")) is None] == []
    sessions = {n.name for n in ast.parse((ROOT / "noxfile.py").read_text()).body if isinstance(n, ast.FunctionDef)}
    assert set(re.findall(r"nox -s (\w+)", text)) <= sessions
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = set(re.findall(r"^(\w+) = \[", project, re.MULTILINE))
    wanted = re.findall(r"(?:edm2|[\"'`\s]\.)\[([\w,]+)\]", text)
    assert {name for group in wanted for name in group.split(",")} <= extras
