"""Every check of the project: ``nox`` runs all but benchmarks, ``nox -s NAME`` one.

Those that need the frameworks share an environment, ``.nox/all``, which takes minutes to install. Arguments after
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

# XLA takes most of a run to compile, for each network anew, what then runs for milliseconds: compile plainly, each
# program once for all processes and runs. Numbers differ by rounding, which the tolerances allow either way.
CHEAP_XLA = {
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
}
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # a process is its core's: threads of several would wait for each other
PARALLEL = ("-n", "auto", "--maxprocesses", "4")

shared = functools.partial(nox.session, venv_backend="none")


def run(session: nox.Session, module: str, *arguments: str, **environment: str) -> None:
    """``python -m module`` in the shared environment, made if it is not there and brought up to date."""
    home = Path(".nox", "all").absolute()
    python = str(home / ("Scripts" if os.name == "nt" else "bin") / "python")
    if not Path(python).exists():
        session.run(sys.executable, "-m", "venv", str(home), external=True)
    session.run(python, "-m", "pip", "install", "--quiet", "-e", ".[dev,torch,jax,mlx]", external=True)
    session.run(python, "-m", module, *arguments, external=True, env=environment)


def pytest(session: nox.Session, *arguments: str, module: str = "pytest") -> None:
    """pytest, or a module that passes its arguments on, in several processes; arguments after ``--`` go last."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(Path(".nox", "xla").absolute())}
    run(session, module, *PARALLEL, *arguments, *session.posargs, **CHEAP_XLA, **ONE_THREAD, **cache)


@nox.session
def lint(session: nox.Session) -> None:
    """Formatting and lint, of the workflows too."""
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
    """The repo's own tests: pipeline, commands, public API, the digits run, the examples."""
    pytest(session, "tests")


@shared
def conformance(session: nox.Session) -> None:
    """The specification in every array library, every port against its oracles; the report in build/conformance.

    ``nox -s conformance -- --port torch --profile deep``: one port, more examples.
    """
    options = ("--profile", "ci", "--report", "build/conformance")
    pytest(session, "--dist", "worksteal", *options, module="conformance")


@nox.session(default=False)
def bench_ema(session: nox.Session) -> None:
    """Reconstruction beside ema-pytorch's; writes docs/benchmarks.md. Wants a quiet machine and 10 GB of disk."""
    session.install("-e", ".[test,torch]", "ema-pytorch>=0.8")
    session.run("python", "-m", "benchmarks.ema_reconstruct", *session.posargs)


@nox.session
def wheel(session: nox.Session) -> None:
    """What a user gets from the wheel works away from the checkout, and its core needs no framework."""
    session.install("build")
    folder = Path(session.create_tmp())
    session.run("python", "-m", "build", "--wheel", "--outdir", str(folder), silent=True)
    newest = max(folder.glob("edm2-*.whl"), key=lambda path: path.stat().st_mtime)
    session.run("python", "-m", "pip", "uninstall", "--yes", "--quiet", "edm2")
    session.install(f"{newest}[run]")
    script = Path("tests", "check_wheel.py").absolute()
    session.chdir(folder)
    session.run("python", "-P", str(script))
