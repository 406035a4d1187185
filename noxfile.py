"""The checks of the project: ``nox`` runs all but benchmarks, faults and bounds of dependencies, ``nox -s NAME`` one.

Sessions that need the frameworks share the environment ``.nox/all``, which takes minutes to install. Arguments after
``--`` go to pytest: ``nox -s conformance -- --port torch``.
"""

import functools
import os
import sys
from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.reuse_venv = "yes"
nox.options.error_on_missing_interpreters = True

# Most of a run is compilation of small networks by XLA. Cheap optimization levels and a shared cache avoid it; results
# differ only by rounding, within the tolerances.
CHEAP_XLA = {
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
}
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # one process per core: more threads would compete for the cores
PARALLEL = ("-n", "auto", "--maxprocesses", "4")

CHECKED = {  # schemas that check-jsonschema holds, and the files that they are for
    "github-workflows": ".github/workflows/*.yml",
    "github-issue-forms": ".github/ISSUE_TEMPLATE/[!c]*.yml",
    "github-issue-config": ".github/ISSUE_TEMPLATE/config.yml",
    "dependabot": ".github/dependabot.yml",
    "citation-file-format": "CITATION.cff",
}

shared = functools.partial(nox.session, venv_backend="none")


HOME = Path(".nox", "all").absolute()
PYTHON = str(HOME / ("Scripts" if os.name == "nt" else "bin") / "python")
ready: list[str] = []  # the environments that this invocation has updated


def run(session: nox.Session, module: str, *arguments: str, **environment: str) -> None:
    """Run ``python -m module`` in the shared environment, after creating or updating it."""
    if PYTHON not in ready:
        install(session)
        ready.append(PYTHON)
    session.run(PYTHON, "-m", module, *arguments, external=True, env=environment)


def install(session: nox.Session) -> None:
    if not Path(PYTHON).exists():
        session.run(sys.executable, "-m", "venv", str(HOME), external=True)
    session.run(PYTHON, "-m", "pip", "install", "--quiet", "-e", ".[dev,torch,jax,mlx]", external=True)
    # without torchvision, whose builds for CUDA cannot be imported beside a PyTorch without it
    session.run(PYTHON, "-m", "pip", "install", "--quiet", "--no-deps", "torch-fidelity>=0.4", external=True)


def pytest(session: nox.Session, *arguments: str, module: str = "pytest") -> None:
    """Run pytest, or ``module``, which passes its arguments on to pytest, in several processes."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(Path(".nox", "xla").absolute())}
    run(session, module, *PARALLEL, *arguments, *session.posargs, **CHEAP_XLA, **ONE_THREAD, **cache)


@nox.session
def lint(session: nox.Session) -> None:
    """Formatting and lint, including the workflows, the issue forms and CITATION.cff."""
    session.install("ruff>=0.6", "check-jsonschema>=0.31")
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    for schema, pattern in CHECKED.items():
        session.run("check-jsonschema", "--builtin-schema", f"vendor.{schema}", *map(str, Path().glob(pattern)))


@shared
def types(session: nox.Session) -> None:
    """Static types."""
    run(session, "mypy")


@shared
def tests(session: nox.Session) -> None:
    """The project's own tests: pipeline, commands, ports, public API, digits runs and examples."""
    pytest(session, "--durations", "15", "tests")


@shared
def conformance(session: nox.Session) -> None:
    """The specification in every array library, and every port against its oracles; writes build/conformance.

    ``nox -s conformance -- --port torch --profile deep`` tests one port on more examples.
    """
    options = ("--profile", "ci", "--report", "build/conformance")
    pytest(session, "--dist", "worksteal", *options, module="conformance")


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation as a site, in site/, without the network; a dead link or an unknown name is an error."""
    session.install("-e", ".[docs]")
    session.run("mkdocs", "build", "--strict", *session.posargs, env={"NO_MKDOCS_2_WARNING": "1"})


def bounded(session: nox.Session, resolution: str) -> None:
    """The tests, on the versions that uv's ``resolution`` chooses within the bounds of pyproject.toml."""
    session.install("uv")
    python = ("--python", str(Path(session.bin, "python")))
    everything = ("-e", ".[test,torch,jax,mlx]")
    session.run("uv", "pip", "install", "--quiet", "--upgrade", *python, "--resolution", resolution, *everything)
    session.run("uv", "pip", "list", *python)  # a failure belongs to these versions
    session.run("python", "-m", "pytest", *PARALLEL, *(session.posargs or ["tests"]), env={**CHEAP_XLA, **ONE_THREAD})


@nox.session(default=False)
def lowest(session: nox.Session) -> None:
    """The tests on the oldest versions of direct dependencies that pyproject.toml allows."""
    bounded(session, "lowest-direct")


@nox.session(default=False)
def newest(session: nox.Session) -> None:
    """The tests on the newest versions that pyproject.toml allows, in an environment of their own."""
    bounded(session, "highest")


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """Each port on this CPU beside plain PyTorch; writes build/benchmarks and docs/benchmark_ports.md. Needs an idle
    machine. On a GPU: ``python -m benchmarks.gpu``."""
    session.install("-e", ".[test,torch,jax]")
    session.run("python", "-m", "benchmarks.cpu", *session.posargs)
    session.run("python", "-m", "benchmarks.ports_step")


@nox.session(default=False, venv_backend="none")
def faults(session: nox.Session) -> None:
    """Kills, damaged files, full disks and lost peers; writes docs/reliability.md. Twenty minutes."""
    run(session, "benchmarks.faults", *session.posargs, **ONE_THREAD)


@nox.session(default=False)
def bench_ema(session: nox.Session) -> None:
    """Averages, tracked and reconstructed, compared with ema-pytorch; writes docs/benchmarks.md. Needs an idle machine
    and 20 GB of disk."""
    session.install("-e", ".[test,torch]", "ema-pytorch>=0.8")
    session.run("python", "-m", "benchmarks.ema_reconstruct", *session.posargs)
    session.run("python", "-m", "benchmarks.ema_tracker")


@nox.session
def wheel(session: nox.Session) -> None:
    """The installed wheel works outside the checkout, and its core needs no framework."""
    session.install("build")
    folder = Path(session.create_tmp())
    session.run("python", "-m", "build", "--wheel", "--outdir", str(folder), silent=True)
    newest = max(folder.glob("edm2-*.whl"), key=lambda path: path.stat().st_mtime)
    session.run("python", "-m", "pip", "uninstall", "--yes", "--quiet", "edm2")
    session.install(f"{newest}[run]")
    script = Path("tests", "check_wheel.py").absolute()
    session.chdir(folder)
    session.run("python", "-P", str(script))
