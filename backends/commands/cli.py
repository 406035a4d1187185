"""edm2 NAME ...: the commands that need no framework."""

import sys
from collections.abc import Sequence
from importlib import import_module

from backends.pipeline.runs.exit_codes import command
from backends.pipeline.runs.options import parse
from edm2_core import __version__
from edm2_core.errors import InputError

COMMANDS = {  # name: its module here, and what it does
    "reconstruct": ("reconstruct", "averages of any length from stored ones, in one pass"),
    "plan": ("plan", "which averages to store when, within a budget of files"),
    "import": ("import_official", "an official EDM2 pickle as a snapshot, executing nothing in it"),
    "ema-plot": ("ema_plot", "profiles and reconstruction error of a folder of snapshots"),
    "report": ("report", "runs on one page: losses, magnitudes, a slider over the averaging length"),
}


@command
def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(f"edm2 {__version__}\n")
        for name, (_, what) in COMMANDS.items():
            print(f"  edm2 {name:12} {what}")
        print("\nedm2 NAME --help tells more")
        return 0
    if words[0] == "--version":
        print(__version__)
        return 0
    if words[0] not in COMMANDS:
        raise InputError(f"edm2 must be followed by one of {', '.join(COMMANDS)}, got {words[0]!r}: see edm2 --help")
    module_name, what = COMMANDS[words[0]]
    module = import_module(f"backends.commands.{module_name}")
    return (
        module.run(parse(module.Options, words[1:], prog=f"edm2 {words[0]}", description=what.capitalize() + ".")) or 0
    )


if __name__ == "__main__":
    sys.exit(main())
