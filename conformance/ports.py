"""The ports under test: their members, and how a port is found by its name.

A port is any object with some of :data:`MEMBERS`, which take and return NumPy arrays; see ``docs/adding_a_port.md``.
Registered ports are entry points of the group ``edm2.ports``; any other port is named ``package.module:ATTRIBUTE``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import import_module, metadata
from typing import Any

GROUP = "edm2.ports"
CORE = "core"  # names the specification itself, beside the ports

MEMBERS = {
    "denoise": "(config, params, x, sigma, labels=None, condition=None) -> (denoised, logvar)",
    "loss_and_gradients": (
        "(config, params, images, unit_noise, sigma, labels=None, condition=None) -> (loss, gradients)"
    ),
    "train": "(config, params, batches, *, learning_rates, betas, sigma_rels) -> (losses, params, averages)",
    "sample": "(config, params, noise, labels=None, *, condition, guide, guidance, num_steps, ...) -> images",
    "jvp": "(config, params, x, sigma, labels, tangent, condition=None) -> (denoised, its derivative along tangent)",
    "advance": "(config, state, batches, *, learning_rates) -> (losses, state)",
    "variants": "() -> {name: port}: the same port in another precision, compiled or not, on another device",
}


class PortError(Exception):
    """A port that was asked for and cannot be used, in one line."""


class NotImplementedByPort(Exception):
    """The port lacks a member that the case needs."""


@dataclass(frozen=True)
class Subject:
    """A port under its name."""

    name: str
    port: Any

    def member(self, name: str) -> Callable[..., Any]:
        """The port's member of that name. Raises NotImplementedByPort if it has none."""
        member: Callable[..., Any] | None = getattr(self.port, name, None)
        if member is None:
            raise NotImplementedByPort(f"not implemented: {name}{MEMBERS[name]}")
        return member

    def __getattr__(self, name: str) -> Any:
        if name in MEMBERS:
            return self.member(name)
        raise AttributeError(name)

    @cached_property
    def compiles(self) -> bool:
        """Whether each new network and shape takes seconds to compile, so that the suite draws from few networks."""
        return bool(getattr(self.port, "compiles", False))

    def versions(self) -> dict[str, str]:
        """The port's own name, the version of its distribution, and that of the library that it is built on, which a
        port names as ``library``."""
        root = type(self.port).__module__.partition(".")[0]
        distributions = metadata.packages_distributions().get(root, [])
        if root in ("backends", "conformance"):  # an editable installation does not list them
            distributions = ["edm2"]
        own = getattr(self.port, "version", None) or (_version(distributions[0]) if distributions else "unknown")
        library = getattr(self.port, "library", getattr(self.port, "name", root))
        name = str(getattr(self.port, "name", self.name))
        return {"name": name, "port": str(own), "library": f"{library} {_version(library)}"}


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "unknown"


@lru_cache
def registered() -> dict[str, metadata.EntryPoint]:
    return {point.name: point for point in sorted(metadata.entry_points(group=GROUP))}


@lru_cache
def load(name: str) -> Subject:
    """The port registered as ``name``, or the object at ``module:attribute`` anywhere.

    Raises:
        PortError: there is none, or it cannot be imported.
    """
    target = registered()[name].value if name in registered() else name
    module, colon, attribute = target.partition(":")
    if not colon:
        raise PortError(
            f"a port must be one of {', '.join(registered()) or 'none'} or MODULE:ATTRIBUTE, got {name!r}: install "
            "its package, or give its module"
        )
    try:
        port = getattr(import_module(module), attribute)
    except Exception as error:
        raise PortError(f"port {name} cannot be imported: {type(error).__name__}: {error}".splitlines()[0]) from error
    return Subject(name, port)


def available() -> tuple[dict[str, Subject], dict[str, str]]:
    """The registered ports that can run here; and by name, which package the others lack.

    Raises:
        PortError: a port's packages are installed, but it cannot be imported.
    """
    here, absent = {}, {}
    for name, point in registered().items():
        try:
            here[name] = load(name)
        except PortError as error:
            cause = error.__cause__
            module = point.value.partition(":")[0]
            missing = cause.name or "" if isinstance(cause, ModuleNotFoundError) else ""
            # a missing module inside the port's own package is a fault, unless the whole port is missing
            if not missing or (missing.split(".")[0] == module.split(".")[0] and not module.startswith(missing)):
                raise
            absent[name] = f"{missing} is not installed"
    return here, absent
