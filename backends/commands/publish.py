"""edm2 publish: puts a run or a network on the Hugging Face hub, with a model card, in one commit.

Every command reads it there as hf://user/name, as it reads the folder that --outdir writes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from backends.pipeline.checkpoints.hub import SCHEME, named, publish
from backends.pipeline.runs.model_card import check_licence
from backends.pipeline.runs.publishing import Publication, opened, write_folder
from edm2_core.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of ``edm2 publish``."""

    source: tyro.conf.Positional[Path]
    """A run, or a snapshot."""
    repo: str | None = None
    """Repository on the hub, user/name; created if it is new. Needed unless --outdir is given."""
    license: str | None = None
    """Licence of the network, by the hub's name, such as cc-by-4.0. Must be given."""
    sigma_rel: float | None = None
    """Relative length of the one average to publish, reconstructed if it is not stored. Without it: those of the newest
    time, two in most runs, from which others can make more lengths."""
    every: Annotated[bool, tyro.conf.arg(name="all")] = False
    """Publish all stored averages, from which others can make any length precisely."""
    pictures: tuple[Path, ...] = ()
    """Pictures for the card (.png). Without it: the newest grid of samples in the run, and its picture of lengths."""
    private: bool = False
    """Create a private repository."""
    force: bool = False
    """Publish also to a repository that holds something else, beside its files."""
    outdir: Path | None = None
    """Write the folder here instead of uploading it."""


def run(options: Options) -> None:
    """Upload or write the files, and print their address.

    Raises:
        InputError: as :func:`~backends.pipeline.runs.publishing.opened` and
            :func:`~backends.pipeline.checkpoints.hub.publish`, or no repository or licence.
    """
    if options.repo is None and options.outdir is None:
        raise InputError("--repo must be user/name on the hub, got none: name one, or write a folder with --outdir")
    licence = check_licence(options.license)
    address = str(options.outdir) if options.repo is None else SCHEME + named(options.repo)
    publication = Publication(
        source=options.source,
        address=address,
        licence=licence,
        sigma_rel=options.sigma_rel,
        every=options.every,
        pictures=options.pictures,
    )
    with opened(publication) as files:
        for file, content in files.items():
            size = len(content) if isinstance(content, bytes) else content.stat().st_size
            print(f"file      {file}, {size} bytes")
        if not any(file.startswith("samples/") for file in files):
            print("note      the card has no picture: sample from the run first, or give --pictures")
        if options.outdir is not None:
            write_folder(files, options.outdir)
            print(f"wrote     {options.outdir}; read it with --net {options.outdir}")
            return
        message = f"Publish {options.source.name} with edm2"
        page = publish(address, files, message=message, private=options.private, force=options.force)
    print(f"published {page}")
    print(f"next      python -m backends.torch.sample --net {address}")
