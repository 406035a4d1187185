"""Checks of an installed wheel, for ``nox -s wheel``: its data are there, and importing the core loads no framework."""

import subprocess
import sys
import tempfile
from importlib import import_module, metadata, resources
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent


def main() -> None:
    import edm2_core.ema

    for name in ("reference", "sampler"):
        import_module(f"edm2_core.{name}")

    loaded = {"torch", "jax", "mlx", "safetensors", "PIL", "tyro"} & set(sys.modules)
    check(not loaded, f"importing edm2_core loads {loaded}")
    check(Path(edm2_core.ema.__file__).parents[2] != CHECKOUT, f"edm2_core came from the checkout, {CHECKOUT}")
    check(resources.files("edm2_core").joinpath("SPEC.md").is_file(), "SPEC.md is missing")
    for package in ("edm2_core", "backends", "conformance"):
        check(resources.files(package).joinpath("py.typed").is_file(), f"{package}/py.typed is missing")
    web = resources.files("backends.pipeline.report").joinpath("web")
    for name in (
        "page.html",
        "report.css",
        "report.js",
        "live.js",
        "uPlot.iife.min.js",
        "uPlot.min.css",
        "uPlot.LICENSE",
    ):
        check(web.joinpath(name).is_file(), f"web/{name} is missing")
    check(any("LICENSE" in str(file) for file in metadata.files("edm2") or ()), "LICENSE is missing")

    import conformance
    from backends.pipeline.data.datasets import open_dataset

    check(bool(conformance.__doc__), "conformance is missing")
    held = resources.files("conformance")
    for name in ("report.html", "plugin.py", "conftest.py", "examples/numpy_port/adapter.py"):
        check(held.joinpath(name).is_file(), f"conformance/{name} is missing")
    groups = {point.group for point in metadata.distribution("edm2").entry_points}
    check("edm2.ports" in groups, f"entry points of edm2.ports are missing: {groups}")
    check("pytest11" not in groups, "the suite must not load itself into every pytest run")
    shipped = resources.files("backends.pipeline.runs").joinpath("shipped-digits.safetensors")
    check(shipped.is_file(), "the network that ships with edm2 is missing")
    check(len(open_dataset("digits")) == 1797, "the digits are missing")
    shown = subprocess.run([Path(sys.executable).parent / "edm2"], capture_output=True, text=True).stdout
    check("edm2 reconstruct" in shown, "the command edm2 is missing")
    with tempfile.TemporaryDirectory() as folder:  # a project with a package of the same name
        (Path(folder) / "backends").mkdir()
        (Path(folder) / "backends" / "__init__.py").touch()
        asked = [sys.executable, "-m", "conformance", "--help"]
        told = subprocess.run(asked, cwd=folder, capture_output=True, text=True)
        check("python -P -m conformance" in told.stderr and told.stderr.count("\n") == 1, told.stderr)
        asked = [sys.executable, "-P", "-m", "backends.torch.train", "--nonsense"]
        told = subprocess.run(asked, cwd=folder, capture_output=True, text=True)
        check(told.returncode == 2 and "nonsense" in told.stderr + told.stdout, told.stderr)
    missing = subprocess.run([sys.executable, "-m", "backends.torch.train"], capture_output=True, text=True)
    if missing.returncode:  # without the extra: one line that says how to get it
        check(missing.returncode == 2, f"exit status {missing.returncode} without PyTorch")
        check("edm2[torch]" in missing.stderr and missing.stderr.count("\n") == 1, missing.stderr)
    print("wheel: 1 passed, 0 failed")


def check(holds: bool, why: str) -> None:
    if not holds:
        sys.exit(f"wheel: {why}")


if __name__ == "__main__":
    main()
