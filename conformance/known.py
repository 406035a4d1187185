"""Known failures of a port, from a TOML file: they must fail, so that no entry outlives its cause.

    [[failure]]
    id = "variants"                        # the case, as the report names it
    reason = "float16 sums in float16"
    link = "https://.../issues/1"
    versions = {tensorflow = "<2.20"}      # distributions and the versions of them that fail

An entry applies where all its versions match what is installed. The case must fail then: a pass is an error, and so is
an id that no case has. The registered ports of edm2 have their files in ``conformance/known_failures``.
"""

import tomllib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.specifiers import InvalidSpecifier, SpecifierSet

FOLDER = Path(__file__).parent / "known_failures"


class KnownError(Exception):
    """A file of known failures is invalid; one line."""


@dataclass(frozen=True)
class Failure:
    id: str
    reason: str
    link: str
    versions: dict[str, str]

    @property
    def applies(self) -> bool:
        """Whether the installed versions are those that fail."""
        return all(_version(name) in SpecifierSet(allowed, prereleases=True) for name, allowed in self.versions.items())


def read(port: str, path: str | None = None) -> dict[str, Failure]:
    """The known failures of a port that apply here, by id: those of ``path``, or of the port's own file if any.

    Raises:
        KnownError: no such file, not such a table, or an id that no case has.
    """
    from conformance.cases import PORT_CASES

    file = Path(path) if path else FOLDER / f"{port}.toml"
    if not path and not file.is_file():
        return {}
    try:
        entries = [Failure(**entry) for entry in tomllib.loads(file.read_text(encoding="utf-8")).get("failure", [])]
        failures = {failure.id: failure for failure in entries if failure.applies}
    except (OSError, TypeError, ValueError, AttributeError, InvalidSpecifier, metadata.PackageNotFoundError) as error:
        raise KnownError(
            f"{file} must list failures with id, reason, link and versions, got {error}: see docs"
        ) from error
    if unknown := sorted({failure.id for failure in entries} - {case.name for case in PORT_CASES}):
        raise KnownError(f"{file}: no case is called {unknown[0]!r}: correct the id or remove the entry")
    return failures


def _version(distribution: str) -> str:
    return metadata.version(distribution)
