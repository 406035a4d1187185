"""The command ``edm2``: runs the command named by its first argument and imports only that one."""

import sys
from collections.abc import Sequence
from importlib import import_module

from backends.pipeline.runs.exit_codes import command, leave
from edm2_core import __version__
from edm2_core.errors import InputError

COMMANDS = {  # name: (module in this package, description)
    "reconstruct": ("reconstruct", "averages of any length from stored ones, in one pass"),
    "plan": ("plan", "which averages to store when, within a budget of files"),
    "import": ("import_official", "an official EDM2 pickle as a snapshot, executing nothing in it"),
    "publish": ("publish", "a run or a network on the Hugging Face hub, with a model card"),
    "export": ("export", "a network for other tools, without a pickle"),
    "convert-state": ("convert_state", "a run's training state to and from checkpoints of other engines"),
    "ema-plot": ("ema_plot", "profiles and reconstruction error of a folder of snapshots"),
    "dataset convert": ("dataset_convert", "a training set of pictures of any kind and size"),
    "dataset info": ("dataset_info", "what a dataset was recognised as"),
    "dataset stats": ("dataset_stats", "mean and standard deviation of each channel of float data"),
    "dataset encode": ("dataset_encode", "images as latents of an autoencoder"),
    "dataset decode": ("dataset_decode", "latents as images"),
    "evaluate": ("evaluate", "FID, FD-DINOv2 and other metrics of a network or of images"),
    "sweep": ("sweep", "the averaging length, or other settings, that make the best images by a metric"),
    "doctor": ("doctor", "what is installed, whether each port computes rightly here, and what to do"),
    "report": ("report", "runs on one page: losses, magnitudes, a slider over the averaging length"),
}


@command
def main(argv: Sequence[str] | None = None) -> int:
    if argv is None:
        sys.path.append("")  # for MODULE:FUNCTION in the current folder; a script begins with its own
    name, *words = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(f"edm2 {__version__}\n")
        for known, (_, text) in COMMANDS.items():
            print(f"  edm2 {known:16} {text}")
        print("\nedm2 NAME --help lists its options")
        return 0
    if name == "--version":
        print(__version__)
        return 0
    if words and f"{name} {words[0]}" in COMMANDS:
        name, *words = (f"{name} {words[0]}", *words[1:])
    if name not in COMMANDS:
        raise InputError(f"edm2 must be followed by one of {', '.join(COMMANDS)}, got {name!r}: see edm2 --help")
    from backends.pipeline.runs.command_line import parse  # needs tyro, which a plain install lacks

    module_name, text = COMMANDS[name]
    module = import_module(f"backends.commands.{module_name}")
    options = parse(module.Options, words, prog=f"edm2 {name}", description=f"{text[0].upper()}{text[1:]}.")
    return module.run(options) or 0


if __name__ == "__main__":
    leave(main())
