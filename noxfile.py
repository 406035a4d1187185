"""The checks of the project: ``nox`` runs all except benchmarks, ``nox -s NAME`` runs one.

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
    """Formatting and lint, including the workflows."""
    session.install("ruff>=0.6", "check-jsonschema>=0.29")
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    workflows = map(str, Path(".github/workflows").glob("*.yml"))
    session.run("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *workflows)


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
    """Reconstruction compared with ema-pytorch; writes docs/benchmarks.md. Needs an idle machine and 20 GB of disk."""
    session.install("-e", ".[test,torch]", "ema-pytorch>=0.8")
    session.run("python", "-m", "benchmarks.ema_reconstruct", *session.posargs)


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
