"""Imports between rooms go one way, and no room holds a file that a reader cannot take in."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = (  # a room may import those above it
    "edm2_core",
    "backends.ports",
    "backends.pipeline.checkpoints",
    "backends.pipeline.data",
    "backends.pipeline.runs",
    "backends.pipeline.report",
    "backends.torch",
    "backends.jax",
    "backends.mlx",
    "backends.commands",
    "conformance",
    "examples",
    "benchmarks",
)
APART = (  # rooms that never import each other, in either direction
    {"backends.torch", "backends.jax", "backends.mlx", "backends.commands"},
)
FRAMEWORKS = {"torch", "jax", "mlx", "optax"}
FILES = sorted(
    path
    for room in ("edm2_core", "backends", "conformance", "examples", "benchmarks")
    for path in (ROOT / room).rglob("*.py")
)


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module):
    return next((room for room in ORDER if module == room or module.startswith(f"{room}.")), None)


def imports(path):
    """The modules that a file imports, at its top or inside functions."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_imports_from_the_rooms_above_its_own(path):
    own = room_of(module_of(path))
    for module in imports(path):
        other = room_of(module)
        if own is None or other is None or other == own:
            continue
        assert ORDER.index(other) < ORDER.index(own), f"{own} must not import {module}"
        assert not any({own, other} <= rooms for rooms in APART), f"{own} must not import {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_only_ports_import_frameworks_when_they_are_imported(path):
    room = room_of(module_of(path))
    if (
        room in ("edm2_core", "backends.ports")
        or str(room).startswith("backends.pipeline")
        or room == "backends.commands"
    ):
        top = [
            node
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in top if isinstance(node, ast.ImportFrom) and not node.level}
        assert not {name.partition(".")[0] for name in names} & FRAMEWORKS


def test_every_room_of_the_order_exists():
    assert [room for room in ORDER if not {room} & {room_of(module_of(path)) for path in FILES}] == []


def test_no_file_is_longer_than_400_lines():
    long = {
        path.name: count
        for path in [*FILES, *(ROOT / "tests").glob("*.py")]
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert not long
